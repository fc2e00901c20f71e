"""The four losses: KL, DKL, IKL and GKL of a student's logits from a teacher's."""

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar, cast

from . import _autodiff
from ._core.call import Array, Call, Formula, Number, Reduction
from ._core.checks import call_of, truth
from ._run.cpu import prior_is_right

_Signature = ParamSpec("_Signature")
_Array = TypeVar("_Array")


_KL = Formula(decomposed=False, tempered=True, symmetric=False, batch_normalized=False)
_DKL = Formula(decomposed=True, tempered=True, symmetric=False, batch_normalized=False)
_IKL = Formula(decomposed=True, tempered=False, symmetric=True, batch_normalized=False)


def _loss(build: Callable[_Signature, _Array]) -> Callable[_Signature, _Array]:
    """A public loss from the function that checks its arguments; `grad` and its kin find that function again."""

    @wraps(build)
    def loss(*args: _Signature.args, **kwargs: _Signature.kwargs) -> _Array:
        return cast(_Array, _autodiff.value(cast(Call, build(*args, **kwargs))))

    loss._gklx_call = build  # type: ignore[attr-defined]
    return loss


def _call_of(formula: Formula, student_logits: _Array, teacher_logits: Array, **given: Any) -> _Array:
    """The checked call. To type checkers it is the loss, an array of the student's type, which `_loss` makes of it."""
    return cast(_Array, call_of(prior_is_right, formula, student_logits, teacher_logits, **given))


@_loss
def kl(
    student_logits: _Array,
    teacher_logits: Array,
    *,
    temperature: Number = 1.0,
    sample_weight: Array | None = None,
    where: Array | None = None,
    reduction: Reduction = "mean",
) -> _Array:
    r"""KL(teacher ‖ student): the divergence of the student's softmax from the teacher's.

    With p = softmax(t/T) of the teacher and q = softmax(s/T) of the student, a sample's loss is
    Σ_j p_j (log p_j − log q_j), in nats.

    Parameters
    ----------
    student_logits : array, shape [..., C], floating
        Logits s, the first argument; differentiable.
    teacher_logits : array, shape [..., C], floating
        Logits t of the reference; differentiable. Same library, device and shape as `student_logits`.
    temperature : float
        T > 0; both logits are divided by it. No factor T² is applied: multiply the loss by it if you want it.
    sample_weight : array, shape [...], optional
        A weight v ≥ 0 a sample: floating, integer or boolean. A sample of weight 0 adds nothing, whatever it holds.
    where : boolean array, broadcast against the logits, optional
        False takes a class out of the softmax, with gradient exactly 0.
    reduction : {"mean", "sum", "none"}
        "mean" is Σ v·loss / Σ v over all samples (not over elements), "sum" is Σ v·loss, "none" each v·loss, [...]:
        the entries add up to the "sum".

    Returns
    -------
    array
        0-d, or [...] under "none"; float32, or float64 where an input is float64. Half precisions are computed in
        float32. +inf where the student gives no probability to a class to which the teacher gives some.

    Raises
    ------
    TypeError
        Arrays of two libraries, of an unknown one, or of the wrong kind.
    ValueError
        Shapes or devices that differ, negative weights, temperature ≤ 0, an unknown reduction.

    See Also
    --------
    dkl : The same gradients as a weighted MSE and a cross-entropy, which can be weighed apart.
    gklx.torch.KLLoss : The loss as a PyTorch module.

    Notes
    -----
    ∂/∂s = (q − p)/T and ∂/∂t = p_j ((log p_j − log q_j) − KL)/T a sample. `torch.nn.functional.kl_div(input, target)`
    with ``reduction="batchmean"`` is this for ``input = log q`` and ``target = p``.

    PyTorch and JAX differentiate this and the other losses by the analytic gradient, to any order. For the backward
    pass PyTorch on a CPU keeps, beyond its inputs, one tensor of the logits' size for each differentiated input, and
    none for one in half precision: its gradient is made in the backward pass, in float32, and rounded once. On the CUDA
    kernels it keeps 25 numbers a row.

    Examples
    --------
    >>> import numpy as np
    >>> import gklx
    >>> student = np.asarray([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    >>> teacher = np.asarray([[1.0, 2.0, 4.0], [0.0, 1.0, 0.0]])
    >>> print(f"{gklx.kl(student, teacher):.6f}")
    0.102420
    """
    return _call_of(
        _KL,
        student_logits,
        teacher_logits,
        temperature=temperature,
        sample_weight=sample_weight,
        where=where,
        reduction=reduction,
    )


@_loss
def dkl(
    student_logits: _Array,
    teacher_logits: Array,
    *,
    mse_weight: Number = 1.0,
    ce_weight: Number = 1.0,
    temperature: Number = 1.0,
    sample_weight: Array | None = None,
    where: Array | None = None,
    reduction: Reduction = "mean",
) -> _Array:
    r"""Decoupled KL(teacher ‖ student): a weighted MSE of logit differences plus a soft-label cross-entropy.

    With both weights 1 its gradients equal those of `kl`, for student and teacher, at every temperature. Its value
    does not: it is ½·Var_p(d/T) + CE with d = t − s. A sample's loss is
    mse_weight·¼ Σ_jk S(p_j p_k) (Δt_jk − S(Δs_jk))²/T² − ce_weight·Σ_j S(p_j) log q_j, where S stops the gradient.

    Parameters
    ----------
    student_logits : array, shape [..., C], floating
        Logits s; differentiable, through the CE part alone.
    teacher_logits : array, shape [..., C], floating
        Logits t; differentiable, through the wMSE part alone. With a frozen teacher that part teaches nothing.
    mse_weight, ce_weight : float
        Weights of the two parts; the code of the authors calls them beta and alpha, the NeurIPS paper α and β.
    temperature, sample_weight, where, reduction
        As in `kl`.

    Returns
    -------
    array
        As in `kl`.

    Raises
    ------
    TypeError, ValueError
        As in `kl`.

    See Also
    --------
    kl : The divergence whose gradients these are.
    ikl : With a gradient of the MSE to the student, and with class weights.
    terms : The two parts apart.
    gklx.torch.DKLLoss : The loss as a PyTorch module.

    Notes
    -----
    The gradient stops on purpose, so it is not that of the value: finite differences, `torch.autograd.gradcheck` among
    them, find another. Further derivatives are those of the gradient, and so KL's.

    References
    ----------
    Cui et al., *Decoupled Kullback-Leibler Divergence Loss*, NeurIPS 2024, arXiv 2305.13948, equation 5 and theorem 1.

    Examples
    --------
    >>> import numpy as np
    >>> import gklx
    >>> student = np.asarray([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    >>> teacher = np.asarray([[1.0, 2.0, 4.0], [0.0, 1.0, 0.0]])
    >>> of_dkl, of_kl = gklx.grad(gklx.dkl)(student, teacher), gklx.grad(gklx.kl)(student, teacher)
    >>> bool(abs(of_dkl - of_kl).max() < 1e-15)
    True
    """
    return _call_of(
        _DKL,
        student_logits,
        teacher_logits,
        mse_weight=mse_weight,
        ce_weight=ce_weight,
        temperature=temperature,
        sample_weight=sample_weight,
        where=where,
        reduction=reduction,
    )


@_loss
def ikl(
    student_logits: _Array,
    teacher_logits: Array,
    *,
    prior: Array | None = None,
    labels: Array | None = None,
    mse_weight: Number = 1.0,
    ce_weight: Number = 1.0,
    temperature: Number = 1.0,
    weight_temperature: Number = 1.0,
    sample_weight: Array | None = None,
    where: Array | None = None,
    reduction: Reduction = "mean",
) -> _Array:
    r"""Improved KL(teacher ‖ student): DKL with a symmetric MSE and class-wise weights.

    A sample's loss is mse_weight·¼ Σ_jk w_j w_k (Δt_jk − Δs_jk)² − ce_weight·Σ_j S(p_j) log q_j. The wMSE's gradient
    reaches student and teacher, and it acts on the logits themselves, not on logits / T.

    Parameters
    ----------
    student_logits, teacher_logits : array, shape [..., C], floating
        Logits s and t; both differentiable.
    prior : array, shape [C, C] with `labels` or [..., C] without, optional
        Class weights, held constant: with labels w = prior[labels] (see `ClassPrior`), without labels one row a
        sample. Without a prior w = softmax(t / weight_temperature). Of any floating dtype.
    labels : integer array, shape [...], optional
        The class of each sample, in [0, C). On a GPU or under tracing a bad label gives NaN, elsewhere an error.
    mse_weight, ce_weight : float
        Weights of the two parts; the code of the authors calls them beta and alpha, the NeurIPS paper α and β.
    temperature : float
        T > 0 of p and q in the CE part.
    weight_temperature : float
        > 0; of the teacher's softmax where no prior is given.
    sample_weight, where, reduction
        As in `kl`.

    Returns
    -------
    array
        As in `kl`.

    Raises
    ------
    TypeError, ValueError
        As in `kl`; also labels outside [0, C), labels without a prior, a negative or NaN prior.

    See Also
    --------
    gkl : With weights to the power γ, and normalised over the batch.
    ClassPrior : Makes `prior` from the teacher's logits.
    terms : The two parts apart.
    gklx.torch.IKLLoss : The loss as a PyTorch module, which keeps prior and warm-up.

    References
    ----------
    Cui et al., *Decoupled Kullback-Leibler Divergence Loss*, NeurIPS 2024, arXiv 2305.13948, equation 7.

    Examples
    --------
    >>> import numpy as np
    >>> import gklx
    >>> student = np.asarray([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    >>> teacher = np.asarray([[1.0, 2.0, 4.0], [0.0, 1.0, 0.0]])
    >>> prior = np.asarray([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])
    >>> print(f"{gklx.ikl(student, teacher, prior=prior, labels=np.asarray([2, 1])):.6f}")
    0.932217
    """
    return _call_of(
        _IKL,
        student_logits,
        teacher_logits,
        prior=prior,
        labels=labels,
        mse_weight=mse_weight,
        ce_weight=ce_weight,
        temperature=temperature,
        weight_temperature=weight_temperature,
        sample_weight=sample_weight,
        where=where,
        reduction=reduction,
    )


@_loss
def gkl(
    student_logits: _Array,
    teacher_logits: Array,
    *,
    prior: Array | None = None,
    labels: Array | None = None,
    mse_weight: Number = 1.0,
    ce_weight: Number = 1.0,
    gamma: Number = 1.0,
    temperature: Number = 1.0,
    weight_temperature: Number = 1.0,
    symmetric: bool = True,
    normalize: Literal["batch", "samples"] = "batch",
    sample_weight: Array | None = None,
    where: Array | None = None,
    reduction: Reduction = "mean",
) -> _Array:
    r"""Generalized KL(teacher ‖ student): IKL with smoother weights w^γ, normalised over the batch.

    The loss is mse_weight·Σ v·wMSE / Σ v W² + ce_weight·Σ v·CE / Σ v, where wMSE = ¼ Σ_jk w_j w_k (Δt_jk − Δs_jk)²
    acts on the logits themselves, CE = −Σ_j S(p_j) log q_j, and W = Σ_j w_j.

    Parameters
    ----------
    student_logits, teacher_logits : array, shape [..., C], floating
        Logits s and t; both differentiable.
    prior, labels
        As in `ikl`: w = prior[labels]^γ, w = prior^γ, or w = softmax(t / weight_temperature)^γ.
    mse_weight, ce_weight : float
        Weights of the two parts; the code of the authors calls them beta and alpha, the NeurIPS paper α and β.
    gamma : float
        γ ≥ 0. At 1 the weights are as they are; the smaller it is the more alike they are, and at 0 every class
        weighs the same (0⁰ = 1).
    temperature, weight_temperature : float
        As in `ikl`.
    symmetric : bool
        Whether the wMSE's gradient reaches the student too; otherwise the teacher alone, as in `dkl`.
    normalize : {"batch", "samples"}
        "batch" divides the wMSE by Σ v W² over the batch, "samples" by Σ v.
    sample_weight, where, reduction
        As in `kl`; under "none" each wMSE is divided by Σ v W² / Σ v, so that the entries add up to
        Σ v times the "mean".

    Returns
    -------
    array
        As in `kl`.

    Raises
    ------
    TypeError, ValueError
        As in `ikl`; also gamma < 0 and an unknown `normalize`.

    See Also
    --------
    ikl : Without γ, and normalised by the sample.
    ClassPrior : Makes `prior` from the teacher's logits.
    settings : Published values of the arguments.
    terms : The two parts apart.
    gklx.torch.GKLLoss : The loss as a PyTorch module, which keeps prior and warm-up.

    References
    ----------
    Cui et al., *Generalized Kullback-Leibler Divergence Loss*, TPAMI 2026, arXiv 2503.08038.

    Examples
    --------
    >>> import numpy as np
    >>> import gklx
    >>> student = np.asarray([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    >>> teacher = np.asarray([[1.0, 2.0, 4.0], [0.0, 1.0, 0.0]])
    >>> print(f"{gklx.gkl(student, teacher, gamma=0.5, mse_weight=4.0):.6f}")
    1.335344
    """
    if not isinstance(normalize, str) or normalize not in ("batch", "samples"):
        raise ValueError(f'normalize must be "batch" or "samples", got {normalize!r}')
    symmetric = truth("symmetric", symmetric)
    formula = Formula(decomposed=True, tempered=False, symmetric=symmetric, batch_normalized=normalize == "batch")
    return _call_of(
        formula,
        student_logits,
        teacher_logits,
        prior=prior,
        labels=labels,
        mse_weight=mse_weight,
        ce_weight=ce_weight,
        gamma=gamma,
        temperature=temperature,
        weight_temperature=weight_temperature,
        sample_weight=sample_weight,
        where=where,
        reduction=reduction,
    )


def call_builder(loss: Any) -> Callable[..., Call]:
    """The function that checks the arguments of one of the four losses; TypeError for anything else."""
    build: Callable[..., Call] | None = getattr(loss, "_gklx_call", None)
    if build is None:
        raise TypeError(
            "loss must be gklx.kl, gklx.dkl, gklx.ikl, gklx.gkl or a functools.partial of one, "
            f"got {getattr(loss, '__qualname__', type(loss).__name__)}"
        )
    return build
