"""The four losses as PyTorch modules: `KLLoss`, `DKLLoss`, `IKLLoss` and `GKLLoss`.

`import gklx` does not import this module, and so not PyTorch. Settings are the constructor's, tensors are `forward`'s.
IKL and GKL keep the class prior of the run and the epoch of its warm-up as buffers: they move with the module, and a
resumed run continues with them.
"""

from types import FunctionType
from typing import Any, ClassVar, Literal, Self

import torch

import gklx

from ._core.checks import class_count, type_name, whole_number
from .losses import call_builder
from .prior import allow_in_torch_load

__all__ = ["DKLLoss", "GKLLoss", "IKLLoss", "KLLoss"]

Reduction = Literal["mean", "sum", "none"]

allow_in_torch_load()


class _Loss(torch.nn.Module):
    """A loss with its settings, which are attributes of the module and shown by `repr`."""

    _function: ClassVar[Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__name__ in __all__ and cls.__module__ == __name__:
            # Python's TypeErrors about arguments then name the public class.
            cls.forward = _renamed(cls.forward, f"{cls.__name__}.forward")

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        # In float64, the widest dtype: a setting too large for float32 is refused in a call in float32, not here.
        tiny = torch.zeros(1, 1, dtype=torch.float64, device="cpu")
        numbers = call_builder(self._function)(tiny, tiny, **settings).numbers._asdict()  # raises for invalid settings
        self._names = tuple(settings)
        for name, value in settings.items():
            plain = type(value) in (int, float) or name not in numbers
            setattr(self, name, value if plain else numbers[name])  # PyTorch's compiler follows no number of NumPy's

    def extra_repr(self) -> str:
        """The settings, as they are written in the constructor."""
        return ", ".join(f"{name}={value!r}" for name, value in self._settings().items())

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}


def _renamed(function: Any, qualname: str) -> Any:
    same = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    for name in ("__kwdefaults__", "__annotations__", "__doc__", "__module__"):
        setattr(same, name, getattr(function, name))
    same.__qualname__ = qualname
    return same


class _UnlabelledLoss(_Loss):
    """KL and DKL."""

    def forward(
        self,
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        labels: None = None,
        *,
        sample_weight: torch.Tensor | None = None,
        where: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of a batch; arguments, result and errors as in the function of `gklx`.

        `labels` exists only for a clear error: without class weights labels have no use.
        """
        if labels is not None:
            raise TypeError(
                f"labels must not be given to {type(self).__name__}, which has no class weights and takes "
                f"two positional arguments, got {type_name(labels)}"
            )
        loss: torch.Tensor = self._function(
            student_logits, teacher_logits, **self._settings(), sample_weight=sample_weight, where=where
        )
        return loss


class _ClassWeightedLoss(_Loss):
    """IKL and GKL: a class prior where there are labels, and a warm-up."""

    prior: torch.Tensor | None
    prior_sums: torch.Tensor | None
    epoch: torch.Tensor
    num_classes: int | None
    warmup_epochs: int
    weight_temperature: float

    def __init__(self, num_classes: int | None, warmup_epochs: int, **settings: Any) -> None:
        epochs = whole_number(warmup_epochs)
        if epochs is None:
            raise TypeError(f"warmup_epochs must be an integer, got {type_name(warmup_epochs)}")
        if epochs < 0:
            raise ValueError(f"warmup_epochs must be at least 0, got {warmup_epochs}")
        super().__init__(**settings)
        num_classes = None if num_classes is None else class_count(num_classes)
        self.num_classes, self.warmup_epochs = num_classes, epochs
        prior = prior_sums = None
        if num_classes is not None:
            prior, prior_sums = gklx.ClassPriorState.uniform(num_classes, like=torch.zeros(1, dtype=torch.float32))
        self.register_buffer("prior", prior)
        self.register_buffer("prior_sums", prior_sums)
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))

    @classmethod
    def from_settings(cls, name: str, num_classes: int | None = None, *, reduction: Reduction = "mean") -> Self:
        """The module with a published setting of `gklx.settings`, its warm-up included.

        Parameters
        ----------
        name : str
            A key of `gklx.settings`, such as "imagenet-resnet34-resnet18".
        num_classes : int, optional
            C, where the setting has a class prior; not given where it has the teacher's own weights.
        reduction : {"mean", "sum", "none"}
            As in the constructor.

        Returns
        -------
        IKLLoss or GKLLoss
            Without a warm-up where none is known.

        Raises
        ------
        ValueError
            An unknown name, a setting that is published in part, `num_classes` missing or not wanted, or a setting of
            GKL for `IKLLoss`.
        """
        if name not in gklx.settings:
            raise ValueError(f"name must be one of {', '.join(gklx.settings)}, got {name!r}")
        setting = gklx.settings[name]
        arguments: dict[str, Any] = {**setting.loss}
        if setting.weights == "class prior" and num_classes is None:
            raise ValueError(f"num_classes must be given for {name!r}, which has a class prior, got None")
        if setting.weights == "teacher" and num_classes is not None:
            raise ValueError(
                f"num_classes must not be given for {name!r}, which has the teacher's own weights, got {num_classes!r}"
            )
        if setting.divergence == "gkl" and issubclass(cls, IKLLoss):
            raise ValueError(f"name must be a setting of IKL, got {name!r}, a setting of GKL")
        return cls(num_classes, **arguments, warmup_epochs=setting.warmup_epochs or 0, reduction=reduction)

    def forward(
        self,
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        sample_weight: torch.Tensor | None = None,
        where: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of a batch; in training mode its teacher logits are added to `prior_sums`.

        Arguments, result and errors are as in the function of `gklx`. `labels` must be given with `num_classes` and
        must not be given without: ValueError. Where there is an error nothing is added.
        """
        if self.prior is None and labels is not None:
            raise ValueError("labels need num_classes in the constructor, got labels and num_classes=None")
        if self.prior is not None and labels is None:
            raise ValueError(f"labels must be given with num_classes, got None and num_classes={self.num_classes}")
        loss: torch.Tensor = self._function(
            student_logits,
            teacher_logits,
            prior=self.prior,
            labels=labels,
            **self._settings(),
            sample_weight=sample_weight,
            where=where,
        )
        if self.training and labels is not None:
            self._collect(teacher_logits, labels, sample_weight, where)
        if self.warmup_epochs:
            # The factor applies to both weights, hence to the loss. A tensor: reading a number would wait for the GPU.
            loss = loss * (self.epoch + 1).to(loss.dtype).div(self.warmup_epochs).clamp(max=1.0)
        return loss

    @torch.no_grad()
    def advance(self) -> None:
        """Ends an epoch: the sums since the last call become the table, and the warm-up advances by one epoch.

        Call it once an epoch. A class not seen in the epoch keeps its row, and so does one whose sums are NaN, since a
        teacher's logit overflowed. With several processes let `forward` run
        within `gklx.global_batch`: the sums are then those of all of them, and every process has the same prior.
        """
        if self.prior is not None and self.prior_sums is not None:
            self.prior.copy_(gklx.ClassPriorState(self.prior, self.prior_sums).advance().table)
            self.prior_sums.zero_()
        self.epoch.add_(1)

    def extra_repr(self) -> str:
        """The settings, as they are written in the constructor."""
        return f"num_classes={self.num_classes}, {super().extra_repr()}, warmup_epochs={self.warmup_epochs}"

    @torch.no_grad()
    def _collect(
        self,
        teacher_logits: torch.Tensor,
        labels: torch.Tensor,
        sample_weight: torch.Tensor | None,
        where: torch.Tensor | None,
    ) -> None:
        assert self.prior_sums is not None
        if where is not None:  # a class that is masked in the loss is masked in the prior
            teacher_logits = teacher_logits.masked_fill(~where, -torch.inf)
        sums = gklx.class_sums(
            teacher_logits,
            labels,
            self.prior_sums.shape[0],
            temperature=self.weight_temperature,
            sample_weight=sample_weight,
        )
        self.prior_sums.add_(sums)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Called by `.to`, `.half` and `.cuda`: the prior moves to the device but stays float32, for its sums."""

        def without_cast(x: torch.Tensor) -> torch.Tensor:
            moved: torch.Tensor = fn(x)
            return moved if moved.dtype == x.dtype else x.to(moved.device)

        return super()._apply(without_cast, recurse)  # type: ignore[no-untyped-call]


class KLLoss(_UnlabelledLoss):
    r"""`gklx.kl` as a module: KL(teacher ‖ student).

    Parameters
    ----------
    temperature : float
        T > 0; both logits are divided by it. No factor T² is applied.
    reduction : {"mean", "sum", "none"}
        As in `gklx.kl`.

    Raises
    ------
    TypeError, ValueError
        As in `gklx.kl`, in the constructor where a setting is wrong.

    See Also
    --------
    gklx.kl : The function.

    Notes
    -----
    ``forward(student_logits, teacher_logits, *, sample_weight=None, where=None)`` takes logits of shape [..., C], both
    differentiable, and returns the loss, 0-d or [...] under "none", float32 or wider.

    Examples
    --------
    >>> import torch
    >>> from gklx.torch import KLLoss
    >>> criterion = KLLoss(temperature=4.0)
    >>> student, teacher = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True), torch.tensor([[1.0, 2.0, 4.0]])
    >>> loss = criterion(student, teacher)
    >>> loss.backward()
    >>> print(f"{loss.item():.6f}")
    0.007757
    """

    _function = staticmethod(gklx.kl)

    def __init__(self, *, temperature: float = 1.0, reduction: Reduction = "mean") -> None:
        super().__init__(temperature=temperature, reduction=reduction)


class DKLLoss(_UnlabelledLoss):
    r"""`gklx.dkl` as a module: decoupled KL(teacher ‖ student).

    Parameters
    ----------
    mse_weight, ce_weight : float
        Weights of the two parts. The wMSE's gradient reaches the teacher alone: with a frozen one it teaches nothing.
    temperature : float
        T > 0; both logits are divided by it. No factor T² is applied.
    reduction : {"mean", "sum", "none"}
        As in `gklx.kl`.

    Raises
    ------
    TypeError, ValueError
        As in `gklx.dkl`, in the constructor where a setting is wrong.

    See Also
    --------
    gklx.dkl : The function, and what its gradients are.

    Notes
    -----
    ``forward`` is that of `KLLoss`.

    Examples
    --------
    >>> import torch
    >>> from gklx.torch import DKLLoss
    >>> DKLLoss(mse_weight=20.0, ce_weight=4.0)
    DKLLoss(mse_weight=20.0, ce_weight=4.0, temperature=1.0, reduction='mean')
    """

    _function = staticmethod(gklx.dkl)

    def __init__(
        self,
        *,
        mse_weight: float = 1.0,
        ce_weight: float = 1.0,
        temperature: float = 1.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(mse_weight=mse_weight, ce_weight=ce_weight, temperature=temperature, reduction=reduction)


class IKLLoss(_ClassWeightedLoss):
    r"""`gklx.ikl` as a module: improved KL(teacher ‖ student), with its class prior and warm-up.

    Parameters
    ----------
    num_classes : int, optional
        C. With it the classes are weighed by a class prior and `forward` needs labels; without it by the teacher's own
        softmax, and labels must not be given.
    mse_weight, ce_weight : float
        Weights of the two parts.
    temperature : float
        T > 0 of the CE part.
    weight_temperature : float
        τ > 0 of the teacher's softmax in the class weights.
    warmup_epochs : int
        In epoch e = 0, 1, … the loss is multiplied by min((e + 1) / warmup_epochs, 1); 0 for no warm-up.
    reduction : {"mean", "sum", "none"}
        As in `gklx.kl`.

    Raises
    ------
    TypeError, ValueError
        As in `gklx.ikl`, in the constructor where a setting is wrong; a bad `num_classes` or `warmup_epochs`.

    See Also
    --------
    gklx.ikl : The function.
    GKLLoss : With γ, normalised over the batch.
    gklx.ClassPrior : The class prior by itself.

    Notes
    -----
    ``forward(student_logits, teacher_logits, labels=None, *, sample_weight=None, where=None)`` takes logits of shape
    [..., C], both differentiable, and integer labels [...]. It returns the loss, 0-d or [...] under "none", float32 or
    wider.

    Three buffers belong to `state_dict`. `prior` is the table in use, float32 [C, C]: that of the last `advance`,
    uniform before. `prior_sums` holds the class sums since then: each `forward` in training mode adds the teacher
    logits, without gradient; in evaluation mode none does. `epoch` counts the calls of `advance`. `prior` and
    `prior_sums` stay float32 whatever the module is cast to, and are None without `num_classes`.

    Collect each sample once an epoch. Where the loss is also called otherwise, in the inner attack of adversarial
    training or under activation checkpointing, call ``criterion.eval()`` meanwhile, or the function itself:
    ``gklx.ikl(..., prior=criterion.prior, labels=labels)``.

    Examples
    --------
    >>> import torch
    >>> from gklx.torch import IKLLoss
    >>> criterion = IKLLoss(3)
    >>> student, teacher = torch.zeros(1, 3, requires_grad=True), torch.tensor([[0.0, 1.0, 0.0]])
    >>> for epoch in range(2):
    ...     criterion(student, teacher, torch.tensor([1])).backward()
    ...     criterion.advance()
    >>> criterion.prior
    tensor([[0.3333, 0.3333, 0.3333],
            [0.2119, 0.5761, 0.2119],
            [0.3333, 0.3333, 0.3333]])
    """

    _function = staticmethod(gklx.ikl)

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        mse_weight: float = 1.0,
        ce_weight: float = 1.0,
        temperature: float = 1.0,
        weight_temperature: float = 1.0,
        warmup_epochs: int = 0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            num_classes,
            warmup_epochs,
            mse_weight=mse_weight,
            ce_weight=ce_weight,
            temperature=temperature,
            weight_temperature=weight_temperature,
            reduction=reduction,
        )


class GKLLoss(_ClassWeightedLoss):
    r"""`gklx.gkl` as a module: generalized KL(teacher ‖ student), with its class prior and warm-up.

    Parameters
    ----------
    num_classes, mse_weight, ce_weight, temperature, weight_temperature, warmup_epochs, reduction
        As in `IKLLoss`.
    gamma : float
        γ ≥ 0, the exponent of the class weights.
    symmetric : bool
        Whether the wMSE's gradient reaches the student too.
    normalize : {"batch", "samples"}
        As in `gklx.gkl`.

    Raises
    ------
    TypeError, ValueError
        As in `gklx.gkl`, in the constructor where a setting is wrong; a bad `num_classes` or `warmup_epochs`.

    See Also
    --------
    gklx.gkl : The function.
    gklx.settings : Published values of the arguments; `from_settings` takes them by name.
    gklx.ClassPrior : The class prior by itself.

    Notes
    -----
    ``forward``, `advance` and the buffers are those of `IKLLoss`, and so is the rule that each sample is collected
    once an epoch: in the inner attack of adversarial training call ``criterion.eval()``, or
    ``gklx.gkl(..., prior=criterion.prior, labels=labels)``.

    Examples
    --------
    >>> import torch
    >>> from gklx.torch import GKLLoss
    >>> criterion = GKLLoss(num_classes=3, gamma=0.5, mse_weight=4.0, weight_temperature=4.0, warmup_epochs=2)
    >>> student, teacher = torch.zeros(1, 3, requires_grad=True), torch.tensor([[0.0, 1.0, 0.0]])
    >>> for epoch in range(3):
    ...     loss = criterion(student, teacher, labels=torch.tensor([1]))
    ...     loss.backward()
    ...     criterion.advance()
    ...     print(f"{loss.item():.4f}")
    0.7715
    1.5603
    1.5603
    """

    _function = staticmethod(gklx.gkl)

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        mse_weight: float = 1.0,
        ce_weight: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        weight_temperature: float = 1.0,
        symmetric: bool = True,
        normalize: Literal["batch", "samples"] = "batch",
        warmup_epochs: int = 0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            num_classes,
            warmup_epochs,
            mse_weight=mse_weight,
            ce_weight=ce_weight,
            gamma=gamma,
            temperature=temperature,
            weight_temperature=weight_temperature,
            symmetric=symmetric,
            normalize=normalize,
            reduction=reduction,
        )
