"""Forward-only pipelines beside those that train: what losses need of other forwards, in one schedule with them.

A *scorer* runs micro-batches forward, through the stages of a model that trains or through its own, and what its last
stage makes is what the losses of another model need: one micro-batch's for one micro-batch's, on one rank. In a
schedule it comes before them (`schedules.Pipeline.before`), and else wherever there is room. It holds nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fuse.intrastage.placement import Replica
from fuse.intrastage.stage import ForwardStage, Readout
from fuse.micro_batch import MicroBatch

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """What is to be scored within training. name: of what it makes. model: that trains on it.

    ranks: of its own stages; None where it goes through those of `model`.
    """

    name: str
    model: str
    ranks: tuple[int, ...] | None = None


def with_scorers(placement: Sequence[Replica], scorers: Sequence[Scorer]) -> tuple[Replica, ...]:
    """The placement, then a replica of each scorer for each of its model's, where they end on the same rank.

    Those that cannot be are left out, and a log says why.
    """
    made = list(placement)
    for scorer in scorers:
        trained = [replica for replica in placement if replica.model == scorer.model]
        own = [replica.ranks if scorer.ranks is None else scorer.ranks for replica in trained]
        if any(len(set(replica.ranks)) < 2 for replica in trained):
            _logger.info("%s: not within training, as the %s has no pipeline", scorer.name, scorer.model)
        elif any(ranks[-1] != replica.ranks[-1] for ranks, replica in zip(own, trained, strict=True)):
            _logger.info(
                "%s: not within training, as its last stage is on another device than one of the %s",
                *(scorer.name, scorer.model),
            )
        else:
            made += [
                Replica(scorer.name, replica.index, ranks, scores=scorer.model)
                for ranks, replica in zip(own, trained, strict=True)
            ]
    return tuple(made)


def without_scorers(placement: Sequence[Replica]) -> tuple[Replica, ...]:
    """Those that train."""
    return tuple(replica for replica in placement if replica.scores is None)


class ScorerStage:
    """A stage as the executor sees it that keeps nothing of a forward, and has no backward; see `Stage`.

    keep: gets what the last stage makes of a micro-batch, with its index; None for other stages.
    """

    can_split_backward = False

    def __init__(self, stage: ForwardStage, read: Readout, keep: Callable[[int, Tensor], None] | None) -> None:
        self._stage, self._read, self._keep = stage, read, keep

    def boundary(self, micro_batch: MicroBatch) -> Tensor:
        return self._stage.boundary(micro_batch)

    def forward(self, index: int, micro_batch: MicroBatch, stage_input: Tensor | None) -> Tensor | None:
        output = self._stage.infer(micro_batch, stage_input, self._read)
        if self._keep is None:
            return output
        self._keep(index, output)
        return None

    def backward(self, index: int, output_grad: Tensor | None) -> Tensor | None:
        raise AssertionError("a forward-only pipeline has no backward")

    backward_input = backward

    def backward_weight(self, index: int) -> None:
        raise AssertionError("a forward-only pipeline has no backward")

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(())
