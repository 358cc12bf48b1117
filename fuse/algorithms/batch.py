"""A scored rollout batch as training consumes it, ragged: what each sample is, and what a loss compares with.

Nothing here is padded. A response of n tokens owns n *token positions* (log-probabilities, advantages) and
min(n + 1, width) *value positions*, `width` being the longest response of the batch: the state after the last
token has a value too, unless the response is as wide as the batch. Segments of one batch lie end to end in flat
tensors; `Segments` says where. All masks of the padded formulation become plain segment boundaries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from fuse.tensor_pickle import Sent, arrived, sent

Positions = Literal["tokens", "values"]


@dataclass(frozen=True, slots=True)
class Segments:
    """Where each response's positions lie in the flat tensors of a batch.

    token_offsets, value_offsets: int64 [num_samples + 1]; sample i owns rows offsets[i]:offsets[i + 1].
    token_rows: int64 [tokens], the value position at which each token was chosen.
    """

    token_offsets: Tensor
    value_offsets: Tensor
    token_rows: Tensor

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], width: int) -> Segments:
        """Lay out responses of `lengths` tokens in a batch whose longest generated response has `width` tokens."""
        tokens = torch.tensor(lengths, dtype=torch.int64)
        assert int(tokens.max()) <= width
        token_offsets = _offsets(tokens)
        value_offsets = _offsets((tokens + 1).clamp(max=width))
        shift = torch.repeat_interleave(value_offsets[:-1] - token_offsets[:-1], tokens)
        return cls(token_offsets, value_offsets, torch.arange(int(token_offsets[-1])) + shift)

    def offsets(self, positions: Positions) -> Tensor:
        return self.token_offsets if positions == "tokens" else self.value_offsets

    def num_values(self, sample: int) -> int:
        return int(self.value_offsets[sample + 1] - self.value_offsets[sample])

    def __reduce__(self) -> tuple[Callable[..., Segments], tuple[Sent, ...]]:
        return _arrived_segments, tuple(map(sent, (self.token_offsets, self.value_offsets, self.token_rows)))


def _arrived_segments(*tensors: Sent) -> Segments:
    return Segments(*map(arrived, tensors))


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


class Targets(Protocol):
    """A dataclass of tensors [positions], which a loss compares with: of a whole batch, or of a micro-batch.

    positions: whether there is one for every token, or for every value.
    fill: what tensors hold, by their names, at positions that do not count; the others hold zero.
    mask: where a position counts. A layout without padding has it true everywhere.
    """

    positions: ClassVar[Positions]
    fill: ClassVar[Mapping[str, float]]

    @property
    def mask(self) -> Tensor: ...


TOKEN_IDS = "token_ids"
"""The tensor of targets that padded layouts fill with what stands there: padding, or tokens that do not count."""


def made_up_targets(kind: type[Targets], token_ids: Tensor, segments: Segments) -> Targets:
    """Targets of this kind for the tokens [tokens] of a batch, all of them counting and zero: for measurements."""
    untyped: Any = kind
    num_positions = int(segments.offsets(kind.positions)[-1])
    tensors = {field.name: torch.zeros(num_positions) for field in fields(untyped)}
    tensors["mask"] = torch.ones(num_positions, dtype=torch.bool)
    if TOKEN_IDS in tensors:
        tensors[TOKEN_IDS] = token_ids
    made: Targets = untyped(**tensors)
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """One rollout batch, ragged: flat tensors laid out by `segments`.

    prompts, responses: token ids per sample; a response is as generated and may run past `lengths[i]`,
        the number of its tokens that count.
    width: the longest generated response of the batch, in tokens.
    targets: by role that trains.
    """

    prompts: tuple[tuple[int, ...], ...]
    responses: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    width: int
    segments: Segments
    targets: Mapping[str, Targets]

    def __reduce__(self) -> tuple[Callable[..., Experience], tuple[object, ...]]:
        columns = {role: (type(targets), _columns(targets)) for role, targets in self.targets.items()}
        return _arrived_experience, (self.prompts, self.responses, self.lengths, self.width, self.segments, columns)


def _columns(targets: Any) -> dict[str, Sent]:
    return {field.name: sent(getattr(targets, field.name)) for field in fields(targets)}


def _arrived_experience(
    prompts: Any, responses: Any, lengths: Any, width: int, segments: Segments, columns: Mapping[str, tuple[Any, Any]]
) -> Experience:
    targets = {
        role: kind(**{name: arrived(column) for name, column in own.items()}) for role, (kind, own) in columns.items()
    }
    return Experience(
        prompts=prompts, responses=responses, lengths=lengths, width=width, segments=segments, targets=targets
    )


def counted_tokens(responses: Sequence[Sequence[int]], lengths: Sequence[int]) -> Tensor:
    """The tokens of all responses that count, flat, int64 [tokens]."""
    return torch.tensor(
        [token for response, length in zip(responses, lengths, strict=True) for token in response[:length]],
        dtype=torch.int64,
    )
