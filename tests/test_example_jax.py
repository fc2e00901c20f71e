"""The JAX example trains, reproducibly."""

import importlib.util
import math
from pathlib import Path

import pytest

import backends

PATH = Path(__file__).parents[1] / "examples" / "train_jax.py"
EPOCHS = 24  # beyond the warm-up, so that the loss weights stand still at the end
SHORT = ("--epochs", str(EPOCHS), "--steps", "3")


@pytest.fixture(scope="module")
def example():
    backends.needs("jax")
    pytest.importorskip("optax", reason="optax, which the example trains with, is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn, which has the example's digits, is not installed")
    spec = importlib.util.spec_from_file_location("train_jax", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(example):
    return example.main(SHORT)


def test_three_networks_are_trained(results):
    assert list(results) == ["teacher", "student alone", "student distilled"]
    for each in results.values():
        assert len(each.losses) == EPOCHS
        assert all(math.isfinite(x) for x in each.losses)


def test_accuracies_are_far_above_chance(results):
    for each in results.values():
        assert 0.6 < each.accuracy <= 1.0


def test_losses_fall(example, results):
    assert results["teacher"].losses[-1] < 0.5 * results["teacher"].losses[0]
    assert results["student alone"].losses[-1] < 0.5 * results["student alone"].losses[0]
    # With a teacher the weights of the loss grow first.
    settled = results["student distilled"].losses[example.WARMUP - 1 :]
    assert len(settled) == EPOCHS - example.WARMUP + 1
    assert settled[-1] < settled[0]


def test_weights_are_warmed_up(example, monkeypatch):
    given = []
    true_epoch = example.epoch

    def spy(state, samples, order, warmup):
        given.append((samples.teacher is not None, float(warmup)))
        return true_epoch(state, samples, order, warmup)

    monkeypatch.setattr(example, "epoch", spy)
    example.main(("--epochs", "22", "--steps", "1"))
    distilled = [warmup for with_teacher, warmup in given if with_teacher]
    assert distilled == pytest.approx([min((number + 1) / 20, 1.0) for number in range(22)], rel=1e-6)


def test_prior_of_an_epoch_is_the_teachers_mean_softmax(example):
    """The mean is by class, over the images of the epoch."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from closeness import assert_near

    seen, _ = example.digits(0)
    teacher = example.logits(example.network(jax.random.key(1), (64, 8, 10)), seen.images)
    state = example.start(jax.random.key(0), (64, 8, 10), seen.images)
    order = jnp.arange(3 * 40).reshape(3, 40)
    after, _ = example.epoch(state, seen._replace(teacher=teacher), order, jnp.float32(1.0))
    p = np.asarray(jax.nn.softmax(teacher[:120] / example.PRIOR_TEMPERATURE), dtype="float64")
    labels = np.asarray(seen.labels[:120])
    expected = np.stack([p[labels == y].mean(axis=0) for y in range(10)])
    assert_near(np.asarray(after.prior.table, dtype="float64"), expected, "float32", ulps=32)
    assert not np.asarray(after.prior.sums).any()


def test_epochs_compile_once(example):
    import jax
    import jax.numpy as jnp

    seen, _ = example.digits(0)
    samples = seen._replace(teacher=jnp.zeros((len(seen.labels), 10), jnp.float32))
    state = example.start(jax.random.key(0), (64, 4, 10), seen.images)
    before = example.epoch._cache_size()
    for warmup in (0.25, 0.5, 1.0):
        state, _ = example.epoch(state, samples, jnp.arange(16).reshape(2, 8), jnp.float32(warmup))
    assert example.epoch._cache_size() == before + 1


def test_same_seed_gives_the_same_result(example, results):
    again = example.main(SHORT)
    for name, each in results.items():
        assert again[name].accuracy == each.accuracy
        assert again[name].losses == each.losses


def test_other_seed_gives_another_result(example, results):
    other = example.main((*SHORT, "--seed", "1"))
    for (_, each), (_, its) in zip(results.items(), other.items(), strict=True):
        assert each.losses != its.losses


@pytest.mark.parametrize("option", ["--epochs", "--steps"])
def test_numbers_below_one_are_refused(example, option, capsys):
    with pytest.raises(SystemExit):
        example.main((option, "0"))
    assert "must be at least 1, got 0" in capsys.readouterr().err
