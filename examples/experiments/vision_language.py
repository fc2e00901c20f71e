"""Distil an image tower and a text tower through the similarities between a batch's images and captions.

`python examples/experiments/vision_language.py` takes minutes on MNIST with captions written for it. Both networks are
trained as CLIP is: every image of a batch has one caption. The logits of a row are the similarities of an image to all
captions of the batch, those of a column the similarities of a caption to all images. The student is trained with the
pairs and, except in "none", with the frozen teacher's logits of the same batch. These have no fixed classes, so the
class weights of IKL and GKL are the teacher's softmax.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

import gklx
from pieces import captions
from pieces.experiment import Experiment, main
from pieces.images import Images, class_counts, load, subset
from pieces.losses import VARIANTS, Divergence, Weights, divergence
from pieces.networks import small
from pieces.training import accuracy, device, held_out, make_optimizer, schedule, tensors


@dataclass(frozen=True)
class Settings:
    """The settings of one condition."""

    size: int
    """The number of images to train both networks on."""
    teacher: int = 16
    """The width of the teacher's towers."""
    student: int = 4
    teacher_epochs: int = 20
    epochs: int = 12
    batch: int = 100
    learning_rate: float = 4e-3
    weights: Weights = Weights(kl_weight=2.0, mse_weight=0.1, ce_weight=2.0, gamma=0.5)  # noqa: RUF009 - frozen
    """KL's weight is that of the cross-entropy of IKL and GKL, so that these add only the wMSE. Similarities are large
    numbers, so their wMSE has a small weight."""
    steps_limit: int | None = None


class Towers(nn.Module):
    """An image tower and a text tower with a common output space, and the scale of their similarities."""

    def __init__(self, width: int) -> None:
        super().__init__()
        space = 4 * width
        self.image = small(width, (1, 28, 28), space)
        # Convolutions over the bytes, with a maximum over positions, detect words at any position.
        self.letters = nn.Embedding(256, 2 * width, padding_idx=0)
        self.words = nn.Conv1d(2 * width, 8 * width, 7, padding=3)
        self.text = nn.Sequential(nn.ReLU(), nn.Linear(8 * width, space))
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """The unit vectors [N, space] of images [N, 1, 28, 28]."""
        return nn.functional.normalize(self.image(images), dim=-1)

    def embed_texts(self, texts: torch.Tensor) -> torch.Tensor:
        """The unit vectors [M, space] of texts, bytes [M, LENGTH]."""
        letters = self.letters(texts.long()).transpose(1, 2)
        return nn.functional.normalize(self.text(self.words(letters).amax(dim=-1)), dim=-1)

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """The scaled similarities [N, M], as logits."""
        return self.log_scale.exp().clamp(max=100.0) * self.embed_images(images) @ self.embed_texts(texts).T


def train(variant: str, seed: int, settings: Settings) -> Mapping[str, float]:
    """Train a student and evaluate it on the held-out images, with captions of other templates."""
    data = load("mnist")
    teacher = trained_teacher(seed, settings)
    if variant == "teacher":
        return measure(teacher, teacher, data)
    student = fit(settings.student, data, seed, settings, teacher, divergence(variant, settings.weights))
    return measure(student, teacher, data)


@functools.lru_cache(maxsize=1)  # the next run usually has the same seed and condition
def trained_teacher(seed: int, settings: Settings) -> Towers:
    """The wider towers, trained with the pairs and frozen."""
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
    """Train towers with pairs, and with a teacher if it is given; return them in evaluation mode."""
    rows = subset(data.labels, class_counts(settings.size, data.num_classes), seed)
    images, _ = tensors(data, rows)
    attributes = captions.attributes_of(
        data.images[rows], data.labels[rows], captions.thresholds_of(data.images, data.labels)
    )
    torch.manual_seed(seed)
    student = Towers(width).to(device()).train()
    optimizer, scheduler = make_optimizer("adam", student, settings.learning_rate, 0.0, settings.epochs)
    draw = np.random.default_rng(seed)
    for order in schedule(len(rows), settings.batch, settings.epochs, seed, settings.steps_limit):
        for batch in order:
            of_batch = captions.Attributes(*(values[batch.numpy()] for values in attributes))
            x, texts = (
                images[batch],
                torch.tensor(captions.captions(of_batch, captions.TO_LEARN, draw), device=device()),
            )
            logits = student(x, texts)
            value = contrast(logits)
            if teacher is not None and loss is not None:
                target = teacher(x, texts)
                value = value + (loss(logits, target) + loss(logits.T, target.T)) / 2
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        scheduler.step()
    return student.eval()


def contrast(logits: torch.Tensor) -> torch.Tensor:
    """CLIP's loss: the cross-entropy of an image's own caption in the batch, and of a caption's own image."""
    own = torch.arange(len(logits), device=logits.device)
    return (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)) / 2


@torch.no_grad()
def measure(student: Towers, teacher: Towers, data: Images) -> dict[str, float]:
    """The metrics on the held-out images; training has used the words of their captions, not the templates."""
    images, labels = held_out(data)
    attributes = captions.attributes_of(
        data.held_out, data.held_out_labels, captions.thresholds_of(data.images, data.labels)
    )
    digits = [torch.tensor(captions.classes(template), device=device()) for template in captions.HELD_OUT]
    all_texts = torch.tensor(captions.all_captions(captions.HELD_OUT_IN_FULL), device=device())
    embedded = student.embed_images(images)
    class_vectors = torch.stack([student.embed_texts(texts) for texts in digits]).mean(dim=0)
    return {
        "zero_shot": accuracy(embedded @ class_vectors.T, labels),
        "caption": accuracy(
            embedded @ student.embed_texts(all_texts).T, torch.tensor(captions.index(attributes), device=device())
        ),
        "divergence": gklx.kl(student(images, all_texts), teacher(images, all_texts)).item(),
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
