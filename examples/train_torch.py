"""Distil a network into a smaller one with GKL, in PyTorch, on scikit-learn's handwritten digits.

Run it as `python examples/train_torch.py`; it needs PyTorch and scikit-learn. A teacher is trained on half of the
images. Two equal students are then trained on 200 of them in the same order, one with the labels alone and one with
labels and teacher. The script prints results on the other half.
"""

import argparse
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gklx
from gklx.torch import GKLLoss

CLASSES = 10
BATCH = 32
FEW = 200
TEACHER_EPOCHS = 20

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Computes the loss of a batch from images, logits and labels."""


class Measured(NamedTuple):
    """The results on the held-out images."""

    accuracy: float
    divergence: float
    """KL(teacher ‖ network), averaged over the images."""


def make_teacher() -> nn.Module:
    """A small convolutional network."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 4 * 4, CLASSES),
    )


def make_student() -> nn.Module:
    """A network with one convolution of 8 channels and a twentieth of the teacher's parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 4 * 4, CLASSES)
    )


def make_criterion() -> GKLLoss:
    """GKL with weights in the ranges published for CIFAR-100: the eleven `cifar100-gkl-…` of `gklx.settings`."""
    return GKLLoss(
        CLASSES,
        mse_weight=4.0,
        ce_weight=1.0,
        gamma=0.3,
        temperature=4.0,
        weight_temperature=4.0,
        warmup_epochs=20,
    )


def split(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Half of the 1,797 images to train on, half held out; [N, 1, 8, 8] with values in [0, 1]."""
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8)
    labels = torch.tensor(digits, dtype=torch.int64)
    seen, held_out = train_test_split(range(len(labels)), test_size=0.5, random_state=seed, stratify=digits)
    return TensorDataset(images[seen], labels[seen]), TensorDataset(images[held_out], labels[held_out])


def train(
    network: nn.Module,
    data: TensorDataset,
    loss_of: Loss,
    *,
    epochs: int,
    steps: int | None = None,
    seed: int = 0,
    end_epoch: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train for `epochs`, but for `steps` batches at most; return the mean loss of each epoch."""
    loader = DataLoader(data, BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    network.train()
    means, left = [], epochs * len(loader) if steps is None else steps
    for _ in range(epochs):
        if left == 0:
            break
        losses = []
        for images, labels in itertools.islice(loader, left):
            loss = loss_of(images, network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        means.append(torch.stack(losses).mean().item())
        left -= len(losses)
        end_epoch()
    network.eval()
    return means


def from_labels(images: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss with the labels alone."""
    return nn.functional.cross_entropy(logits, labels)


def from_teacher(teacher: nn.Module, criterion: GKLLoss) -> Loss:
    """The loss with the labels and a frozen teacher."""

    def loss_of(images: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher_logits = teacher(images)
        return nn.functional.cross_entropy(logits, labels) + criterion(logits, teacher_logits, labels)

    return loss_of


@torch.no_grad()
def measure(network: nn.Module, teacher: nn.Module, data: TensorDataset) -> Measured:
    """The accuracy, and KL from the teacher."""
    images, labels = data.tensors
    logits = network(images)
    accuracy = (logits.argmax(dim=-1) == labels).double().mean().item()
    return Measured(accuracy, gklx.kl(logits, teacher(images)).item())


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def main(argv: list[str] | None = None) -> dict[str, Measured]:
    """Train the three networks, print their results and return them."""
    parser = argparse.ArgumentParser(description="Distil a network into a smaller one with GKL, on handwritten digits.")
    parser.add_argument("--epochs", type=positive, default=150, help="epochs of a student (default %(default)s)")
    parser.add_argument("--steps", type=positive, help="the largest number of steps of each network")
    parser.add_argument("--seed", type=int, default=0, help="seed of split, networks and order (default %(default)s)")
    options = parser.parse_args(argv)
    seen, held_out = split(options.seed)
    few = TensorDataset(*seen[:FEW])
    length = {"steps": options.steps, "seed": options.seed}

    torch.manual_seed(options.seed)
    teacher = make_teacher()
    train(teacher, seen, from_labels, epochs=TEACHER_EPOCHS, **length)

    torch.manual_seed(options.seed)
    alone = make_student()
    train(alone, few, from_labels, epochs=options.epochs, **length)

    torch.manual_seed(options.seed)
    distilled, criterion = make_student(), make_criterion()
    to_student = from_teacher(teacher, criterion)
    train(distilled, few, to_student, epochs=options.epochs, **length, end_epoch=criterion.advance)

    networks = {"teacher": teacher, "student alone": alone, "student distilled": distilled}
    found = {name: measure(network, teacher, held_out) for name, network in networks.items()}
    print(f"{'held out':20}{'accuracy':>10}{'KL from teacher':>18}")
    for name, (accuracy, divergence) in found.items():
        print(f"{name:20}{accuracy:>10.2%}{divergence:>18.4f}")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)  # for such small networks more threads are slower
    main()
