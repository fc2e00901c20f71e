"""Distils two towers, of images and of captions, through the similarities of a batch's images to its captions.

`python examples/experiments/vision_language.py` takes minutes on MNIST with captions written for it. Both networks are
trained as CLIP is: every image of a batch has one caption, and the logits of a row are its similarities to all of the
batch's captions (and of a column a caption's to all images). The student learns from the pairs and, but for "none",
from the frozen teacher's logits of the same batch. There are no classes in them, so IKL and GKL weigh by the teacher.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import gklx
from pieces import captions
from pieces.experiment import Experiment, main
from pieces.images import Images, class_counts, load, subset
from pieces.losses import VARIANTS, Divergence, Weights, divergence
from pieces.networks import small
from pieces.training import accuracy, device, held_out, optimizer, schedule, tensors


@dataclass(frozen=True)
class Settings:
    """Of one condition."""

    size: int
    """Images to learn from, of both networks."""
    teacher: int = 16
    """Width of the towers."""
    student: int = 4
    teacher_epochs: int = 20
    epochs: int = 12
    batch: int = 100
    learning_rate: float = 4e-3
    weights: Weights = Weights(kl_weight=2.0, mse_weight=0.1, ce_weight=2.0, gamma=0.5)  # noqa: RUF009 - frozen
    """KL weighs what the cross-entropy of IKL and GKL does, so what they add is the wMSE. Similarities are large
    numbers: their wMSE is weighed down to the size of the rest."""
    steps_limit: int | None = None


class Pairs(NamedTuple):
    """What is learned from: images, their rows, and what captions say of them."""

    images: torch.Tensor
    looks: captions.Looks


class Towers(nn.Module):
    """An image tower and a text tower into one space, and the scale of their similarities."""

    def __init__(self, width: int) -> None:
        super().__init__()
        space = 4 * width
        self.image = small(width, (1, 28, 28), space)
        # Words wherever they stand: convolutions over the bytes, and the largest response to each.
        self.letters = nn.Embedding(256, 2 * width, padding_idx=0)
        self.words = nn.Conv1d(2 * width, 8 * width, 7, padding=3)
        self.text = nn.Sequential(nn.ReLU(), nn.Linear(8 * width, space))
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def of_images(self, images: torch.Tensor) -> torch.Tensor:
        """From images [N, 1, 28, 28] to directions [N, space]."""
        return nn.functional.normalize(self.image(images), dim=-1)

    def of_texts(self, texts: torch.Tensor) -> torch.Tensor:
        """From bytes [M, LENGTH] to directions [M, space]."""
        letters = self.letters(texts.long()).transpose(1, 2)
        return nn.functional.normalize(self.text(self.words(letters).amax(dim=-1)), dim=-1)

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """The similarities [N, M], as logits."""
        return self.log_scale.exp().clamp(max=100.0) * self.of_images(images) @ self.of_texts(texts).T


def train(variant: str, seed: int, settings: Settings) -> Mapping[str, float]:
    """Trains a student and measures it on the images held out, with captions it has not seen."""
    data = load("mnist")
    teacher = trained_teacher(seed, settings)
    if variant == "teacher":
        return measure(teacher, teacher, data)
    student = fit(settings.student, data, seed, settings, teacher, divergence(variant, settings.weights))
    return measure(student, teacher, data)


@functools.lru_cache(maxsize=1)  # the next run is most often of the same seed and condition
def trained_teacher(seed: int, settings: Settings) -> Towers:
    """The wider towers, trained on the pairs and frozen."""
    alone = replace(settings, epochs=settings.teacher_epochs)
    return fit(settings.teacher, load("mnist"), seed, alone).requires_grad_(False)


def fit(
    width: int,
    data: Images,
    seed: int,
    settings: Settings,
    teacher: Towers | None = None,
    loss: Divergence | None = None,
) -> Towers:
    """Towers trained on pairs, and on a teacher where there is one; in evaluation mode."""
    rows = subset(data.labels, class_counts(settings.size, data.num_classes), seed)
    images, _ = tensors(data, rows)
    said = captions.looks(data.images[rows], data.labels[rows], captions.scale_of(data.images, data.labels))
    torch.manual_seed(seed)
    student = Towers(width).to(device()).train()
    descent, rate = optimizer("adam", student, settings.learning_rate, 0.0, settings.epochs)
    draw = np.random.default_rng(seed)
    for order in schedule(len(rows), settings.batch, settings.epochs, seed, settings.steps_limit):
        for batch in order:
            of = captions.Looks(*(look[batch.numpy()] for look in said))
            x, texts = images[batch], torch.tensor(captions.captions(of, captions.TO_LEARN, draw), device=device())
            logits = student(x, texts)
            value = contrast(logits)
            if teacher is not None and loss is not None:
                towards = teacher(x, texts)
                value = value + (loss(logits, towards) + loss(logits.T, towards.T)) / 2
            descent.zero_grad()
            value.backward()
            descent.step()
        rate.step()
    return student.eval()


def contrast(logits: torch.Tensor) -> torch.Tensor:
    """CLIP's loss: each image's own caption among the batch's, each caption's own image."""
    own = torch.arange(len(logits), device=logits.device)
    return (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)) / 2


@torch.no_grad()
def measure(student: Towers, teacher: Towers, data: Images) -> dict[str, float]:
    """The metrics on the images held out; nothing of their captions was seen in training but the words."""
    images, labels = held_out(data)
    said = captions.looks(data.held_out, data.held_out_labels, captions.scale_of(data.images, data.labels))
    digits = [torch.tensor(captions.classes(template), device=device()) for template in captions.HELD_OUT]
    every = torch.tensor(captions.every_look(captions.HELD_OUT_IN_FULL), device=device())
    places = student.of_images(images)
    among = torch.stack([student.of_texts(texts) for texts in digits]).mean(dim=0)
    return {
        "zero_shot": accuracy(places @ among.T, labels),
        "caption": accuracy(places @ student.of_texts(every).T, torch.tensor(captions.index(said), device=device())),
        "divergence": gklx.kl(student(images, every), teacher(images, every)).item(),
    }


LARGE = Settings(3000, teacher=64, student=16, teacher_epochs=100, epochs=100, learning_rate=1e-3)

EXPERIMENT = Experiment(
    name="vision_language",
    title="Distillation of image and text towers through their similarities",
    train=train,
    variants=("teacher", *VARIANTS),
    metrics={
        "zero_shot": "zero-shot accuracy among ten digits, %",
        "caption": "own caption found among sixty, %",
        "divergence": "KL(teacher ‖ student) over sixty captions, nats",
    },
    higher_is_better={"divergence": False},
    conditions={"pairs-3000": Settings(3000), "pairs-500": Settings(500, epochs=40, teacher_epochs=60, batch=50)},
    full={"pairs-3000": LARGE, "pairs-500": replace(LARGE, size=500, batch=50)},
)

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
