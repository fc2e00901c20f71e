"""What a type checker must know of the public functions; mypy reads it with the package, and nothing runs it."""

from typing import Any, assert_type

import numpy as np
import numpy.typing as npt

import gklx
from gklx.scoring import ClassScore, DeltaP, Estimate, Parameters, Perplexity, Score, Scores, Summary
from gklx.testing import assert_backends_agree, assert_gradients_match


class Tensor:
    """Stands for any library's array type."""


def uses() -> None:
    """Never called."""
    x = Tensor()
    array: npt.NDArray[np.float32] = np.zeros((2, 3), np.float32)

    assert_type(gklx.kl(x, x), Tensor)
    assert_type(gklx.dkl(x, x, mse_weight=2.0), Tensor)
    assert_type(gklx.ikl(x, x, prior=x, labels=x), Tensor)
    assert_type(gklx.gkl(x, x, gamma=0.5, reduction="none"), Tensor)
    assert_type(gklx.gkl(array, array), npt.NDArray[np.float32])
    assert_type(gklx.gkl(x, x, **gklx.settings["imagenet-resnet34-resnet18"].loss), Tensor)
    assert_type(gklx.grad(gklx.gkl)(x, x, gamma=0.5), Tensor)
    assert_type(gklx.grad(gklx.kl, argnums=(0, 1))(x, x), tuple[Tensor, ...])
    assert_type(gklx.value_and_grad(gklx.gkl)(x, x), tuple[Tensor, Tensor])
    assert_type(gklx.value_and_grad(gklx.gkl, (0, 1))(x, x, gamma=0.5), tuple[Tensor, tuple[Tensor, ...]])
    assert_type(gklx.terms(gklx.gkl)(x, x, gamma=0.5), gklx.Terms[Tensor])
    assert_type(gklx.terms(gklx.gkl)(x, x).mse, Tensor)
    assert_type(gklx.class_sums(x, x, 10), Tensor)
    assert_type(gklx.settings["fixmatch"], gklx.Setting)

    assert_type(gklx.ClassPrior(10, like=x), gklx.ClassPrior[Tensor])
    assert_type(gklx.ClassPrior(10, like=x).table, Tensor)
    assert_type(gklx.ClassPrior(10).table, Any)
    unparametrised: gklx.ClassPrior = gklx.ClassPrior(10)
    unparametrised.update(x, x)
    assert_type(gklx.ClassPriorState.uniform(10, like=x), gklx.ClassPriorState[Tensor])
    assert_type(gklx.ClassPriorState.uniform(10, like=x).update(x, x).advance(), gklx.ClassPriorState[Tensor])
    assert_type(gklx.ClassPriorState(x, x).table, Tensor)

    score = gklx.score(array, array)
    assert_type(score, Score)
    assert_type(score.losses["kl"], Summary)
    assert_type(score.parameters, Parameters)
    assert_type(score.worst_classes, list[ClassScore] | None)
    assert_type(score.perplexity, Perplexity | None)
    assert_type(score.delta_p, DeltaP | None)
    scores = gklx.score_candidates({"a": array}, array)
    assert_type(scores, Scores)
    assert_type(scores.students["a"], Score)
    assert_type(scores.differences["a"]["kl"], Estimate)

    assert_type(gklx.show_config(mode="dicts"), dict[str, Any])
    assert_backends_agree(gklx.kl, array, array, per="row", dtypes=["float32"])
    assert_gradients_match(gklx.kl, array, array, argnums=(0, 1), grad=gklx.grad(gklx.kl, (0, 1)))

    gklx.kl(x, x, gamma=0.5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    assert_backends_agree(gklx.kl, array, per="column")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    gklx.gkl(x, x, reduction="sums")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
