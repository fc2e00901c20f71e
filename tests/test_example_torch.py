"""The PyTorch example trains on the real digits, as its text says."""

import importlib.util
from pathlib import Path

import pytest

import backends
from closeness import assert_near

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_torch.py"


@pytest.fixture
def example():
    backends.needs("torch")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed, and the digits are its")
    spec = importlib.util.spec_from_file_location("train_torch", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine several threads wait for each other a minute long
    yield module
    torch.set_num_threads(threads)


def test_short_run_is_above_chance_and_reproducible(example, capsys):
    found = example.main(["--steps", "60", "--epochs", "9", "--seed", "3"])
    printed = capsys.readouterr().out
    assert list(found) == ["teacher", "student alone", "student distilled"]
    for name, (accuracy, divergence) in found.items():
        assert 0.3 < accuracy <= 1  # by chance 0.1
        assert (divergence == 0) is (name == "teacher")
        assert f"{name:20}{accuracy:>10.2%}{divergence:>18.4f}\n" in printed
    again = example.main(["--steps", "60", "--epochs", "9", "--seed", "3"])
    for name, measured in found.items():
        assert_near(again[name], measured, "float64", ulps=0, by="entry")
    other = example.main(["--steps", "2", "--seed", "4"])
    assert other["student alone"] != found["student alone"]


def test_loss_falls_and_student_approaches_its_teacher(example):
    import torch

    torch.manual_seed(0)
    seen, held_out = example.split(0)
    teacher, student, criterion = example.make_teacher(), example.make_student(), example.make_criterion()
    losses = example.train(teacher, seen, example.from_labels, epochs=2)
    assert losses[1] < 0.5 * losses[0]
    for weight in teacher.parameters():
        weight.grad = None

    before = example.measure(student, teacher, held_out)
    calls = []
    losses = example.train(
        student,
        seen,
        example.from_teacher(teacher, example.GKLLoss(10, gamma=0.3)),
        epochs=4,
        end_epoch=lambda: calls.append(True),
    )
    after = example.measure(student, teacher, held_out)
    assert len(losses) == len(calls) == 4
    assert losses[-1] < 0.5 * losses[0]
    assert after.divergence < 0.5 * before.divergence
    assert after.accuracy > before.accuracy
    assert all(weight.grad is None for weight in teacher.parameters())
    assert criterion.warmup_epochs == 20


def test_criterion_advances_once_per_epoch(example, monkeypatch):
    made, make = [], example.make_criterion
    monkeypatch.setattr(example, "make_criterion", lambda: made.append(make()) or made[-1])
    example.main(["--steps", "14", "--epochs", "2"])
    assert made[0].epoch.item() == 2
    assert not made[0].prior_sums.any()
    assert made[0].prior.diagonal().mean() > 0.1 + 1e-3  # a class's own share, above the uniform table's


def test_steps_option_limits_a_run(example):
    seen, _ = example.split(0)
    student, drawn = example.make_student(), []

    def counted(images, logits, labels):
        drawn.append(len(labels))
        return example.from_labels(images, logits, labels)

    assert len(example.train(student, seen, counted, epochs=3, steps=30)) == 2  # 29 batches an epoch
    assert len(drawn) == 30


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--epochs", "0"], "argument --epochs: must be at least 1, got 0"),
        (["--steps", "-3"], "argument --steps: must be at least 1, got -3"),
        (["--steps", "few"], "argument --steps: invalid positive value: 'few'"),
        (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["--classes", "3"], "unrecognized arguments: --classes 3"),
    ],
)
def test_invalid_options_are_refused(example, capsys, wrong, message):
    with pytest.raises(SystemExit) as stopped:
        example.main(wrong)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
