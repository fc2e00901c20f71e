"""KL, DKL, IKL and GKL divergence losses with analytic gradients, on every array library.

The losses are `kl`, `dkl`, `ikl` and `gkl`; `grad`, `value_and_grad` and `terms` turn a loss into its gradients or its
parts; `class_sums`, `ClassPrior` and `ClassPriorState` make the class prior of IKL and GKL;
`global_batch` spreads one batch over many devices. `score` compares logits of any size in files, arrays or batches,
`score_candidates` several students' with one teacher's. `settings` holds the published settings, and `show_config` says
what the losses run on here.
"""

from ._interrupts import ended_by_interrupts, is_command

with ended_by_interrupts(is_command()):  # NumPy's import takes the time in which people press Ctrl-C
    from ._config import show_config
    from .distributed import global_batch
    from .losses import dkl, gkl, ikl, kl
    from .prior import ClassPrior, ClassPriorState, class_sums
    from .published import Setting, settings
    from .scoring import score, score_candidates
    from .transforms import Terms, grad, terms, value_and_grad

__all__ = [
    "ClassPrior",
    "ClassPriorState",
    "Setting",
    "Terms",
    "class_sums",
    "dkl",
    "gkl",
    "global_batch",
    "grad",
    "ikl",
    "kl",
    "score",
    "score_candidates",
    "settings",
    "show_config",
    "terms",
    "value_and_grad",
]
__version__ = "0.2.0"
