"""What the rows of a batch share, as tensors that autograd can keep for the backward pass."""

import torch

from .._batch import Totals


def kept(of_batch: Totals | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Totals as tensors that autograd can keep; None where nothing was summed, and they are cheaper known again."""
    if of_batch is None or all(isinstance(x, float) for x in of_batch):
        return None, None
    like = next(x for x in of_batch if not isinstance(x, float))
    weight, squared_mass = (like.new_tensor(x) if isinstance(x, float) else x for x in of_batch)
    return weight, squared_mass
