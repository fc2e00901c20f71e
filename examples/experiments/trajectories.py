"""The theorem KL ≡ DKL in training: the parameters of runs that differ only in the loss, step by step.

A small network is trained adversarially on MNIST by SGD with momentum and weight decay. Its logits on clean images are
the teacher, those on perturbed images the student, so both gradients of the divergence have an effect; the perturbation
is one gradient step that increases the same divergence. Every variant has the same initial parameters, batches and
noise. KL and DKL are written from their definitions (DKL with all pairs of classes and stopped gradients) and
differentiated by PyTorch; they are compared with gklx's KL and DKL, and with IKL and GKL. The control is KL with the
samples of each batch in reverse order, which changes only rounding.

`python examples/experiments/trajectories.py` takes under a minute and writes `results/trajectories.json` and
`results/trajectories.svg`.
"""

import argparse
import functools
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import altair
import numpy as np
import torch
from rich.progress import track
from torch.nn import functional

import gklx
from pieces.experiment import positive
from pieces.images import MNIST, load
from pieces.report import write_atomically

Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

REFERENCE = "KL, definition"
CONTROL = "KL, samples reversed"
DTYPES = {"float64": torch.float64, "float32": torch.float32}
BATCH, HIDDEN, CLASSES = 100, 64, 10
NOISE, RADIUS = 0.1, 2.0  # the noise per pixel at the start of the perturbation, and the Euclidean norm of its step
DIVERGENCE_WEIGHT = 4.0  # relative to the cross-entropy with the labels


def kl_from_definition(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher ‖ student), differentiable in both."""
    log_p, log_q = functional.log_softmax(teacher, dim=-1), functional.log_softmax(student, dim=-1)
    return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def dkl_from_definition(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """DKL with every pair of classes and the paper's stopped gradients."""
    p = torch.softmax(teacher, dim=-1).detach()
    of_teacher = teacher[:, :, None] - teacher[:, None, :]
    of_student = (student[:, :, None] - student[:, None, :]).detach()
    mse = 0.25 * (p[:, :, None] * p[:, None, :] * (of_teacher - of_student) ** 2).sum(dim=(-2, -1))
    ce = -(p * functional.log_softmax(student, dim=-1)).sum(dim=-1)
    return (mse + ce).mean()


VARIANTS: dict[str, Divergence] = {
    REFERENCE: kl_from_definition,
    CONTROL: kl_from_definition,
    "DKL, definition": dkl_from_definition,
    "gklx.kl": gklx.kl,
    "gklx.dkl": gklx.dkl,
    "gklx.ikl": gklx.ikl,
    "gklx.gkl, γ = 0.5": functools.partial(gklx.gkl, gamma=0.5),
}


def batches_of(images: np.ndarray, labels: np.ndarray, dtype: torch.dtype, steps: int, seed: int) -> list[Batch]:
    """Clean images, noise and labels of each step: the same float64 numbers, rounded to the dtype."""
    draw = np.random.default_rng(seed)
    batches = []
    for _ in range(steps):
        rows = draw.choice(len(images), BATCH, replace=False)
        noise = NOISE * draw.standard_normal((BATCH, images.shape[1]))
        batches.append(
            (torch.tensor(images[rows], dtype=dtype), torch.tensor(noise, dtype=dtype), torch.tensor(labels[rows]))
        )
    return batches


def network_of(pixels: int, dtype: torch.dtype, seed: int) -> torch.nn.Module:
    """A network with one hidden layer, whose parameters are drawn in float64 and rounded to the dtype."""
    torch.manual_seed(seed)
    layers = (
        torch.nn.Linear(pixels, HIDDEN, dtype=torch.float64),
        torch.nn.Tanh(),
        torch.nn.Linear(HIDDEN, CLASSES, dtype=torch.float64),
    )
    return torch.nn.Sequential(*layers).to(dtype)


def perturbed(
    network: torch.nn.Module, divergence: Divergence, clean: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """The images after one gradient step that increases the divergence.

    The step is normalised in the Euclidean norm. The usual step by the sign would turn a rounding error of a derivative
    near 0 into a full step.
    """
    moved = (clean + noise).requires_grad_()
    (up,) = torch.autograd.grad(divergence(network(moved), network(clean).detach()), moved)
    return (moved + RADIUS * up / up.norm(dim=-1, keepdim=True)).detach()


def train(
    divergence: Divergence, network: torch.nn.Module, batches: list[Batch], *, reverse: bool
) -> tuple[list[float], list[torch.Tensor]]:
    """The divergence's value at each step, and the parameters after the step."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    values, parameters = [], []
    for batch in batches:
        clean, noise, labels = (x.flip(0) for x in batch) if reverse else batch
        attacked = perturbed(network, divergence, clean, noise)
        teacher = network(clean)
        value = divergence(network(attacked), teacher)
        optimizer.zero_grad()
        (functional.cross_entropy(teacher, labels) + DIVERGENCE_WEIGHT * value).backward()
        optimizer.step()
        values.append(value.item())
        parameters.append(torch.nn.utils.parameters_to_vector(network.parameters()).detach().clone())
    return values, parameters


def run(steps: int, seed: int) -> dict[str, object]:
    """For every variant and dtype, the values and the largest parameter difference from the reference at each step."""
    data = load(MNIST)
    images, held_out = (x.reshape(len(x), -1).astype(np.float64) for x in (data.images, data.held_out))
    runs = []
    settings = [(dtype, variant) for dtype in DTYPES for variant in VARIANTS]
    reference: dict[str, list[torch.Tensor]] = {}
    for dtype, variant in track(settings, description="training", disable=not sys.stderr.isatty()):
        network = network_of(images.shape[1], DTYPES[dtype], seed)
        batches = batches_of(images, data.labels, DTYPES[dtype], steps, seed)
        values, parameters = train(VARIANTS[variant], network, batches, reverse=variant == CONTROL)
        reference.setdefault(dtype, parameters)  # the first variant is the reference
        with torch.no_grad():
            found = network(torch.tensor(held_out, dtype=DTYPES[dtype])).argmax(-1)
        runs.append(
            {
                "dtype": dtype,
                "variant": variant,
                "accuracy": (found == torch.tensor(data.held_out_labels)).double().mean().item(),
                "largest_parameter": parameters[-1].abs().max().item(),
                "values": values,
                "largest_difference": [
                    (own - other).abs().max().item() for own, other in zip(parameters, reference[dtype], strict=True)
                ],
            }
        )
    return {
        "experiment": "trajectories",
        "steps": steps,
        "seed": seed,
        "batch": BATCH,
        "hidden": HIDDEN,
        "versions": {"torch": torch.__version__, "numpy": np.__version__, "gklx": gklx.__version__},
        "runs": runs,
    }


def plot_of(results: dict) -> str:
    """An SVG plot against the step: the parameters' difference from the reference above, the divergence below."""
    rows = [
        {"dtype": each["dtype"], "variant": each["variant"], "step": step + 1, "difference": difference, "value": value}
        for each in results["runs"]
        for step, (difference, value) in enumerate(zip(each["largest_difference"], each["values"], strict=True))
    ]
    step = altair.X("step:Q", title="step")
    color = altair.Color("variant:N", title=None, sort=list(VARIANTS), scale=altair.Scale(scheme="category10"))
    shape = {"width": 330, "height": 200}
    panels = []
    for dtype in DTYPES:
        own = [row for row in rows if row["dtype"] == dtype]
        lines = altair.Chart(altair.Data(values=own)).mark_line(strokeWidth=1.5)
        # A logarithmic axis cannot show a difference of 0, such as the reference's.
        apart = [row for row in own if row["difference"] > 0]
        distance = lines.properties(data=altair.Data(values=apart)).encode(
            x=step,
            y=altair.Y(
                "difference:Q",
                title="largest parameter difference",
                scale=altair.Scale(type="log", domain=[1e-18, 10]),
                axis=altair.Axis(format="~e"),
            ),
            color=color,
        )
        value = lines.encode(x=step, y=altair.Y("value:Q", title="value of the divergence"), color=color)
        panels.append(altair.vconcat(distance.properties(title=dtype, **shape), value.properties(**shape)))
    text = io.StringIO()
    altair.hconcat(*panels).save(text, format="svg")
    return text.getvalue()


def summary_of(results: dict) -> list[str]:
    """A line per run: the largest difference from the reference over the steps, and the last value."""
    return [
        f"{each['dtype']}  {each['variant']:22} parameters differ by at most {max(each['largest_difference']):8.1e}"
        f"  last value {each['values'][-1]:8.5f}  accuracy {each['accuracy']:.2%}"
        for each in results["runs"]
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="KL and DKL training trajectories, equal to rounding.")
    parser.add_argument("--steps", type=positive, default=300, help="steps of SGD (300)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the parameters, batches and noise (0)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder of the results (results/ next to this file)",
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the order of summation is then the same on every machine
    try:
        options.out.mkdir(parents=True, exist_ok=True)  # before training, so that an error comes early
        results = run(options.steps, options.seed)
        write_atomically(options.out / "trajectories.json", json.dumps(results, allow_nan=False) + "\n")
        write_atomically(options.out / "trajectories.svg", plot_of(results))
    except (ImportError, OSError) as error:
        print(f"trajectories: {error}", file=sys.stderr)
        return 1
    print("\n".join(summary_of(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
