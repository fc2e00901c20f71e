"""An ablation of GKL in distillation: symmetric or one-sided, class prior or teacher's weights, four values of γ.

`python examples/experiments/ablation.py` takes minutes on MNIST; the training is that of `distillation.py`. The name of
a variant has its sides ("symmetric" or "onesided"), its class weights ("prior" or "teacher") and γ. With a frozen
teacher a one-sided wMSE gives the student no gradient, so that only the cross-entropy has an effect, whose gradient is
KL's. The one-sided rows therefore equal KL's to rounding: without symmetry the other parts of GKL have no effect here.
"""

from dataclasses import replace

from distillation import CIFAR100, Settings, train
from distillation import EXPERIMENT as DISTILLATION
from pieces.experiment import Experiment, main
from pieces.losses import ABLATION

EXPERIMENT = Experiment(
    name="ablation",
    title="Parts of GKL in distillation",
    train=train,
    variants=("kl", *ABLATION),
    metrics=DISTILLATION.metrics,
    higher_is_better=DISTILLATION.higher_is_better,
    conditions={"balanced-500": Settings(500), "longtailed-1000": Settings(1000, imbalance=20.0)},
    full={"balanced-50000": CIFAR100, "longtailed-10847": replace(CIFAR100, size=10_847, imbalance=100.0)},
)

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
