"""The published settings of IKL and GKL: `gklx.settings`, each with its source and what it reached.

The numbers are those of the papers and of the authors' repository, read in November 2026, under gklx's names.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict, cast

__all__ = ["AdversarialTraining", "LossArguments", "Setting", "Source", "settings"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """The publication of a setting or a result: a paper, or only the authors' repository where `paper` is None."""

    paper: str | None = None
    table: str | None = None
    """The table or section of the paper that holds the result."""
    file: str | None = None
    """The file or folder of the authors' repository, https://github.com/jiequancui/DKL; None where not recorded."""


@dataclass(frozen=True, kw_only=True)
class AdversarialTraining:
    """The details of adversarial training that are not arguments of the loss."""

    inner_mse_weight: float
    """Of the loss that the inner attack maximises."""
    inner_ce_weight: float
    steps: tuple[int, int] = (2, 5)
    """The smallest and the largest number of steps of the inner attack; its ε grows over the epochs."""
    awp: float = 0.005
    """The size of the adversarial weight perturbation."""
    awp_from_epoch: int = 10
    weight_averaging: float = 0.9
    clean_cross_entropy: bool = True
    """Whether the cross-entropy of the clean images with their labels is added."""


class LossArguments(TypedDict):
    """The arguments of a loss that a setting holds; `gamma` for GKL alone."""

    ce_weight: float
    mse_weight: float
    temperature: float
    weight_temperature: float
    gamma: NotRequired[float]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A published setting; None where the sources at hand do not say.

    Attributes
    ----------
    name, task : str
        The key in `settings`, and the task: what was trained, on which data.
    divergence : {"ikl", "gkl"} or None
        The loss.
    ce_weight, mse_weight, gamma, temperature, weight_temperature : float or None
        Arguments of the loss. `weight_temperature` is τ: with a class prior that of `ClassPrior`.
    weights : {"class prior", "teacher"} or None
        Where the class weights come from.
    warmup_epochs : int or None
        Epochs in which the loss's factor grows to 1; 0 where there is no warm-up.
    reached : str or None
        What the source reports for this loss and task. It does not always say by which of several settings.
    source : Source
        Where it is published.
    adversarial : AdversarialTraining or None
        The details of adversarial training that are not arguments of the loss.
    note : str or None
        Anything else that matters.
    """

    name: str
    task: str
    divergence: Literal["ikl", "gkl"] | None = None
    ce_weight: float | None = None
    mse_weight: float | None = None
    gamma: float | None = None
    temperature: float | None = None
    weight_temperature: float | None = None
    weights: Literal["class prior", "teacher"] | None = None
    warmup_epochs: int | None = None
    reached: str | None = None
    source: Source
    adversarial: AdversarialTraining | None = None
    note: str | None = None

    @property
    def loss(self) -> LossArguments:
        """The hyper-parameters, as arguments of `gklx.ikl` or `gklx.gkl`.

        Where `weights` is "class prior" give the loss ``prior=`` and ``labels=`` as well: without them it takes the
        teacher's own weights.

        Raises
        ------
        ValueError
            A hyper-parameter of the loss is not known.
        """
        names = ["ce_weight", "mse_weight", "temperature", "weight_temperature"]
        # IKL has no γ. With γ = 1 GKL has the same weights, which sum to 1; so both losses accept these arguments.
        names += [] if self.divergence == "ikl" else ["gamma"]
        unknown = [name for name in ("divergence", *names) if getattr(self, name) is None]
        if unknown:
            raise ValueError(f"the setting {self.name!r} is published in part: its {', '.join(unknown)} are not known")
        return cast(LossArguments, {name: getattr(self, name) for name in names})


class _Settings(Mapping[str, Setting]):
    """The settings by their names."""

    def __init__(self, *settings: Setting) -> None:
        self._by_name = {each.name: each for each in settings}

    def __getitem__(self, name: str) -> Setting:
        try:
            return self._by_name[name]
        except (KeyError, TypeError):
            raise KeyError(f"settings must be one of {', '.join(self)}, got {name!r}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __repr__(self) -> str:
        return settings_table()


_NEURIPS = "Decoupled Kullback-Leibler Divergence Loss, NeurIPS 2024, arXiv 2305.13948"
_TPAMI = "Generalized Kullback-Leibler Divergence Loss, TPAMI 2026, arXiv 2503.08038"
_CIFAR10 = AdversarialTraining(inner_mse_weight=0.0, inner_ce_weight=1.0)
_CIFAR100 = AdversarialTraining(inner_mse_weight=1.0, inner_ce_weight=1.0)
_IMAGENET = "DKLv2/KD-dkl/mdistiller/engine/cfg.py"


def _adversarial(
    name: str,
    task: str,
    ce_weight: float | None = 4.0,
    mse_weight: float | None = 20.0,
    gamma: float = 1.0,
    weight_temperature: float = 4.0,
    *,
    divergence: Literal["ikl", "gkl"] = "ikl",
    source: Source | None = None,
    reached: str | None = None,
    adversarial: AdversarialTraining | None = None,
    note: str | None = None,
) -> Setting:
    """A setting of adversarial training: temperature 1, a class prior, the clean branch as the teacher."""
    return Setting(
        name=name,
        task=f"adversarial training, {task}",
        divergence=divergence,
        ce_weight=ce_weight,
        mse_weight=mse_weight,
        gamma=gamma,
        temperature=1.0,
        weight_temperature=weight_temperature,
        weights="class prior",
        reached=reached,
        source=source or Source(),
        adversarial=adversarial,
        note=note,
    )


def _distilled(
    name: str,
    task: str,
    ce_weight: float,
    mse_weight: float,
    gamma: float,
    *,
    warmup_epochs: int,
    source: Source,
    temperature: float = 1.0,
    weights: Literal["class prior", "teacher"] = "class prior",
    reached: str | None = None,
) -> Setting:
    """A setting of GKL's distillation: one temperature for the CE and for the weights, a frozen teacher."""
    return Setting(
        name=name,
        task=f"distillation, {task}",
        divergence="gkl",
        ce_weight=ce_weight,
        mse_weight=mse_weight,
        gamma=gamma,
        temperature=temperature,
        weight_temperature=temperature,
        weights=weights,
        warmup_epochs=warmup_epochs,
        reached=reached,
        source=source,
    )


def _cifar100(
    teacher: str,
    student: str,
    ce_weight: float,
    mse_weight: float,
    gamma: float,
    weights: Literal["class prior", "teacher"],
    file: str,
) -> Setting:
    """A setting of GKL's distillation on CIFAR-100."""
    return _distilled(
        f"cifar100-gkl-{teacher}-{student}",
        f"CIFAR-100, {teacher} to {student}",
        ce_weight,
        mse_weight,
        gamma,
        warmup_epochs=20,
        source=Source(paper=_TPAMI, file=f"DKLv2/KD-dkl/cifar100_config_gkl/{file}.yaml"),
        temperature=4.0,
        weights=weights,
    )


def _semi_supervised(name: str, method: str, ce_weight: float, mse_weight: float, reached: str) -> Setting:
    return Setting(
        name=name,
        task=f"semi-supervised, {method}",
        ce_weight=ce_weight,
        mse_weight=mse_weight,
        reached=reached,
        source=Source(),
        note="the temperature is on the teacher alone: divide its logits",
    )


settings: Mapping[str, Setting] = _Settings(
    _adversarial(
        "cifar10-adversarial",
        "CIFAR-10",
        reached="WRN-34-10: 84.80 % clean, 57.09 % under AutoAttack",
        source=Source(paper=_NEURIPS, table="section 4.1"),
        adversarial=_CIFAR10,
    ),
    _adversarial(
        "cifar100-adversarial",
        "CIFAR-100",
        reached="WRN-34-10: 65.76 % clean, 31.91 % under AutoAttack",
        source=Source(paper=_NEURIPS, table="table 1"),
        adversarial=_CIFAR100,
    ),
    _adversarial(
        "cifar10-adversarial-smooth",
        "CIFAR-10, smoother weights",
        gamma=0.2,
        divergence="gkl",
        source=Source(paper=_TPAMI, file="DKLv2/Adv-training-dkl/sh/train_dkl_cifar10.sh"),
        adversarial=_CIFAR10,
        note="a line break without its backslash keeps the script's `--T 1.0` from the program, which takes τ = 4",
    ),
    _adversarial(
        "cifar100-adversarial-smooth",
        "CIFAR-100, smoother weights",
        gamma=0.4,
        weight_temperature=1.0,
        divergence="gkl",
        source=Source(paper=_TPAMI),
        adversarial=_CIFAR100,
    ),
    _adversarial(
        "cifar100-adversarial-autoaugment",
        "CIFAR-100, AutoAugment",
        None,
        None,
        reached="WRN-34-10: 65.93 % clean, 32.53 % under AutoAttack",
        source=Source(paper=_NEURIPS, table="section 4.1"),
        note="augmentation weight 0.5; `--gamma 0.3` of the NeurIPS code is that weight and not GKL's γ",
    ),
    _adversarial("cifar100-adversarial-checkpoint1", "CIFAR-100, released checkpoint", 3.0, 20.0),
    _adversarial("cifar100-adversarial-checkpoint2", "CIFAR-100, released checkpoint", 4.0, 20.0, 1.0, 2.0),
    _adversarial(
        "cifar100-adversarial-50m",
        "CIFAR-100, checkpoint with 50 million generated images",
        5.0,
        12.0,
        reached="WRN-28-10: 73.85 % clean, 39.18 % under AutoAttack",
        source=Source(paper=_NEURIPS, table="section 4.1"),
    ),
    _adversarial("cifar10-adversarial-20m", "CIFAR-10, checkpoint with 20 million generated images", 3.0, 10.0),
    _distilled(
        "imagenet-resnet34-resnet18",
        "ImageNet, ResNet-34 to ResNet-18",
        1.0,
        0.5,
        0.6,
        warmup_epochs=5,
        source=Source(paper=_TPAMI, file=_IMAGENET),
    ),
    _distilled(
        "imagenet-resnet50-mobilenet",
        "ImageNet, ResNet-50 to MobileNet",
        4.0,
        1.0,
        0.5,
        warmup_epochs=5,
        source=Source(paper=_TPAMI, file=_IMAGENET),
    ),
    _distilled(
        "imagenet-lt-resnext101-resnet18",
        "ImageNet-LT, ResNeXt-101 to ResNet-18",
        4.0,
        4.0,
        0.3,
        warmup_epochs=0,
        reached="45.40 % top-1; KL 44.32, IKL 45.21",
        source=Source(paper=_TPAMI),
    ),
    _distilled(
        "imagenet-lt-resnext101-resnet50",
        "ImageNet-LT, ResNeXt-101 to ResNet-50",
        3.0,
        4.0,
        0.3,
        warmup_epochs=0,
        reached="49.40 % top-1; KL 48.31, IKL 49.29",
        source=Source(paper=_TPAMI),
    ),
    Setting(
        name="cifar100-resnet32x4-resnet8x4",
        task="distillation, CIFAR-100, resnet32x4 to resnet8x4",
        divergence="ikl",
        ce_weight=1.0,
        mse_weight=8.0,
        gamma=1.0,
        temperature=4.0,
        weight_temperature=100.0,
        weights="teacher",
        warmup_epochs=20,
        source=Source(paper=_NEURIPS, file="DKLv1/KD-dkl/cifar100_kd_dkl_configs"),
        note="the folder's eleven files have the other pairs",
    ),
    _cifar100("resnet110", "resnet32", 1.0, 4.0, 0.1, "teacher", "res110_res32"),
    _cifar100("resnet32x4", "resnet8x4", 1.0, 16.0, 0.05, "class prior", "res32x4_res8x4"),
    _cifar100("resnet32x4", "shufflenetv1", 1.0, 8.0, 0.0, "class prior", "res32x4_shuv1"),
    _cifar100("resnet32x4", "shufflenetv2", 3.0, 12.0, 0.1, "class prior", "res32x4_shuv2"),
    _cifar100("resnet50", "mobilenetv2", 1.0, 8.0, 0.05, "class prior", "res50_mv2"),
    _cifar100("resnet56", "resnet20", 1.0, 4.0, 0.2, "class prior", "res56_res20"),
    _cifar100("vgg13", "mobilenetv2", 4.0, 12.0, 0.1, "class prior", "vgg13_mv2"),
    _cifar100("vgg13", "vgg8", 1.0, 8.0, 0.2, "class prior", "vgg13_vgg8"),
    _cifar100("wrn-40-2", "shufflenetv1", 1.0, 8.0, 0.0, "teacher", "wrn40_2_shuv1"),
    _cifar100("wrn-40-2", "wrn-16-2", 3.0, 20.0, 0.3, "teacher", "wrn40_2_wrn_16_2"),
    _cifar100("wrn-40-2", "wrn-40-1", 1.0, 12.0, 0.3, "teacher", "wrn40_2_wrn_40_1"),
    _semi_supervised("fixmatch", "FixMatch", 1.0, 0.1, "accuracy 70.57 %, 69.89 % without"),
    _semi_supervised("meanteacher", "MeanTeacher", 0.02, 0.03, "accuracy 68.75 %, 67.49 % without"),
)
"""The published settings, by name."""


_COLUMNS = {
    "name": "name",
    "loss": "divergence",
    "`ce_weight`": "ce_weight",
    "`mse_weight`": "mse_weight",
    "`gamma`": "gamma",
    "`temperature`": "temperature",
    "τ": "weight_temperature",
    "weights": "weights",
    "warm-up": "warmup_epochs",
}


def settings_table() -> str:
    """The settings as a Markdown table, which the site shows."""
    rows = [[_cell(getattr(each, name)) for name in _COLUMNS.values()] for each in settings.values()]
    lines = [list(_COLUMNS), ["---"] * len(_COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(row)} |".replace(" --- ", "---") for row in lines)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, float | int) else str(value)


def _facts(each: Setting) -> str:
    """The facts that the table has no column for, as one line of a list."""
    paper = f"*{each.source.paper}*" if each.source.paper else "authors' repository"
    source = ", ".join(part for part in (paper, each.source.table) if part)
    file = f"; `{each.source.file}`" if each.source.file else ""
    facts = [each.task, each.reached, each.note, f"{source}{file}"]
    return f"- `{each.name}`: {'. '.join(fact[:1].upper() + fact[1:] for fact in facts if fact)}."


def settings_list() -> str:
    """Task, result, note and source of each setting as a Markdown list, which the site shows."""
    return "\n".join(_facts(each) for each in settings.values())
