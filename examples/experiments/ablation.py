"""What each part of GKL does in distillation: gradient to both or not, class prior or teacher's weights, four gammas.

`python examples/experiments/ablation.py` takes minutes on MNIST; the training is that of `distillation.py`. A
variant's name says its sides ("symmetric" or "onesided"), its class weights ("prior" or "teacher") and γ. With a
frozen teacher a one-sided wMSE gives the student no gradient: only the cross-entropy acts, whose gradient is KL's. So
the one-sided rows are KL's to rounding, and that is the point: without symmetry the rest of GKL does nothing here.
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
