"""Distil a byte-level language model into one of half its width, with logits [B, T, 256] and masked padding.

`python examples/experiments/language_model.py` takes minutes on the text of Python's built-in help. Both models predict
the next byte. The student is trained with the bytes and, except in "none", with the frozen teacher's logits at the same
positions; padding after a document's end has sample weight 0. The class weights of IKL and GKL are a class prior: the
teacher's mean prediction by the next byte.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

import gklx
from pieces import text
from pieces.experiment import Experiment, main
from pieces.losses import VARIANTS, Divergence, Weights, divergence
from pieces.training import device, make_optimizer, schedule

BYTES = 256


@dataclass(frozen=True)
class Settings:
    """The settings of one condition."""

    teacher: int = 128
    """The width of the teacher's recurrent layer."""
    student: int = 64
    length: int = 96
    """The bytes per sequence."""
    teacher_epochs: int = 3
    epochs: int = 2
    batch: int = 32
    learning_rate: float = 1e-2
    weights: Weights = Weights(kl_weight=1.0, mse_weight=0.5, ce_weight=1.0, gamma=0.5)  # noqa: RUF009 - frozen
    """KL's weight is that of the cross-entropy of IKL and GKL, so that these add only the wMSE."""
    steps_limit: int | None = None


class Model(nn.Module):
    """A recurrent language model of bytes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(BYTES, width)
        self.memory = nn.GRU(width, width, batch_first=True)
        self.next = nn.Linear(width, BYTES)

    def forward(self, before: torch.Tensor) -> torch.Tensor:
        """The logits [B, T, 256] of the byte after each of the bytes [B, T]."""
        logits: torch.Tensor = self.next(self.memory(self.letters(before))[0])
        return logits


def train(variant: str, seed: int, settings: Settings) -> Mapping[str, float]:
    """Train a student and evaluate it on the held-out documents."""
    teacher, prior = trained_teacher(seed, settings)
    if variant == "teacher":
        return measure(teacher, teacher, settings)
    student = fit(settings.student, seed, settings, teacher, prior, divergence(variant, settings.weights))
    return measure(student, teacher, settings)


@functools.lru_cache(maxsize=1)  # the next run usually has the same seed and condition
def trained_teacher(seed: int, settings: Settings) -> tuple[Model, torch.Tensor]:
    """The wider model, trained with the bytes and frozen, and its class prior [256, 256] on the training documents."""
    teacher = fit(settings.teacher, seed, replace(settings, epochs=settings.teacher_epochs)).requires_grad_(False)
    before, after, counts = tensors(text.load(settings.length)[0])
    prior = gklx.ClassPrior(BYTES, temperature=settings.weights.weight_temperature, like=teacher.next.weight)
    for rows in torch.arange(len(before)).split(settings.batch)[: settings.steps_limit]:
        prior.update(teacher(before[rows]), after[rows], counts[rows])
    prior.advance()
    return teacher, prior.table


def fit(
    width: int,
    seed: int,
    settings: Settings,
    teacher: Model | None = None,
    prior: torch.Tensor | None = None,
    loss: Divergence | None = None,
) -> Model:
    """Train a model with the bytes, and with a teacher if it is given; return it in evaluation mode."""
    before, after, counts = tensors(text.load(settings.length)[0])
    torch.manual_seed(seed)
    student = Model(width).to(device()).train()
    optimizer, scheduler = make_optimizer("adam", student, settings.learning_rate, 0.0, settings.epochs)
    for order in schedule(len(before), settings.batch, settings.epochs, seed, settings.steps_limit):
        for rows in order:
            logits, real = student(before[rows]), counts[rows]
            value = nn.functional.cross_entropy(logits[real], after[rows][real])
            if teacher is not None and loss is not None:
                value = value + loss(logits, teacher(before[rows]), after[rows], prior, sample_weight=real)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
        scheduler.step()
    return student.eval()


@torch.no_grad()
def measure(student: Model, teacher: Model, settings: Settings) -> dict[str, float]:
    """The metrics on the held-out documents, per byte."""
    before, after, counts = tensors(text.load(settings.length)[1])
    nats = divergence_sum = hits = 0.0
    for rows in torch.arange(len(before)).split(256):
        logits, real = student(before[rows]), counts[rows]
        found, truth = logits[real], after[rows][real]
        nats += nn.functional.cross_entropy(found, truth, reduction="sum").item()
        hits += (found.argmax(dim=-1) == truth).sum().item()
        divergence_sum += gklx.kl(logits, teacher(before[rows]), sample_weight=real, reduction="sum").item()
    total = counts.sum().item()
    return {"bits": nats / total / math.log(2), "hits": 100 * hits / total, "divergence": divergence_sum / total}


def tensors(of: text.Sequences) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The preceding bytes, the bytes, and which of them are not padding, on the device."""
    before, after, counts = (torch.from_numpy(x).to(device()) for x in of)
    return before, after, counts


LARGE = Settings(teacher=512, student=256, length=256, teacher_epochs=40, epochs=40, learning_rate=2e-3)

EXPERIMENT = Experiment(
    name="language_model",
    title="Distillation of a byte-level language model to half its width",
    train=train,
    variants=("teacher", *VARIANTS),
    metrics={"bits": "bits a byte", "hits": "next byte foretold, %", "divergence": "KL(teacher ‖ student), nats"},
    higher_is_better={"bits": False, "divergence": False},
    conditions={
        "help": Settings(),
        # Do IKL and GKL add more than a larger weight of KL would?
        "help-heavier": Settings(weights=Weights(kl_weight=3.0, mse_weight=1.5, ce_weight=3.0, gamma=0.5)),
    },
    full={"help": LARGE},
)

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
