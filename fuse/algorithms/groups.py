"""The samples of a prompt: a group that its rewards are compared in."""

from __future__ import annotations

from torch import Tensor


def by_group(values: Tensor, num_generations: int) -> Tensor:
    """View values [samples], the samples of a prompt consecutive, as [groups, num_generations].

    Raises: ValueError if the samples are not a number of whole groups.
    """
    if num_generations < 1:
        raise ValueError(f"num_generations is {num_generations}: a group has at least one sample")
    if values.ndim != 1 or len(values) % num_generations:
        raise ValueError(
            f"values of shape {list(values.shape)} are not whole groups of {num_generations}: "
            "pass one value for every sample of every prompt"
        )
    return values.view(-1, num_generations)
