"""Distil a teacher into a small student with JAX and optax, on scikit-learn's handwritten digits.

Run it as `python examples/train_jax.py`; it needs jax, optax and scikit-learn. The teacher is trained on half of the
images. The student is trained twice on a hundred of them: with the labels alone, and with the teacher's logits as well.
The script prints the accuracies on the other half.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import gklx

CLASSES = 10
TEACHER_WIDTH, STUDENT_WIDTH = 128, 32
STUDENT_IMAGES = 100
BATCH = 32
WARMUP = 20  # epochs
# Within the ranges published for CIFAR-100: the eleven `cifar100-gkl-…` of `gklx.settings`.
MSE_WEIGHT, CE_WEIGHT, GAMMA, TEMPERATURE, PRIOR_TEMPERATURE = 4.0, 4.0, 0.3, 4.0, 4.0
OPTIMIZER = optax.adam(3e-3)

Params = list[tuple[jax.Array, jax.Array]]


class Samples(NamedTuple):
    """Images with labels and teacher; a pytree, so that `jax.tree.map` selects the same rows of all."""

    images: jax.Array
    labels: jax.Array
    teacher: jax.Array | None = None
    """The teacher's logits; None without a teacher."""


class State(NamedTuple):
    """The state of the training."""

    params: Params
    optimizer: optax.OptState
    prior: gklx.ClassPriorState


class Trained(NamedTuple):
    """A network, its accuracy on the held-out images, and its mean loss in each epoch."""

    params: Params
    accuracy: float
    losses: list[float]


def network(key: jax.Array, widths: Sequence[int]) -> Params:
    """The weights and biases of a multi-layer perceptron before training."""
    keys = jax.random.split(key, len(widths) - 1)
    return [
        (jax.random.normal(k, (n, m), jnp.float32) * (2 / n) ** 0.5, jnp.zeros(m, jnp.float32))
        for k, n, m in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


def logits(params: Params, images: jax.Array) -> jax.Array:
    """The network's outputs before the softmax."""
    x = images
    for weights, bias in params[:-1]:
        x = jax.nn.relu(x @ weights + bias)
    weights, bias = params[-1]
    return x @ weights + bias


def start(key: jax.Array, widths: tuple[int, ...], like: jax.Array) -> State:
    """The state before training."""
    params = network(key, widths)
    return State(params, OPTIMIZER.init(params), gklx.ClassPriorState.uniform(CLASSES, like=like))


def loss(params: Params, batch: Samples, table: jax.Array, warmup: jax.Array) -> jax.Array:
    """The cross-entropy with the labels, plus GKL if there is a teacher."""
    student = logits(params, batch.images)
    hard = optax.losses.softmax_cross_entropy_with_integer_labels(student, batch.labels).mean()
    if batch.teacher is None:
        return hard
    return hard + gklx.gkl(
        student,
        batch.teacher,
        prior=table,
        labels=batch.labels,
        mse_weight=warmup * MSE_WEIGHT,
        ce_weight=warmup * CE_WEIGHT,
        gamma=GAMMA,
        temperature=TEMPERATURE,
    )


# The old state is not used again, so its memory is donated to the new one.
@partial(jax.jit, donate_argnames="state")
def epoch(state: State, samples: Samples, order: jax.Array, warmup: jax.Array) -> tuple[State, jax.Array]:
    """One pass over the batches, whose rows are in `order` [steps, batch]; the new state and the mean loss.

    `warmup` is traced, so that an epoch with other loss weights is not compiled again.
    """

    def step(state: State, rows: jax.Array) -> tuple[State, jax.Array]:
        batch = jax.tree.map(lambda x: x[rows], samples)
        value, gradient = jax.value_and_grad(loss)(state.params, batch, state.prior.table, warmup)
        updates, optimizer = OPTIMIZER.update(gradient, state.optimizer, state.params)
        prior = state.prior
        if batch.teacher is not None:
            prior = prior.update(batch.teacher, batch.labels, temperature=PRIOR_TEMPERATURE)
        return State(optax.apply_updates(state.params, updates), optimizer, prior), value

    state, values = jax.lax.scan(step, state, order)
    return state._replace(prior=state.prior.advance()), values.mean()


def accuracy(params: Params, samples: Samples) -> float:
    """The fraction of images whose largest logit is that of their label."""
    return float((logits(params, samples.images).argmax(axis=-1) == samples.labels).mean())


def train(
    key: jax.Array, width: int, seen: Samples, held_out: Samples, *, epochs: int, steps: int | None = None
) -> Trained:
    """Train a network with one hidden layer; the key determines the initial network and the batches."""
    to_start, to_shuffle = jax.random.split(key)
    count, pixels = seen.images.shape
    state = start(to_start, (pixels, width, CLASSES), seen.images)
    batches = min(count // BATCH, steps or count)
    losses = []
    for number in range(epochs):
        shuffled = jax.random.permutation(jax.random.fold_in(to_shuffle, number), count)
        order = shuffled[: batches * BATCH].reshape(batches, BATCH)
        state, mean = epoch(state, seen, order, jnp.float32(min((number + 1) / WARMUP, 1.0)))
        losses.append(float(mean))
    return Trained(state.params, accuracy(state.params, held_out), losses)


def digits(seed: int) -> tuple[Samples, Samples]:
    """The images to train on, and the held-out images."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        (images / 16).astype(np.float32), labels.astype(np.int32), test_size=0.5, random_state=seed, stratify=labels
    )
    images, held_out, labels, held_out_labels = map(jnp.asarray, parts)
    return Samples(images, labels), Samples(held_out, held_out_labels)


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def main(argv: Sequence[str] | None = None) -> dict[str, Trained]:
    """Train the three networks and print their accuracies."""
    parser = argparse.ArgumentParser(description="Distil a teacher into a small student, on handwritten digits.")
    parser.add_argument("--epochs", type=positive, default=100, help="epochs of each network")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split, the networks and the batches")
    parser.add_argument("--steps", type=positive, help="the largest number of batches per epoch [all]")
    given = parser.parse_args(argv)

    seen, held_out = digits(given.seed)
    to_teacher, to_student = jax.random.split(jax.random.key(given.seed))
    run = partial(train, held_out=held_out, epochs=given.epochs, steps=given.steps)
    teacher = run(to_teacher, TEACHER_WIDTH, seen)
    few = jax.tree.map(lambda x: x[:STUDENT_IMAGES], seen)
    alone = run(to_student, STUDENT_WIDTH, few)
    # The images are not augmented and the teacher is frozen, so its logits are computed once.
    distilled = run(to_student, STUDENT_WIDTH, few._replace(teacher=logits(teacher.params, few.images)))
    results = {"teacher": teacher, "student alone": alone, "student distilled": distilled}
    for name, trained in results.items():
        print(f"{name:<17}  held-out accuracy {trained.accuracy:.4f}")
    return results


if __name__ == "__main__":
    main()
