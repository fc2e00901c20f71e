"""The experiments: statistics, reports, errors, shared modules, and two steps of each recipe."""

import dataclasses
import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

import backends
from closeness import assert_near

pytestmark = pytest.mark.evidence

EXPERIMENTS = Path(__file__).parents[1] / "examples" / "experiments"
T_975 = 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025))  # Student's quantile, which for 2 degrees of freedom has this form
NEEDED = ("altair", "rich", "scipy", "vl_convert")


@pytest.fixture
def load_module(monkeypatch):
    """Imports a module of the experiments, as a recipe does."""
    for package in NEEDED:
        pytest.importorskip(package, reason=f"{package} is not installed, and the experiments use it")
    monkeypatch.syspath_prepend(EXPERIMENTS)
    return importlib.import_module


@pytest.fixture
def torch():
    backends.needs("torch")
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(threads)


@pytest.fixture
def mnist(load_module):
    try:
        return load_module("pieces.images").load("mnist")
    except (FileNotFoundError, ModuleNotFoundError) as absent:
        pytest.skip(str(absent))


@dataclasses.dataclass(frozen=True)
class Settings:
    scale: float = 1.0
    fault: str = ""
    steps_limit: int | None = None


@dataclasses.dataclass(frozen=True)
class ImageSettings(Settings):
    data: str = "mnist"
    root: str | None = None


def train(variant, seed, settings):
    """The accuracies of KL and DKL are 90, 91, …; GKL's are higher by 1, 2, 3, … times the scale."""
    if settings.fault == "raise" and variant == "gkl":
        raise ArithmeticError("no step\ncan be made")
    if settings.fault == "nan" and seed == 1:
        return {"accuracy": 90.0, "loss": math.nan}
    if settings.fault == "stop" and variant == "gkl":
        raise KeyboardInterrupt
    if settings.fault == "missing":
        return {"accuracy": 90.0}
    if settings.fault == "limit":
        return {"accuracy": settings.steps_limit or 0, "loss": 0.0}
    more = seed + 1 if variant == "gkl" else 0
    return {"accuracy": 90.0 + seed + settings.scale * more, "loss": 0.5}


@pytest.fixture
def toy(load_module):
    """An experiment with three variants and two conditions, whose training is plain arithmetic."""

    def make(**changes):
        made = {
            "name": "toy",
            "title": "A toy",
            "train": train,
            "variants": ("kl", "dkl", "gkl"),
            "metrics": {"accuracy": "accuracy, %", "loss": "loss"},
            "conditions": {"plain": Settings(), "double": Settings(2.0)},
            "full": {"ten": Settings(10.0)},
            "higher_is_better": {"loss": False},
        }
        return load_module("pieces.experiment").Experiment(**(made | changes))

    return make


@pytest.fixture
def run(load_module, tmp_path, capsys):
    """A function that runs an experiment; it returns the exit status, the folder, and the text of both streams."""

    def ran(experiment, *arguments, processes=1):
        arguments = [*arguments, "--out", str(tmp_path / "out"), "--processes", str(processes)]
        try:
            status = load_module("pieces.experiment").main(experiment, arguments)
        except SystemExit as stopped:
            status = stopped.code
        return status, tmp_path / "out", *capsys.readouterr()

    return ran


def test_mean_has_the_interval_of_students_t(load_module):
    statistics = load_module("pieces.statistics")
    estimate = statistics.mean([1.0, 2.0, 3.0])
    half = T_975 / math.sqrt(3)
    assert estimate.count == 3
    found = [estimate.mean, estimate.low, estimate.high, estimate.half_width]
    assert_near(found, [2.0, 2.0 - half, 2.0 + half, half], "float64", ulps=8)
    assert not estimate.excludes_zero
    assert statistics.mean([11.0, 12.0, 13.0]).excludes_zero
    assert statistics.mean([-11.0, -12.0, -13.0]).excludes_zero


def test_interval_needs_two_values_and_mean_needs_one(load_module):
    statistics = load_module("pieces.statistics")
    single = statistics.mean([4.0])
    assert single.mean == 4.0
    assert math.isnan(single.low)
    assert math.isnan(single.high)
    assert not single.excludes_zero
    with pytest.raises(ValueError, match="at least one value, got none"):
        statistics.mean([])


def test_differences_are_paired_by_seed(load_module):
    statistics = load_module("pieces.statistics")
    found = statistics.paired_difference({2: 4.0, 0: 3.0, 1: 5.0, 8: 70.0}, {0: 1.0, 1: 2.0, 2: 3.0, 7: 9.0})
    half = T_975 / math.sqrt(3)  # of 2, 3, 1
    assert_near([found.mean, found.half_width, found.count], [2.0, half, 3], "float64", ulps=8)
    with pytest.raises(ValueError, match="a seed that both sides have"):
        statistics.paired_difference({0: 1.0}, {1: 1.0})


def test_results_table_and_plot_are_written(toy, run):
    status, out, printed, _ = run(toy(), "--seeds", "3")
    assert status == 0
    assert sorted(path.name for path in out.iterdir()) == ["toy.json", "toy.md", "toy.svg"]
    results = json.loads((out / "toy.json").read_text())
    assert results["title"] == "A toy"
    assert results["command"] == "python examples/experiments/toy.py --seeds 3"  # not where, nor how many at a time
    assert results["settings"]["double"] == {"scale": 2.0, "fault": "", "steps_limit": None}
    assert results["versions"]["numpy"] == np.__version__
    assert len(results["runs"]) == 2 * 3 * 3
    last = {"condition": "double", "variant": "gkl", "seed": 2, "metrics": {"accuracy": 98.0, "loss": 0.5}}
    assert results["runs"][-1] == last
    table = (out / "toy.md").read_text()
    assert printed == table
    plain, double = table.split("## double")
    assert "| variant | accuracy, % ↑ | Δ kl | loss ↓ | Δ kl |" in plain
    assert "| kl | 91.0 ± 2.5 | – | 0.50 ± 0.00 | – |" in plain
    assert "| dkl | 91.0 ± 2.5 | +0.00 ± 0.00 | 0.50 ± 0.00 | +0.00 ± 0.00 |" in plain
    assert "| gkl | 93.0 ± 5.0 | +2.0 ± 2.5 | 0.50 ± 0.00 | +0.00 ± 0.00 |" in plain
    assert "| gkl | 95.0 ± 7.5 | +4.0 ± 5.0 |" in double
    svg = (out / "toy.svg").read_text()
    assert svg.startswith("<svg")
    assert all(text in svg for text in ("A toy", "plain", "double", "accuracy, %", "dkl"))


def test_difference_larger_than_its_interval_is_bold(toy, run):
    _, _, printed, _ = run(toy(conditions={"plain": Settings()}), "--seeds", "5")
    assert "| **+3.0 ± 2.0** |" in printed


def test_options_select_variants_and_conditions(toy, run):
    status, _, printed, _ = run(toy(), "--only", "gkl", "--condition", "double", "--seeds", "1")
    assert status == 0
    assert "| gkl | 92.00 | – | 0.50 | – |" in printed  # nothing to be compared with, and no interval
    assert "dkl" not in printed
    assert "plain" not in printed
    assert "## ten" in run(toy(), "--full", "--seeds", "1")[2]


def test_steps_limit_reaches_the_training(toy, run):
    _, _, printed, _ = run(toy(conditions={"plain": Settings(fault="limit")}), "--steps-limit", "7", "--seeds", "1")
    assert "| kl | 7.00 |" in printed


def test_worker_processes_give_the_same_results(toy, run):
    alone = json.loads((run(toy(), "--seeds", "2")[1] / "toy.json").read_text())
    status, out, *_ = run(toy(), "--seeds", "2", processes=2)
    assert status == 0
    assert json.loads((out / "toy.json").read_text())["runs"] == alone["runs"]


@pytest.mark.parametrize(
    ("wrong", "output_text"),
    [
        (["--only", "kl", "jsd"], "argument --only: invalid choice: 'jsd'"),
        (["--condition", "triple"], "argument --condition: invalid choice: 'triple' (choose from plain, double)"),
        (["--seeds", "0"], "argument --seeds: must be at least 1, got 0"),
        (["--processes", "no"], "argument --processes: invalid positive value: 'no'"),
        (["--data", "cifar10"], "unrecognized arguments: --data cifar10"),
    ],
)
def test_invalid_option_is_a_one_line_error(toy, run, wrong, output_text):
    status, out, printed, errors = run(toy(), *wrong)
    assert status == 2
    assert errors.startswith(f"toy.py: error: {output_text}")
    assert errors.count("\n") == 1
    assert not printed
    assert not out.exists()


@pytest.mark.parametrize(
    ("fault", "status", "output_text"),
    [
        ("raise", 1, "toy: error: plain, gkl, seed 0: ArithmeticError: no step\n"),
        ("nan", 1, "toy: error: plain, kl, seed 1: loss is nan\n"),
        ("missing", 1, "toy: error: plain, kl, seed 0: measured ['accuracy'], expected ['accuracy', 'loss']\n"),
        ("stop", 130, "toy: interrupted, nothing was written\n"),
    ],
)
def test_failed_run_leaves_the_old_files(toy, run, fault, status, output_text):
    _, out, *_ = run(toy(), "--seeds", "1")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    found, _, printed, errors = run(toy(conditions={"plain": Settings(fault=fault)}), "--seeds", "2")
    assert found == status
    assert errors.endswith(output_text)
    assert "Traceback" not in errors
    assert not printed
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_failure_in_a_worker_is_a_one_line_error(toy, run):
    status, out, _, errors = run(toy(conditions={"plain": Settings(fault="raise")}), processes=2)
    assert status == 1
    assert errors.splitlines()[-1].endswith("ArithmeticError: no step")
    assert "Traceback" not in errors
    assert not out.exists()


def test_cifar_needs_the_root_option(toy, run):
    status, _, _, errors = run(toy(conditions={"plain": ImageSettings()}), "--data", "cifar100")
    assert status == 2
    assert errors == "toy.py: error: cifar100 needs --root DIR, the folder that holds its files\n"


def test_missing_cifar_files_are_a_one_line_error(torch, load_module, run, tmp_path):
    status, out, _, errors = run(
        load_module("distillation").EXPERIMENT, "--data", "cifar10", "--root", str(tmp_path), "--seeds", "1"
    )
    assert status == 1
    last = errors.splitlines()[-1]
    assert last.startswith("distillation: error: balanced-3000, teacher, seed 0: ")
    assert "cifar10" in last
    assert not out.exists()


def test_mnist_is_split_evenly(mnist):
    assert mnist.images.shape == (3000, 1, 28, 28)
    assert mnist.held_out.shape == (2000, 1, 28, 28)
    assert mnist.images.dtype == np.float32
    assert mnist.images.min() == 0
    assert mnist.images.max() == 1
    assert np.bincount(mnist.labels).tolist() == [300] * 10
    assert np.bincount(mnist.held_out_labels).tolist() == [200] * 10
    ink = mnist.images[mnist.labels == 1].mean() / mnist.images[mnist.labels == 0].mean()
    assert 0.3 < ink < 0.6  # a one takes less than half of a nought's ink


def test_long_tailed_class_counts_fall_geometrically(load_module):
    class_counts = load_module("pieces.images").class_counts
    assert class_counts(50, 10).tolist() == [5] * 10
    assert class_counts(1000, 10, 20.0).tolist() == [294, 211, 151, 108, 78, 56, 40, 29, 20, 15]
    assert class_counts(10_847, 100, 100.0).max() <= 500  # what CIFAR-100 has
    assert class_counts(12, 3, 1e6).min() == 1


def test_subset_is_determined_by_its_seed(load_module):
    subset = load_module("pieces.images").subset
    labels = np.repeat([0, 1, 2], 20)
    rows = subset(labels, [5, 3, 1], seed=4)
    assert np.bincount(labels[rows]).tolist() == [5, 3, 1]
    assert len(set(rows.tolist())) == 9
    assert rows.tolist() == subset(labels, [5, 3, 1], seed=4).tolist()
    assert rows.tolist() != subset(labels, [5, 3, 1], seed=5).tolist()
    with pytest.raises(ValueError, match="class 1 has 20 samples, 21 are asked for"):
        subset(labels, [5, 21, 1], seed=4)


@pytest.fixture
def gradient_of(torch, load_module):
    """A function: the student's gradient of a named divergence, with a frozen teacher."""
    losses = load_module("pieces.losses")
    draw = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 6, 10, dtype=torch.float64, generator=draw)
    prior = torch.rand(10, 10, dtype=torch.float64, generator=draw)
    weights = losses.Weights(kl_weight=3.0, mse_weight=5.0, ce_weight=3.0, gamma=0.5, temperature=2.0)

    def gradient(name):
        leaf = student.clone().requires_grad_()
        losses.divergence(name, weights)(leaf, teacher, torch.arange(6), prior).backward()
        return leaf.grad.numpy()

    return gradient


def test_one_sided_variants_of_the_ablation_have_kls_gradient(load_module, gradient_of):
    kl = gradient_of("kl")
    assert_near(gradient_of("dkl"), kl, "float64", ulps=64)
    for name in load_module("pieces.losses").ABLATION:
        if name.startswith("onesided"):
            assert_near(gradient_of(name), kl, "float64", ulps=64)
        else:
            assert np.abs(gradient_of(name) - kl).max() > 1e-3


def test_ablation_contains_gkl(load_module, gradient_of):
    assert len(set(load_module("pieces.losses").ABLATION)) == 16
    assert_near(gradient_of("symmetric-prior-0.5"), gradient_of("gkl"), "float64", ulps=0)
    assert np.abs(gradient_of("symmetric-teacher-0.5") - gradient_of("gkl")).max() > 1e-3
    assert np.abs(gradient_of("symmetric-prior-0.2") - gradient_of("gkl")).max() > 1e-3


def test_unknown_divergence_is_an_error(load_module):
    losses = load_module("pieces.losses")
    with pytest.raises(ValueError, match="unknown divergence 'jsd'; there are none, kl, dkl"):
        losses.divergence("jsd", losses.Weights())
    assert losses.divergence("none", losses.Weights())(None, None) == 0


def test_batches_are_determined_by_their_seed_and_stop_at_the_limit(torch, load_module):
    schedule = load_module("pieces.training").schedule
    epochs = list(schedule(10, 4, 3, seed=1, steps_limit=None))
    assert [[len(batch) for batch in epoch] for epoch in epochs] == [[4, 4, 2]] * 3
    assert sorted(torch.cat(epochs[1]).tolist()) == list(range(10))
    assert torch.cat(epochs[0]).tolist() != torch.cat(epochs[1]).tolist()
    again = list(schedule(10, 4, 3, seed=1, steps_limit=5))
    assert [len(epoch) for epoch in again] == [3, 2]
    assert again[1][1].tolist() == epochs[1][1].tolist()


def test_augmentation_shifts_and_mirrors_images(torch, load_module):
    augment = load_module("pieces.training").augment
    images = 1 + torch.arange(40 * 2 * 5 * 5.0).reshape(40, 2, 5, 5)
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    found = set()
    for image, moved in zip(padded, augment(images, 1, True, torch.Generator().manual_seed(0)), strict=True):
        for turned in (False, True):
            expected = moved.flip(-1) if turned else moved
            windows = [
                (i, j, turned) for i in range(3) for j in range(3) if image[:, i : i + 5, j : j + 5].equal(expected)
            ]
            found.update(windows)
            if windows:
                break
        else:
            pytest.fail("not a window of the padded image, nor its mirror")
    assert {i for i, _, _ in found} == {j for _, j, _ in found} == {0, 1, 2}
    assert {turned for _, _, turned in found} == {False, True}
    assert augment(images, 0, False, torch.Generator()) is images


def test_augmentation_of_the_jax_recipe_shifts_images(load_module):
    backends.needs("jax")
    pytest.importorskip("optax")
    moved = load_module("distillation_jax").shifted
    images = 1 + np.arange(30 * 1 * 4 * 4, dtype=np.float32).reshape(30, 1, 4, 4)
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    for image, found in zip(padded, moved(images, 1, np.random.default_rng(0)), strict=True):
        windows = [image[:, i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
        assert any((window == found).all() for window in windows)


@pytest.mark.parametrize(
    ("network", "num_classes", "parameters"),
    # As others count them: 0.70 and 2.26 million on CIFAR-100, 46.2 million on CIFAR-10.
    [((16, 2), 100, 703_284), ((40, 2), 100, 2_255_156), ((34, 10), 10, 46_160_474)],
)
def test_wide_residual_networks_have_the_published_size(torch, load_module, network, num_classes, parameters):
    build = load_module("pieces.networks").build
    with torch.device("meta"):
        made = build(network, (3, 32, 32), num_classes)
        assert made(torch.zeros(2, 3, 32, 32)).shape == (2, num_classes)
    assert sum(weights.numel() for weights in made.parameters()) == parameters


class Threshold:
    """A network for two classes that compares the only pixel with 0.5, so that its margin is known."""

    def __call__(self, images):
        pixel = images.flatten(1).mean(dim=1)
        import torch

        return torch.stack([0.5 - pixel, pixel - 0.5], dim=-1)


def test_image_withstands_attacks_within_its_margin(torch, load_module):
    attacks = load_module("pieces.attacks")
    images = torch.tensor([0.9, 0.6, 0.45, 0.7]).reshape(4, 1, 1, 1)
    labels = torch.tensor([1, 1, 0, 0])  # 0.4, 0.1 and 0.05 from the threshold, and wrong at once
    for epsilon, expected in ((0.02, [True, True, True, False]), (0.07, [True, True, False, False]),
                              (0.2, [True, False, False, False]), (0.45, [False] * 4)):  # fmt: skip
        for objective in (attacks.cross_entropy, attacks.margin):
            standing = attacks.withstood(
                Threshold(), images, labels, epsilon=epsilon, steps=20, restarts=1, seed=0, objectives=(objective,)
            )
            assert standing.tolist() == expected


def test_attack_stays_within_its_bounds_and_raises_the_loss(torch, load_module):
    attacks = load_module("pieces.attacks")
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    images, labels = torch.rand(8, 1, 4, 4), torch.arange(8) % 3
    moved = attacks.pgd(
        network,
        images,
        images + 5.0,
        lambda logits: attacks.cross_entropy(logits, labels),
        epsilon=0.1,
        step=0.03,
        steps=9,
    )
    assert (moved - images).abs().max() <= 0.1 + 1e-6
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert attacks.cross_entropy(network(moved), labels) > attacks.cross_entropy(network(images), labels) + 0.1
    assert all(weights.grad is None for weights in network.parameters())


@pytest.mark.parametrize("name", ["adversarial", "distillation", "ablation", "vision_language", "language_model"])
def test_recipe_runs(torch, load_module, mnist, run, name):
    experiment = load_module(name).EXPERIMENT
    status, out, printed, errors = run(experiment, "--steps-limit", "2", "--seeds", "1")
    assert status == 0, errors
    runs = json.loads((out / f"{name}.json").read_text())["runs"]
    assert len(runs) == len(experiment.conditions) * len(experiment.variants)
    assert printed.count("\n## ") == len(experiment.conditions)
    # Two steps may leave two losses with the same accuracies under one condition, not under all.
    kl, gkl = (
        [found["metrics"] for found in runs if found["variant"] == variant]
        for variant in ("kl", "symmetric-prior-0.5" if name == "ablation" else "gkl")
    )
    assert kl != gkl


def test_jax_recipe_runs(load_module, mnist, run):
    backends.needs("jax")
    pytest.importorskip("optax", reason="optax is not installed, and the recipe in JAX uses it")
    few = ["--only", "teacher", "kl", "gkl", "--condition", "balanced-500"]  # each variant is compiled, for seconds
    status, out, _, errors = run(load_module("distillation_jax").EXPERIMENT, "--steps-limit", "2", "--seeds", "1", *few)
    assert status == 0, errors
    teacher, kl, gkl = (
        found["metrics"]["divergence"] for found in json.loads((out / "distillation_jax.json").read_text())["runs"]
    )
    assert teacher == 0
    assert kl > 0
    assert gkl > 0
    assert kl != gkl


def test_recipe_is_reproducible_and_dkl_trains_as_kl(torch, load_module, mnist):
    recipe = load_module("distillation")
    settings = recipe.Settings(200, epochs=3, teacher_epochs=1)
    kl = recipe.train("kl", 5, settings)
    recipe.trained_teacher.cache_clear()
    assert recipe.train("kl", 5, settings) == kl
    assert_near(recipe.train("dkl", 5, settings)["divergence"], kl["divergence"], "float32", ulps=4096)
    assert recipe.train("kl", 6, settings) != kl
    assert recipe.train("teacher", 5, settings)["divergence"] == 0


def test_captions_describe_the_image(load_module, mnist):
    captions = load_module("pieces.captions")
    blank = np.zeros((2, 1, 28, 28), np.float32)
    for row in range(4, 24):
        blank[0, 0, row, 24 - row] = 1.0  # from the lower left to the upper right
        blank[1, 0, row, row - 1 : row + 2] = 1.0
    scale = captions.Thresholds(np.full(10, 0.05), np.array([-0.5, 0.5]))
    attributes = captions.attributes_of(blank, np.array([1, 7]), scale)
    texts = captions.captions(attributes, ("a {stroke}, {slant} {digit}",), np.random.default_rng(0))
    assert [bytes(text).rstrip(b"\0") for text in texts] == [
        b"a thin, right-leaning one",
        b"a bold, left-leaning seven",
    ]
    every = captions.all_captions("a {stroke}, {slant} {digit}")
    assert len({bytes(text) for text in every}) == 60
    assert (every[captions.index(attributes)] == texts).all()
    measured = captions.attributes_of(mnist.images, mnist.labels, captions.thresholds_of(mnist.images, mnist.labels))
    assert 0.4 < measured.stroke.mean() < 0.6
    assert np.bincount(measured.slant).min() > 0.3 * len(mnist.labels)


def test_held_out_captions_are_not_trained_on(load_module):
    captions = load_module("pieces.captions")
    assert not {*captions.HELD_OUT, captions.HELD_OUT_IN_FULL} & set(captions.TO_LEARN)
    with pytest.raises(ValueError, match="may have 64 bytes, got 65"):
        captions.as_bytes(["three", "x" * 65])


def test_text_is_cut_and_split_by_documents(load_module):
    text = load_module("pieces.text")
    found = text.cut([b"abcde", b"xy"], 3)
    assert found.bytes.tolist() == [[97, 98, 99], [100, 101, 0], [120, 121, 0]]
    assert found.before.tolist() == [[0, 97, 98], [99, 100, 101], [0, 120, 121]]
    assert found.counts.tolist() == [[True] * 3, [True, True, False], [True, True, False]]
    learned, held_out = text.load(64)
    assert not {row.tobytes() for row in held_out.bytes[held_out.counts.all(axis=1)]} & {
        row.tobytes() for row in learned.bytes
    }
    assert 0.1 < len(held_out.bytes) / len(learned.bytes) < 0.4


def test_padding_does_not_affect_loss_or_gradient(torch, load_module):
    """Logits after a document's end, NaN included, affect neither the loss nor the gradient."""
    losses = load_module("pieces.losses")
    logits, towards = torch.randn(2, 3, 5, 256, generator=torch.Generator().manual_seed(0)).unbind()
    real = torch.arange(5) < torch.tensor([5, 2, 4])[:, None]
    after, prior = torch.arange(15).reshape(3, 5), torch.full((256, 256), 1 / 256)
    for name in ("kl", "dkl", "ikl", "gkl"):
        loss = losses.divergence(name, losses.Weights(gamma=0.5))
        found = []
        for padding in (0.0, torch.nan):
            student = torch.where(real[..., None], logits, padding).requires_grad_()
            value = loss(student, towards, after, prior, sample_weight=real)
            found.append((value.item(), torch.autograd.grad(value, student)[0]))
        assert found[0][0] == found[1][0]
        assert found[0][1].equal(found[1][1])
        assert (found[1][1][~real] == 0).all()
