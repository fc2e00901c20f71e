"""Attacks that change each pixel by epsilon at most: projected gradient ascent (PGD), its restarts, and Square."""

import importlib.util
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

Objective = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Computes the scalar that the attack maximises, from logits and labels."""

HAS_SQUARE = importlib.util.find_spec("art") is not None
"""Whether the Adversarial Robustness Toolbox, which has the Square attack, is installed."""


def pgd(
    network: nn.Module,
    images: torch.Tensor,
    start: torch.Tensor,
    objective: Callable[[torch.Tensor], torch.Tensor],
    *,
    epsilon: float,
    step: float,
    steps: int,
) -> torch.Tensor:
    """The images after `steps` steps of signed gradient ascent from `start`, projected to epsilon and to [0, 1].

    `objective` is a function of the logits. The network's parameters get no gradient.
    """
    low, high = (images - epsilon).clamp(min=0.0), (images + epsilon).clamp(max=1.0)
    moved = start.clamp(low, high)
    for _ in range(steps):
        moved.requires_grad_()
        (gradient,) = torch.autograd.grad(objective(network(moved)), moved)
        moved = (moved.detach() + step * gradient.sign()).clamp(low, high)
    return moved


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The cross-entropy, the usual objective of PGD."""
    return nn.functional.cross_entropy(logits, labels, reduction="sum")


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The largest other logit minus that of the label; its gradient does not vanish for confident networks."""
    others = logits.scatter(-1, labels[:, None], -torch.inf)
    return (others.amax(dim=-1) - logits.gather(-1, labels[:, None])[:, 0]).sum()


def withstood(
    network: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    epsilon: float,
    steps: int,
    restarts: int,
    seed: int,
    objectives: tuple[Objective, ...] = (cross_entropy, margin),
) -> torch.Tensor:
    """Which images are classified correctly after every attack: each objective, from `restarts` random starts.

    The network must be in evaluation mode. A step is a tenth of epsilon. A misclassified image is not attacked again.
    """
    draw = torch.Generator().manual_seed(seed)
    withstanding = network(images).argmax(dim=-1) == labels
    for objective in objectives:
        for _ in range(restarts):
            rows = withstanding.nonzero()[:, 0]
            if len(rows) == 0:
                return withstanding
            x, y = images[rows], labels[rows]
            noise = (2 * torch.rand(x.shape, generator=draw) - 1).to(x.device)
            moved = pgd(
                network,
                x,
                x + epsilon * noise,
                lambda logits, y=y, objective=objective: objective(logits, y),
                epsilon=epsilon,
                step=epsilon / 10,
                steps=steps,
            )
            with torch.no_grad():
                withstanding[rows] = network(moved).argmax(dim=-1) == y
    return withstanding


def withstood_square(
    network: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, epsilon: float, queries: int, seed: int
) -> torch.Tensor:
    """Which images are classified correctly after the Square attack, which uses logits and no gradients.

    A network that only masks its gradients withstands PGD, but not this attack.
    """
    from art.attacks.evasion import SquareAttack
    from art.estimators.classification import PyTorchClassifier

    num_classes = network(images[:1]).shape[-1]
    classifier = PyTorchClassifier(
        network,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(images.shape[1:]),
        nb_classes=num_classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if images.is_cuda else "cpu",
    )
    np.random.seed(seed)  # noqa: NPY002 - the toolbox draws from NumPy's global state
    attack = SquareAttack(classifier, eps=epsilon, max_iter=queries, nb_restarts=1, verbose=False)
    moved = attack.generate(images.cpu().numpy(), np.eye(num_classes)[labels.cpu().numpy()])
    with torch.no_grad():
        return network(torch.from_numpy(moved).to(images.device)).argmax(dim=-1) == labels
