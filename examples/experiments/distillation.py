"""Distil a larger network into a smaller one with each divergence, on balanced and long-tailed data of two sizes.

`python examples/experiments/distillation.py` takes minutes on MNIST. The student is trained with the labels and, except
in "none", with the frozen teacher, which was trained on the same images. A seed determines the images, the teacher, the
initial student and the batches, so the variants of a seed differ only in the divergence. "teacher" is the teacher,
evaluated like the students.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

import gklx
from pieces.experiment import Experiment, main
from pieces.images import Images, class_counts, is_rare, load, subset
from pieces.losses import VARIANTS, Divergence, Weights, divergence
from pieces.networks import build
from pieces.training import accuracy, augment, device, held_out, logits_of, make_optimizer, schedule, tensors


@dataclass(frozen=True)
class Settings:
    """The settings of one condition."""

    size: int
    """The number of images to train both networks on."""
    imbalance: float = 1.0
    """The number of images of the first class divided by that of the last."""
    data: str = "mnist"
    root: str | None = None
    teacher: tuple[int, ...] = (16,)
    student: tuple[int, ...] = (4,)
    teacher_epochs: int = 20
    teacher_learning_rate: float = 2e-3
    epochs: int = 20
    batch: int = 64
    optimizer: str = "adam"
    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    warmup_epochs: int = 5
    """The epochs over which the divergence's weight grows linearly."""
    shift: int = 2
    """The largest shift of an image in training, in pixels."""
    mirror: bool = False
    """Whether half of the images are mirrored in training."""
    weights: Weights = Weights(  # noqa: RUF009 - frozen
        kl_weight=4.0, mse_weight=4.0, ce_weight=4.0, gamma=0.3, temperature=4.0, weight_temperature=4.0
    )
    """GKL's weights are in the ranges published for CIFAR-100. KL's weight is that of the cross-entropy, which has KL's
    gradient if the teacher is frozen, so that IKL and GKL add only the wMSE."""
    steps_limit: int | None = None


def train(variant: str, seed: int, settings: Settings) -> Mapping[str, float]:
    """Train a student and evaluate it on the held-out images."""
    data = load(settings.data, settings.root)
    teacher = trained_teacher(seed, settings)
    if variant == "teacher":
        return measure(teacher, teacher, data)
    student = fit(settings.student, data, seed, settings, teacher, divergence(variant, settings.weights))
    return measure(student, teacher, data)


@functools.lru_cache(maxsize=1)  # the next run usually has the same seed and condition
def trained_teacher(seed: int, settings: Settings) -> nn.Module:
    """The larger network, trained with the labels and frozen."""
    data = load(settings.data, settings.root)
    alone = replace(settings, epochs=settings.teacher_epochs, learning_rate=settings.teacher_learning_rate)
    return fit(settings.teacher, data, seed, alone).requires_grad_(False)


def fit(
    network: tuple[int, ...],
    data: Images,
    seed: int,
    settings: Settings,
    teacher: nn.Module | None = None,
    loss: Divergence | None = None,
) -> nn.Module:
    """Train a network with the labels, and with a teacher if it is given; return it in evaluation mode."""
    counts = class_counts(settings.size, data.num_classes, settings.imbalance)
    images, labels = tensors(data, subset(data.labels, counts, seed))
    torch.manual_seed(seed)
    student = build(network, images.shape[1:], data.num_classes).to(device()).train()
    optimizer, scheduler = make_optimizer(
        settings.optimizer, student, settings.learning_rate, settings.weight_decay, settings.epochs
    )
    prior = gklx.ClassPrior(data.num_classes, temperature=settings.weights.weight_temperature, like=images)
    draw = torch.Generator().manual_seed(seed)

    batches = schedule(len(labels), settings.batch, settings.epochs, seed, settings.steps_limit)
    for epoch, order in enumerate(batches):
        warmup = min((epoch + 1) / settings.warmup_epochs, 1.0)
        for rows in order:
            x, y = augment(images[rows], settings.shift, settings.mirror, draw), labels[rows]
            logits = student(x)
            value = nn.functional.cross_entropy(logits, y)
            if teacher is not None and loss is not None:
                teacher_logits = teacher(x)
                prior.update(teacher_logits, y)
                value = value + warmup * loss(logits, teacher_logits, y, prior.table)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        prior.advance()
        scheduler.step()
    return student.eval()


def measure(student: nn.Module, teacher: nn.Module, data: Images) -> dict[str, float]:
    """The metrics on the held-out images."""
    images, labels = held_out(data)
    logits = logits_of(student, images)
    rare = is_rare(labels, data.num_classes)
    return {
        "accuracy": accuracy(logits, labels),
        "rare": accuracy(logits[rare], labels[rare]),
        "divergence": gklx.kl(logits, logits_of(teacher, images)).item(),
    }


CIFAR100 = Settings(
    size=50_000,
    data="cifar100",
    teacher=(40, 2),
    student=(16, 2),
    teacher_epochs=240,
    teacher_learning_rate=0.05,
    epochs=240,
    optimizer="sgd",
    learning_rate=0.05,
    weight_decay=5e-4,
    warmup_epochs=20,
    shift=4,
    mirror=True,
)

EXPERIMENT = Experiment(
    name="distillation",
    title="Distillation into a smaller network",
    train=train,
    variants=("teacher", *VARIANTS),
    metrics={
        "accuracy": "accuracy, %",
        "rare": "accuracy in the last three tenths of the classes, %",
        "divergence": "KL(teacher ‖ student), nats",
    },
    higher_is_better={"divergence": False},
    conditions={
        "balanced-3000": Settings(3000),
        "balanced-500": Settings(500),
        "longtailed-1000": Settings(1000, imbalance=20.0),
    },
    full={
        "balanced-50000": CIFAR100,
        "balanced-10000": replace(CIFAR100, size=10_000),
        "longtailed-10847": replace(CIFAR100, size=10_847, imbalance=100.0),
    },
)

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
