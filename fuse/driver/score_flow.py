"""Who scores what the rollout gives away: a device by its copies of the models, or all devices through pipelines.

Through pipelines, every piece goes to all devices, in the order in which the driver has them: what devices send one
another follows it. A device gets the next piece while it has one, so that the stages are never empty between two; when
there is no next one, all that is under way comes to its end.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from fuse.interstage.migration import balance
from fuse.training.reading import TokenSequence
from fuse.training.score_pipelines import Piece, Scored
from fuse.training.scoring import Inference, inferences
from fuse.workers.calls import Future, PendingCalls
from fuse.workers.errors import WorkerError
from fuse.workers.model_handle import ModelHandle

Results = Mapping[str, Sequence[Any]]
"""Of a piece, by role, what its model says of every sequence."""

_CALLS_AHEAD = 2


class Scorers(Protocol):
    """What scores sequences that a device is to see to."""

    def put(self, device: int, sequences: Sequence[TokenSequence], then: Callable[[Sequence[Inference]], None]) -> None:
        """Have sequences scored; `then` hears what models say of them."""
        ...

    def late(self, device: int) -> ModelHandle:
        """Who keeps the device's sequences waiting."""
        ...


class WholeScorers:
    """Every device scores by itself; those that share an engine share what it is to see to. pending: gets the calls.

    workers: by device. num_engines: among which devices are divided.
    """

    def __init__(self, workers: Sequence[ModelHandle], num_engines: int, pending: PendingCalls) -> None:
        size = len(workers) // num_engines
        self._teams = [workers[first : first + size] for first in range(0, len(workers), size)]
        self._pending = pending
        self._scoring: dict[int, list[ModelHandle]] = {}  # those that have not answered, by team

    def put(self, device: int, sequences: Sequence[TokenSequence], then: Callable[[Sequence[Inference]], None]) -> None:
        team = self._teams[device]
        shares = [sorted(share) for share in balance([len(one) for one in sequences], len(team)) if share]
        results: dict[int, Inference] = {}
        scoring = self._scoring[device] = list(team[: len(shares)])

        def ended(worker: ModelHandle, share: Sequence[int], future: Future[list[Inference]]) -> None:
            results.update(zip(share, future.result(), strict=True))
            scoring.remove(worker)
            if not scoring:
                then([results[index] for index in range(len(sequences))])

        for worker, share in zip(team, shares, strict=False):
            future = worker.infer([sequences[index] for index in share])
            self._pending.expect(future, partial(ended, worker, share, future))

    def late(self, device: int) -> ModelHandle:
        return self._scoring[device][0]


@dataclass(slots=True, eq=False)
class _UnderWay:
    """A piece, and what is known of it. results: by role, None where a model has not said anything yet."""

    piece: Piece
    then: Callable[[Results], None]
    results: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def is_scored(self) -> bool:
        return not any(one is None for of_role in self.results.values() for one in of_role)


class ScoreFlow:
    """All devices score together, a piece behind the other. roles: the models. pending: gets the calls."""

    def __init__(self, workers: Sequence[ModelHandle], roles: Sequence[str], pending: PendingCalls) -> None:
        self._workers, self._roles, self._pending = workers, tuple(roles), pending
        self._num_pieces = 0
        self._waiting: deque[_UnderWay] = deque()
        self._under_way: dict[int, _UnderWay] = {}
        self._calls: deque[dict[Future[list[Scored]], ModelHandle]] = deque()  # those that have not ended, of each

    def put(self, device: int, sequences: Sequence[TokenSequence], then: Callable[[Sequence[Inference]], None]) -> None:
        self.put_piece(sequences, lambda results: then(inferences(results)))

    def put_piece(self, sequences: Sequence[TokenSequence], then: Callable[[Results], None]) -> None:
        """Have a piece scored; `then` hears what each model says."""
        piece = Piece(self._num_pieces, self._roles, tuple(sequences))
        self._num_pieces += 1
        results: dict[str, list[Any]] = {role: [None] * len(sequences) for role in self._roles}
        self._waiting.append(_UnderWay(piece, then, results))
        self._advance()

    def late(self, device: int) -> ModelHandle:
        return next(iter(self._calls[0].values())) if self._calls else self._workers[device]

    def _advance(self) -> None:
        """Call all devices, where there is something to do and they have no more than the next call ahead."""
        while self._waiting and len(self._calls) < _CALLS_AHEAD:
            one = self._waiting.popleft()
            self._under_way[one.piece.number] = one
            self._call(one.piece)
        if self._under_way and not self._calls:
            self._call(None)

    def _call(self, piece: Piece | None) -> None:
        call = {worker.advance(piece): worker for worker in self._workers}
        self._calls.append(call)
        for future in call:
            self._pending.expect(future, partial(self._ended, future, call))

    def _ended(self, future: Future[list[Scored]], call: dict[Future[list[Scored]], ModelHandle]) -> None:
        for scored in future.result():
            if scored.piece not in self._under_way:
                continue  # several devices share the last stage, and one has told before
            known = self._under_way[scored.piece].results[scored.role]
            for index, result in zip(scored.indices, scored.results, strict=True):
                known[index] = result
        del call[future]
        if not call:
            self._calls.remove(call)
        for number in [number for number, one in self._under_way.items() if one.is_scored]:
            one = self._under_way.pop(number)
            one.then(one.results)
        self._advance()


def score_through(
    workers: Sequence[ModelHandle],
    roles: Sequence[str],
    pieces: Sequence[Sequence[TokenSequence]],
    timeout_s: float | None = None,
) -> list[Results]:
    """What models say of every piece, through pipelines.

    Raises:
        WorkerError: a model worker died, raised, or did not answer within `timeout_s`.
    """
    pending = PendingCalls()
    flow = ScoreFlow(workers, roles, pending)
    found: dict[int, Results] = {}
    for number, piece in enumerate(pieces):
        flow.put_piece(piece, partial(found.__setitem__, number))
    while pending:
        heard = pending.heard(timeout_s)
        if not heard:
            worker = flow.late(0).worker
            raise WorkerError(worker.device, worker.role, f"no scores within {timeout_s or math.inf:g} s")
        for then in heard:
            then()
    return [found[number] for number in range(len(pieces))]


def scorers_of(
    workers: Sequence[ModelHandle], num_engines: int, flow_roles: Sequence[str], pending: PendingCalls
) -> Scorers:
    """Through pipelines of these roles' models over all devices; without any, every device by itself."""
    return ScoreFlow(workers, flow_roles, pending) if flow_roles else WholeScorers(workers, num_engines, pending)
