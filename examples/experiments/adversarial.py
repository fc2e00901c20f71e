"""Adversarial training with each divergence, for two strengths of the attack and two optimisers.

`python examples/experiments/adversarial.py` takes about eight minutes on MNIST. As in TRADES, the loss is the
cross-entropy of clean images plus the divergence between the logits of attacked and of clean images; the clean logits
are the teacher, and both get a gradient. The attack in training is PGD on the same divergence; "none" trains on clean
images alone. Robust accuracy is measured by attacks that the training did not use: PGD from several starts on the
cross-entropy and on the margin, all of which an image must withstand. With the Adversarial Robustness Toolbox
installed, the images that do are also attacked by Square.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

import gklx
from pieces.attacks import HAS_SQUARE, pgd, withstood, withstood_square
from pieces.experiment import Experiment, main
from pieces.images import Images, class_counts, load, subset
from pieces.losses import VARIANTS, Weights, divergence
from pieces.networks import build
from pieces.training import accuracy, augment, device, held_out, logits_of, make_optimizer, schedule, tensors

EVALUATION_SEED = 0  # every network is evaluated on the same images and starts of the attack


@dataclass(frozen=True)
class Settings:
    """The settings of one condition."""

    epsilon: float = 0.2
    """The largest change of a pixel in [0, 1] by the attack, in training and in evaluation."""
    size: int = 2000
    """The number of images to train on."""
    data: str = "mnist"
    root: str | None = None
    network: tuple[int, ...] = (8,)
    attack_steps: int = 4
    """Steps of the attack in training, of size epsilon / 4."""
    epochs: int = 10
    batch: int = 128
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    warmup_epochs: int = 4
    """The epochs over which epsilon and the divergence's weight grow linearly."""
    shift: int = 0
    """The largest shift of an image in training, in pixels."""
    mirror: bool = False
    """Whether half of the images are mirrored in training."""
    weights: Weights = Weights(  # noqa: RUF009 - frozen
        kl_weight=6.0, mse_weight=20.0, ce_weight=4.0, gamma=1.0, weight_temperature=4.0
    )
    """GKL's weights are those published for CIFAR, KL's that of TRADES."""
    evaluated: int = 500
    """The number of held-out images that are attacked in the evaluation."""
    evaluation_steps: int = 20
    restarts: int = 3
    square_queries: int = 200
    steps_limit: int | None = None


def train(variant: str, seed: int, settings: Settings) -> Mapping[str, float]:
    """Train a network and evaluate it on the held-out images."""
    data = load(settings.data, settings.root)
    images, labels = tensors(data, subset(data.labels, class_counts(settings.size, data.num_classes), seed))
    torch.manual_seed(seed)
    network = build(settings.network, images.shape[1:], data.num_classes).to(device()).train()
    optimizer, scheduler = make_optimizer(
        settings.optimizer, network, settings.learning_rate, settings.weight_decay, settings.epochs
    )
    loss = divergence(variant, settings.weights)
    prior = gklx.ClassPrior(data.num_classes, temperature=settings.weights.weight_temperature, like=images)
    draw = torch.Generator().manual_seed(seed)

    batches = schedule(len(labels), settings.batch, settings.epochs, seed, settings.steps_limit)
    for epoch, order in enumerate(batches):
        warmup = min((epoch + 1) / settings.warmup_epochs, 1.0)
        for rows in order:
            x, y = augment(images[rows], settings.shift, settings.mirror, draw), labels[rows]
            if variant == "none":
                value = nn.functional.cross_entropy(network(x), y)
            else:
                of_batch = functools.partial(loss, labels=y, prior=prior.table)
                attacked = attack(network, x, settings, warmup * settings.epsilon, draw, of_batch)
                clean = network(x)
                value = nn.functional.cross_entropy(clean, y) + warmup * of_batch(network(attacked), clean)
                prior.update(clean.detach(), y)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        prior.advance()
        scheduler.step()
    return measure(network, data, settings)


def attack(
    network: nn.Module,
    images: torch.Tensor,
    settings: Settings,
    epsilon: float,
    draw: torch.Generator,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Attack the images so that the divergence from their clean logits grows; restore the network's mode."""
    network.eval()
    with torch.no_grad():
        clean = network(images)
    noise = torch.randn(images.shape, generator=draw).to(images.device)
    attacked = pgd(
        network,
        images,
        images + 1e-3 * noise,  # at equal logits the gradient of every divergence is 0
        lambda logits: loss(logits, clean),
        epsilon=epsilon,
        step=epsilon / 4,
        steps=settings.attack_steps,
    )
    network.train()
    return attacked


def measure(network: nn.Module, data: Images, settings: Settings) -> dict[str, float]:
    """The metrics on the held-out images."""
    images, labels = held_out(data)
    network.eval().requires_grad_(False)
    some = torch.from_numpy(
        subset(data.held_out_labels, class_counts(settings.evaluated, data.num_classes), EVALUATION_SEED)
    )
    withstood_pgd = withstood(
        network,
        images[some],
        labels[some],
        epsilon=settings.epsilon,
        steps=settings.evaluation_steps,
        restarts=settings.restarts,
        seed=EVALUATION_SEED,
    )
    metrics = {
        "clean": accuracy(logits_of(network, images), labels),
        "robust": 100 * withstood_pgd.double().mean().item(),
    }
    if HAS_SQUARE:
        rows = some[withstood_pgd.cpu()]
        robust_count = 0
        if len(rows):
            robust_count = withstood_square(
                network,
                images[rows],
                labels[rows],
                epsilon=settings.epsilon,
                queries=settings.square_queries,
                seed=EVALUATION_SEED,
            ).sum()
        metrics["square"] = 100 * float(robust_count) / len(some)
    return metrics


CIFAR100 = Settings(
    epsilon=8 / 255,
    size=50_000,
    data="cifar100",
    network=(34, 10),
    attack_steps=10,
    epochs=200,
    warmup_epochs=1,
    shift=4,
    mirror=True,
    evaluated=10_000,
    evaluation_steps=50,
    restarts=5,
    square_queries=5000,
)

EXPERIMENT = Experiment(
    name="adversarial",
    title="Adversarial training",
    train=train,
    variants=VARIANTS,
    metrics={"clean": "clean accuracy, %", "robust": "accuracy under PGD, %"}
    | ({"square": "accuracy under PGD and Square, %"} if HAS_SQUARE else {}),
    conditions={
        "eps0.2-sgd": Settings(),
        "eps0.2-adam": Settings(optimizer="adam", learning_rate=3e-3, weight_decay=0.0),
        "eps0.3-sgd": Settings(epsilon=0.3),
    },
    full={
        "eps8-sgd": CIFAR100,
        "eps8-sgd-gamma0.4": replace(CIFAR100, weights=replace(CIFAR100.weights, gamma=0.4, weight_temperature=1.0)),
    },
)

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
