"""What a stage's micro-batches hold and take: constants and bytes per token, of layers and ends.

`fuse.driver.stage_probe` finds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fuse.intrastage.cost_profile import Shape
from fuse.ops.linear_logprob import CHUNK_TOKENS, chunk_shape

SIZES = (64, 4096, 8192)
"""Tokens of the micro-batches measured: at the least, what weights take shows; between the others, what tokens do."""


@dataclass(frozen=True, slots=True)
class Line:
    """Bytes as a function of tokens: a constant and so many per token, and no fewer than `least`."""

    fixed: float
    per_token: float
    least: float = 0.0

    @classmethod
    def through(cls, values: Sequence[int]) -> Line:
        """The line through the values at the larger `SIZES`, and at least that at the smallest."""
        _, size, larger = SIZES
        slope = (values[2] - values[1]) / (larger - size)
        return cls(values[1] - slope * size, slope, values[0])

    def at(self, tokens: int) -> int:
        return round(max(self.least * (tokens > 0), self.fixed + self.per_token * tokens, 0.0))


@dataclass(frozen=True, slots=True)
class StageBytes:
    """Of a micro-batch on a stage. held: from F to B or I. deferred: from I to W. working: beside, while one runs."""

    held: int
    deferred: int
    working: int


@dataclass(frozen=True, slots=True)
class StageLines:
    """`StageBytes` of a stage, by tokens."""

    held: Line
    deferred: Line
    working: Line

    def at(self, tokens: int) -> StageBytes:
        return StageBytes(self.held.at(tokens), self.deferred.at(tokens), self.working.at(tokens))


@dataclass(frozen=True, slots=True)
class HeadBytes:
    """Of the head's loss, as `fuse.ops.linear_logprob` computes it. A head of one output takes next to nothing.

    num_outputs, hidden_size: of its weight. itemsize: of products. device: "cpu" or "cuda".
    """

    num_outputs: int
    hidden_size: int
    itemsize: int
    device: str

    def kept(self, tokens: int) -> int:
        """From F to B: logits, where one chunk has them all."""
        is_kept = self.num_outputs > 1 and tokens <= CHUNK_TOKENS and self.num_outputs <= self._chunk(tokens)[1]
        return tokens * self.num_outputs * self.itemsize if is_kept else 0

    def working(self, tokens: int) -> int:
        """While it runs: a chunk of logits, its weights and their gradient; and gradients of all weights and inputs."""
        if self.num_outputs == 1:
            return 0
        rows, columns = self._chunk(tokens)
        columns = min(columns, self.num_outputs)
        chunk = rows * columns * self.itemsize + columns * self.hidden_size * (self.itemsize + 4)
        return chunk + 4 * self.num_outputs * self.hidden_size + tokens * self.hidden_size * (self.itemsize + 4)

    def scoring(self) -> int:
        """Of scoring: a chunk of logits and its weights."""
        rows, columns = self._chunk(CHUNK_TOKENS)
        columns = min(columns, self.num_outputs)
        return 0 if self.num_outputs == 1 else columns * (rows + self.hidden_size) * self.itemsize

    def _chunk(self, tokens: int) -> tuple[int, int]:
        return chunk_shape(tokens, self.device)


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """What stages of a model take.

    one, two: of an inner stage of one layer, and of two. first, last: of a stage of one layer at an end.
    boundary: of a message to the next stage. scoring: the most that layers take in a forward beside weights.
    shared: held bytes of a position that sequences share, such as its rotary angles. head: of the model.
    """

    one: StageLines
    two: StageLines
    first: StageLines
    last: StageLines
    boundary: Line
    scoring: Line
    shared: float
    head: HeadBytes

    def stage(self, shape: Shape, num_layers: int, *, is_first: bool, is_last: bool) -> StageBytes:
        """Of a stage of so many layers on a micro-batch of this shape."""
        tokens = shape.size
        shared = round(self.shared * (tokens - shape.num_tokens))
        one, two = self.one.at(tokens), self.two.at(tokens)
        ends = [lines.at(tokens) for lines, is_there in ((self.first, is_first), (self.last, is_last)) if is_there]
        more = num_layers - 1
        kept, computing = (self.head.kept(tokens), self.head.working(tokens)) if is_last else (0, 0)
        return StageBytes(
            held=one.held + more * (two.held - one.held) + sum(end.held - one.held for end in ends) + kept - shared,
            deferred=one.deferred + more * (two.deferred - one.deferred),
            # Layers run one after the other.
            working=max(one.working, computing, *(end.working for end in ends)),
        )
