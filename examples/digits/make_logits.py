"""Make the logits in this folder, of a teacher and a smaller student on scikit-learn's handwritten digits.

Run it as `python examples/digits/make_logits.py`; it needs scikit-learn. Both networks are trained on one half of the
images; the files have their logits, and the labels, of the other half.
"""

import os
import tempfile
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

HERE = Path(__file__).resolve().parent
SEED = 0


def logits(network: MLPClassifier, x: np.ndarray) -> np.ndarray:
    """The network's outputs before the softmax."""
    *hidden, last = zip(network.coefs_, network.intercepts_, strict=True)
    for weights, bias in hidden:
        x = np.maximum(x @ weights + bias, 0)
    return x @ last[0] + last[1]


def save(name: str, x: np.ndarray) -> None:
    """Write a file completely or not at all."""
    with tempfile.NamedTemporaryFile(dir=HERE, suffix=".part", delete=False) as file:
        try:
            np.save(file, x, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
            os.replace(file.name, HERE / name)
        except BaseException:
            os.unlink(file.name)
            raise


def main() -> None:
    """Train both networks, print their accuracies and write the three files."""
    images, labels = load_digits(return_X_y=True)
    seen, held_out, seen_labels, held_out_labels = train_test_split(
        images / 16.0, labels, test_size=0.5, random_state=SEED, stratify=labels
    )
    for name, width in (("teacher", 128), ("student", 8)):
        network = MLPClassifier((width,), alpha=1e-2, max_iter=1000, random_state=SEED).fit(seen, seen_labels)
        found = logits(network, held_out)
        np.testing.assert_array_equal(found.argmax(axis=-1), network.predict(held_out))
        print(f"{name}: {width} hidden units, accuracy {network.score(held_out, held_out_labels):.4f}")
        save(f"{name}.npy", found.astype(np.float32))
    save("labels.npy", held_out_labels.astype(np.int64))


if __name__ == "__main__":
    main()
