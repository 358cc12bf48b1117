"""Scores of the reference's own responses, one to every prompt, from which the policy's scores are counted.

The responses are generated and scored before the first update, in one pass over the prompts that the run will consume.
The engines have the reference's weights meanwhile, by way of the stages that train: no engine holds two models, and
updates cost what they cost without. Noise is a function of (seed, row, position), so the scores are the same whenever
they are made. They are kept in the run's state, and so in its checkpoints: a resumed run generates what is missing,
which is nothing unless it is longer, or was ended before its first checkpoint.

Source: Hou et al. 2024, "ChatGLM-RLHF" (arXiv 2404.00934): r'(x, y) = r(x, y) - r(x, y_ref). It does not say how the
response is decoded; here it is sampled as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from transformers import PreTrainedModel

from fuse.sample import Sample

FIRST_REFERENCE_ID = 1 << 41
"""Sample ids of reference responses, by row of the dataset: apart from those of training and of evaluation."""


def check_reference(policy: PreTrainedModel, reference: PreTrainedModel) -> None:
    """Raises: ValueError where the engines that are made for the policy cannot generate by the reference's weights."""
    own, other = ({name: tensor.shape for name, tensor in model.state_dict().items()} for model in (policy, reference))
    if type(policy) is not type(reference) or own != other:
        raise ValueError(
            "reward_baseline='reference' with a ref_model that is not built like model, whose engines are to generate "
            "its responses: pass a ref_model of model's configuration, or leave it out for a copy of model"
        )


def missing_rows(scores: Sequence[float | None], rows: Iterable[int]) -> list[int]:
    """Those of these rows of the dataset without a score, each once."""
    return [row for row in dict.fromkeys(rows) if scores[row] is None]


def score_references(
    scores: Sequence[float | None],
    missing: Sequence[int],
    *,
    samples_of: Callable[[Sequence[int]], Sequence[Sample]],
    roll_out: Callable[[Sequence[Sample]], Any],
    num_together: int,
    tell: Callable[[int, int], None],
) -> list[float | None]:
    """The scores by row of the dataset, with those of the missing rows added.

    samples_of: new samples of rows, in their order. roll_out: generates and scores them by the reference's weights, so
        many together. tell: hears how many are there, of how many.
    """
    known = [*scores]
    for start in range(0, len(missing), num_together):
        tell(start, len(missing))
        some = missing[start : start + num_together]
        samples = samples_of(some)
        for row, sample in zip(some, samples, strict=True):
            sample.id = FIRST_REFERENCE_ID + row
        roll_out(samples)
        for row, sample in zip(some, samples, strict=True):
            known[row] = sample.score
    return known
