"""Distils a model of English, byte by byte, into one of half its width: logits [B, T, 256], the padding masked.

`python examples/experiments/language_model.py` takes minutes on the text of Python's own help. Both models read a byte
and give logits for the next. The student learns from the bytes and, but for "none", from the frozen teacher's logits at
the same places; what stands after a document's end has a sample weight of 0. IKL and GKL weigh by a class prior: the
teacher's mean prediction where the next byte was this one.
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
from pieces.training import device, optimizer, schedule

BYTES = 256


@dataclass(frozen=True)
class Settings:
    """Of one condition."""

    teacher: int = 128
    """Width of the recurrent layer."""
    student: int = 64
    length: int = 96
    """Bytes a sequence."""
    teacher_epochs: int = 3
    epochs: int = 2
    batch: int = 32
    learning_rate: float = 1e-2
    weights: Weights = Weights(kl_weight=1.0, mse_weight=0.5, ce_weight=1.0, gamma=0.5)  # noqa: RUF009 - frozen
    """KL weighs what the cross-entropy of IKL and GKL does, so what they add is the wMSE."""
    steps_limit: int | None = None


class Model(nn.Module):
    """A recurrent model of bytes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(BYTES, width)
        self.memory = nn.GRU(width, width, batch_first=True)
        self.next = nn.Linear(width, BYTES)

    def forward(self, before: torch.Tensor) -> torch.Tensor:
        """From bytes [B, T] to logits [B, T, 256] for the byte after each."""
        logits: torch.Tensor = self.next(self.memory(self.letters(before))[0])
        return logits


def train(variant: str, seed: int, settings: Settings) -> Mapping[str, float]:
    """Trains a student and measures it on the documents held out."""
    teacher, prior = trained_teacher(seed, settings)
    if variant == "teacher":
        return measure(teacher, teacher, settings)
    student = fit(settings.student, seed, settings, teacher, prior, divergence(variant, settings.weights))
    return measure(student, teacher, settings)


@functools.lru_cache(maxsize=1)  # the next run is most often of the same seed and condition
def trained_teacher(seed: int, settings: Settings) -> tuple[Model, torch.Tensor]:
    """The wider model, trained on the bytes and frozen, and its class prior [256, 256] over what it learned from."""
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
    """A model trained on the bytes, and on a teacher where there is one; in evaluation mode."""
    before, after, counts = tensors(text.load(settings.length)[0])
    torch.manual_seed(seed)
    student = Model(width).to(device()).train()
    descent, rate = optimizer("adam", student, settings.learning_rate, 0.0, settings.epochs)
    for order in schedule(len(before), settings.batch, settings.epochs, seed, settings.steps_limit):
        for rows in order:
            logits, real = student(before[rows]), counts[rows]
            value = nn.functional.cross_entropy(logits[real], after[rows][real])
            if teacher is not None and loss is not None:
                value = value + loss(logits, teacher(before[rows]), after[rows], prior, sample_weight=real)
            descent.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            descent.step()
        rate.step()
    return student.eval()


@torch.no_grad()
def measure(student: Model, teacher: Model, settings: Settings) -> dict[str, float]:
    """The metrics over the bytes of the documents held out."""
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
    """The bytes before, the bytes, and which of them count, on the device."""
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
        # Is what IKL and GKL add more than a heavier KL would be?
        "help-heavier": Settings(weights=Weights(kl_weight=3.0, mse_weight=1.5, ce_weight=3.0, gamma=0.5)),
    },
    full={"help": LARGE},
)

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
