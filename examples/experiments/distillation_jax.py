"""Distil a larger network into a smaller one with each divergence, in JAX and optax.

`python examples/experiments/distillation_jax.py` is `distillation.py` in JAX, with the same MNIST images, networks and
settings, but other random numbers. It does not need PyTorch.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gklx
from pieces.experiment import Experiment, main
from pieces.images import Images, class_counts, is_rare, load, subset
from pieces.losses import VARIANTS, Weights, divergence

ADAM = optax.scale_by_adam()

Params = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """The settings of one condition."""

    size: int
    """The number of images to train both networks on."""
    imbalance: float = 1.0
    """The number of images of the first class divided by that of the last."""
    data: str = "mnist"
    root: str | None = None
    teacher: int = 16
    """The number of channels of the first convolution."""
    student: int = 4
    teacher_epochs: int = 20
    teacher_learning_rate: float = 2e-3
    epochs: int = 20
    batch: int = 64
    learning_rate: float = 1e-2
    warmup_epochs: int = 5
    """The epochs over which the divergence's weight grows linearly."""
    shift: int = 2
    """The largest shift of an image in training, in pixels."""
    weights: Weights = Weights(  # noqa: RUF009 - frozen
        kl_weight=4.0, mse_weight=4.0, ce_weight=4.0, gamma=0.3, temperature=4.0, weight_temperature=4.0
    )
    steps_limit: int | None = None


class State(NamedTuple):
    """The state of the training."""

    params: Params
    adam: optax.OptState
    prior: gklx.ClassPriorState


def train(variant: str, seed: int, settings: Settings) -> Mapping[str, float]:
    """Train a student and evaluate it on the held-out images."""
    data = load(settings.data, settings.root)
    teacher = trained_teacher(seed, settings)
    if variant == "teacher":
        return measure(teacher, teacher, data)
    return measure(fit(settings.student, data, seed, settings, variant, teacher), teacher, data)


@functools.lru_cache(maxsize=1)  # the next run usually has the same seed and condition
def trained_teacher(seed: int, settings: Settings) -> Params:
    """The larger network, trained with the labels."""
    data = load(settings.data, settings.root)
    alone = replace(settings, epochs=settings.teacher_epochs, learning_rate=settings.teacher_learning_rate)
    return fit(settings.teacher, data, seed, alone)


def fit(
    width: int, data: Images, seed: int, settings: Settings, variant: str = "none", teacher: Params | None = None
) -> Params:
    """Train a network with the labels, and with a teacher if it is given."""
    rows = subset(data.labels, class_counts(settings.size, data.num_classes, settings.imbalance), seed)
    images, labels = data.images[rows], data.labels[rows].astype(np.int32)
    params = network(jax.random.key(seed), width, images.shape[1:], data.num_classes)
    prior = gklx.ClassPriorState.uniform(data.num_classes, like=params["out"]["bias"])
    state = State(params, ADAM.init(params), prior)
    step = make_step(variant, settings.weights)
    milestones = [settings.epochs * eighths // 8 for eighths in (5, 6, 7)]
    for epoch, batches in enumerate(schedule(images, labels, seed, settings)):
        warmup = jnp.float32(min((epoch + 1) / settings.warmup_epochs, 1.0))
        rate = jnp.float32(settings.learning_rate * 0.1 ** sum(epoch >= milestone for milestone in milestones))
        for x, y in batches:
            state = step(state, x, y, teacher, warmup, rate)
        state = state._replace(prior=state.prior.advance())
    return state.params


@functools.cache  # the arguments hold all that changes, so that a process compiles a step once, not once per seed
def make_step(variant: str, weights: Weights) -> Callable[..., State]:
    """A compiled step of Adam: a function of state, images, labels, teacher, warm-up factor and learning rate."""
    loss = divergence(variant, weights)

    def value_of(params: Params, x: jax.Array, y: jax.Array, target: Any, table: jax.Array, warmup: jax.Array) -> Any:
        student = logits(params, x)
        value = optax.losses.softmax_cross_entropy_with_integer_labels(student, y).mean()
        return value if target is None else value + warmup * loss(student, target, y, table)

    @jax.jit
    def step(
        state: State, x: jax.Array, y: jax.Array, teacher: Params | None, warmup: jax.Array, rate: jax.Array
    ) -> State:
        params, adam, prior = state
        target = None if teacher is None else logits(teacher, x)
        gradient = jax.grad(value_of)(params, x, y, target, prior.table, warmup)
        updates, adam = ADAM.update(gradient, adam)
        updates = jax.tree.map(lambda update: -rate * update, updates)
        if target is not None:
            prior = prior.update(target, y, temperature=weights.weight_temperature)
        return State(optax.apply_updates(params, updates), adam, prior)

    return step


def schedule(
    images: np.ndarray, labels: np.ndarray, seed: int, settings: Settings
) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """For each epoch, its batches of shifted images and labels; ends after `steps_limit` batches.

    An incomplete last batch is left out, since another batch size would be compiled again.
    """
    draw = np.random.default_rng(seed)
    left = settings.epochs * len(labels) if settings.steps_limit is None else settings.steps_limit
    for _ in range(settings.epochs):
        full = len(labels) // settings.batch
        parts = draw.permutation(len(labels))[: full * settings.batch].reshape(full, settings.batch)[:left]
        if not len(parts):
            return
        yield [(shifted(images[rows], settings.shift, draw), labels[rows]) for rows in parts]
        left -= len(parts)


def shifted(images: np.ndarray, shift: int, draw: np.random.Generator) -> np.ndarray:
    """Shift each image at random by up to `shift` pixels in both directions, padded with zeros."""
    count, _, height, width = images.shape
    padded = np.pad(images, ((0, 0), (0, 0), (shift, shift), (shift, shift)))
    down, right = draw.integers(2 * shift + 1, size=(2, count, 1))
    rows, columns = down + np.arange(height), right + np.arange(width)
    padded = np.take_along_axis(padded, rows[:, None, :, None], axis=2)
    return np.take_along_axis(padded, columns[:, None, None, :], axis=3)


def network(key: jax.Array, width: int, shape: tuple[int, ...], num_classes: int) -> Params:
    """The initial parameters of two strided convolutions with normalisation, and two linear layers."""
    channels, height, _ = shape
    side = (height + 3) // 4
    shapes = {
        "first": (width, channels, 5, 5),
        "second": (2 * width, width, 5, 5),
        "hidden": (8 * width, 2 * width * side * side),
        "out": (num_classes, 8 * width),
    }
    params = {}
    for (name, weights), k in zip(shapes.items(), jax.random.split(key, len(shapes)), strict=True):
        # Uniform within ±1/√fan-in, as PyTorch initialises its layers.
        bound = float(np.prod(weights[1:])) ** -0.5
        params[name] = {
            "weights": jax.random.uniform(k, weights, jnp.float32, -bound, bound),
            "bias": jnp.zeros(weights[0], jnp.float32),
            "scale": jnp.ones(weights[0], jnp.float32),
        }
    return params


def logits(params: Params, images: jax.Array) -> jax.Array:
    """The logits [N, classes] of images [N, channels, height, width]."""
    x = jnp.asarray(images)
    for name in ("first", "second"):
        layer = params[name]
        x = jax.lax.conv_general_dilated(x, layer["weights"], window_strides=(2, 2), padding=((2, 2), (2, 2)))
        x = jax.nn.standardize(x, axis=(1, 2, 3)) * layer["scale"][:, None, None] + layer["bias"][:, None, None]
        x = jax.nn.relu(x)
    x = x.reshape(len(x), -1)
    x = jax.nn.relu(x @ params["hidden"]["weights"].T + params["hidden"]["bias"])
    return x @ params["out"]["weights"].T + params["out"]["bias"]


def measure(student: Params, teacher: Params, data: Images) -> dict[str, float]:
    """The metrics on the held-out images."""
    student_logits, labels = logits(student, data.held_out), data.held_out_labels
    right = np.asarray(student_logits.argmax(axis=-1)) == labels
    rare = is_rare(labels, data.num_classes)
    return {
        "accuracy": 100 * right.mean(),
        "rare": 100 * right[rare].mean(),
        "divergence": float(gklx.kl(student_logits, logits(teacher, data.held_out))),
    }


EXPERIMENT = Experiment(
    name="distillation_jax",
    title="Distillation into a smaller network, in JAX",
    train=train,
    variants=("teacher", *VARIANTS),
    metrics={
        "accuracy": "accuracy, %",
        "rare": "accuracy in the last three tenths of the classes, %",
        "divergence": "KL(teacher ‖ student), nats",
    },
    higher_is_better={"divergence": False},
    conditions={"balanced-500": Settings(500), "longtailed-1000": Settings(1000, imbalance=20.0)},
    full={
        "balanced-3000": Settings(3000, teacher_epochs=240, epochs=240, warmup_epochs=20),
        "longtailed-1000": Settings(1000, imbalance=20.0, teacher_epochs=240, epochs=240, warmup_epochs=20),
    },
)

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
