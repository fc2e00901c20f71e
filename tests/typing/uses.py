"""What a type checker must know of the public functions; mypy reads it with the package, and nothing runs it."""

from typing import assert_type

import numpy as np
import numpy.typing as npt

import gklx


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
    assert_type(gklx.terms(gklx.gkl)(x, x), gklx.Terms)
    assert_type(gklx.class_sums(x, x, 10), Tensor)
    assert_type(gklx.settings["fixmatch"], gklx.Setting)

    gklx.kl(x, x, gamma=0.5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    gklx.gkl(x, x, reduction="sums")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
