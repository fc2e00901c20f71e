"""Training in PyTorch: device, batches, optimizer, augmentation, accuracy."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from .images import Images


def device() -> torch.device:
    """A GPU if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tensors(data: Images, rows: np.ndarray | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The training images, or some rows of them, and their labels, on the device."""
    rows = np.arange(len(data.labels)) if rows is None else rows
    return torch.from_numpy(data.images[rows]).to(device()), torch.from_numpy(data.labels[rows]).to(device())


def held_out(data: Images) -> tuple[torch.Tensor, torch.Tensor]:
    """The held-out images and their labels, on the device."""
    return torch.from_numpy(data.held_out).to(device()), torch.from_numpy(data.held_out_labels).to(device())


def schedule(count: int, batch: int, epochs: int, seed: int, steps_limit: int | None) -> Iterator[list[torch.Tensor]]:
    """For each epoch the rows of each batch, determined by the seed; ends after `steps_limit` batches."""
    draw = torch.Generator().manual_seed(seed)
    left = epochs * count if steps_limit is None else steps_limit
    for _ in range(epochs):
        batches = list(torch.randperm(count, generator=draw).split(batch))[:left]
        if not batches:
            return
        yield batches
        left -= len(batches)


def make_optimizer(
    name: str, network: nn.Module, learning_rate: float, weight_decay: float, epochs: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """SGD with Nesterov's momentum ("sgd") or Adam ("adam"), and the learning rate's schedule, stepped once per epoch.

    The rate is divided by 10 after 5/8, 6/8 and 7/8 of the epochs: 150, 180 and 210 of the usual 240.
    """
    if name == "sgd":
        optimizer = torch.optim.SGD(
            network.parameters(), learning_rate, momentum=0.9, weight_decay=weight_decay, nesterov=True
        )
    elif name == "adam":
        optimizer = torch.optim.Adam(network.parameters(), learning_rate, weight_decay=weight_decay)
    else:
        raise ValueError(f"unknown optimizer {name!r}; there are sgd, adam")
    milestones = [epochs * eighths // 8 for eighths in (5, 6, 7)]
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)


def augment(images: torch.Tensor, shift: int, mirror: bool, generator: torch.Generator) -> torch.Tensor:
    """Shift each image at random by up to `shift` pixels, padded with zeros; with `mirror`, mirror half of them."""
    if shift == 0 and not mirror:
        return images
    count, _, height, width = images.shape
    padded = nn.functional.pad(images, (shift, shift, shift, shift))
    moves = torch.randint(2 * shift + 1, (2, count, 1), generator=generator).to(images.device)
    rows = moves[0] + torch.arange(height, device=images.device)
    columns = moves[1] + torch.arange(width, device=images.device)
    if mirror:
        mirrored = (torch.rand(count, 1, generator=generator) < 0.5).to(images.device)
        columns = torch.where(mirrored, columns.flip(-1), columns)
    moved = padded.take_along_dim(rows[:, None, :, None], dim=2)
    return moved.take_along_dim(columns[:, None, None, :], dim=3)


@torch.no_grad()
def logits_of(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The network's logits in evaluation mode, in batches; the mode is restored."""
    was_training = network.training
    network.eval()
    logits = torch.cat([network(part) for part in images.split(500)])
    network.train(was_training)
    return logits


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The percentage of samples whose largest logit is that of their label."""
    return 100 * (logits.argmax(dim=-1) == labels).double().mean().item()
