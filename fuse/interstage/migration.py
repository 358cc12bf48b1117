"""Which engine keeps which sample, and which device scores what: policies as pure functions of the rollout's state.

The simulator and the live controller call the same policies: at the start, whenever samples finish, and whenever a
device has scored what it was given. A policy answers with actions, in the order in which they are to be done.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

_PIECES = 4
"""While samples are live, a device gets about so much of its share of all that is in sight at once."""
_LEAST_PIECE_TOKENS = 1024
"""Pieces are no smaller than this while more is to come: each piece has a cost of its own."""


@dataclass(frozen=True, slots=True)
class Migrate:
    """Move a live sample; it keeps decoding on `source` until it is taken out between two steps."""

    sample: int
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Release:
    """The device's engine gets no samples for now: its time, and memory where that matters, go to inference."""

    device: int


@dataclass(frozen=True, slots=True)
class Infer:
    """Score finished samples on a released device."""

    device: int
    samples: tuple[int, ...]


Action = Migrate | Release | Infer


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What one engine holds side by side. A sample reserves KV for its prompt and `max_new_tokens`.

    Raises:
        ValueError: a limit below one.
    """

    max_batch: int
    kv_capacity_tokens: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        for name in ("max_batch", "kv_capacity_tokens", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")


@dataclass(frozen=True, slots=True, eq=False)
class LiveSamples:
    """The samples that are not finished, as parallel arrays [live].

    `devices`: where each is, or is going to; `response_tokens`: generated so far; `started`: it has been in a running
    batch, so moving it costs a migration; `movable`: it is not on the way already; `prompts`: a number, equal for
    siblings.
    """

    ids: Ints
    devices: Ints
    prompt_tokens: Ints
    response_tokens: Ints
    started: Bools
    movable: Bools
    prompts: Ints

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def context_tokens(self) -> Ints:
        """Prompt and response so far, [live]."""
        return self.prompt_tokens + self.response_tokens


@dataclass(frozen=True, slots=True, eq=False)
class EndedSamples:
    """The samples that are finished, scored or not, as parallel arrays [ended]; `prompts` as of live ones."""

    prompts: Ints
    response_tokens: Ints


@dataclass(frozen=True, slots=True, eq=False)
class RolloutState:
    """What a policy sees: live samples, finished ones that nobody scores yet, and what each device is doing.

    `ended`: all finished ones, which tell of their siblings; `finished_ids`, `finished_tokens` [backlog], tokens with
    the prompt; `released` [devices]; `inferring_tokens` [devices]: tokens that the device is scoring, 0 if none;
    `inferring_left` [devices]: about so many of them it has yet to score; `lost` [devices]: the engine has died, so
    that the device can only score.
    """

    limits: EngineLimits
    live: LiveSamples
    ended: EndedSamples
    finished_ids: Ints
    finished_tokens: Ints
    released: Bools
    inferring_tokens: Ints
    inferring_left: Floats
    lost: Bools

    @property
    def num_devices(self) -> int:
        return len(self.released)

    def num_live(self) -> Ints:
        """Live samples per device, [devices]; those on their way count where they go."""
        return np.bincount(self.live.devices, minlength=self.num_devices)


class Policy(Protocol):
    """A migration policy: state in, actions out, and nothing remembered in between."""

    def __call__(self, state: RolloutState) -> list[Action]:
        """Decide what to do now.

        Post: only a device that is released, by these actions or earlier ones, is told to infer. It has no live samples
        but those that it has been told to give up, and infers when they are gone. Targets stay within limits, and their
        engines are not lost.
        """
        ...


def evens_out(policy: Policy) -> bool:
    """Whether a policy moves samples from engines that have much to do to those that have little."""
    return bool(getattr(policy, "evens_out", False))


@dataclass(frozen=True, slots=True)
class StageByStage:
    """`none`: no sample moves, and none is scored before all are finished; then all devices get equal shares."""

    def __call__(self, state: RolloutState) -> list[Action]:
        if len(state.live) or not len(state.finished_ids) or state.inferring_tokens.any():
            return []
        actions: list[Action] = []
        shares = balance(state.finished_tokens.tolist(), state.num_devices)
        for device, share in enumerate(shares):
            if share:
                actions += _infer(state, device, [int(state.finished_ids[index]) for index in share])
        return actions


@dataclass(frozen=True, slots=True)
class Threshold:
    """`threshold`: once at most `remaining` samples are live, the `num_kept` most loaded engines take them all.

    More engines are kept where batch and KV limits ask for them. Inference starts then, and not before. Source:
    RLHFuse (arXiv 2409.13221), section 4: R_t and m; see `tuning.tune_threshold`.
    """

    remaining: int
    num_kept: int

    def __call__(self, state: RolloutState) -> list[Action]:
        if len(state.live) > self.remaining:
            return []
        moves = consolidate(state, self.num_kept)
        return [*moves, *feed(state, moves)]


def consolidate(state: RolloutState, num_kept: int, loads: NDArray[np.float64] | None = None) -> list[Migrate]:
    """Empty all engines but the `num_kept` most loaded ones, or the fewest above that the limits allow.

    Samples go, longest context first, to the kept engine with the fewest, or with the least of `loads` [live]. Those
    that are on their way stay where they are going.
    """
    live, counts = state.live, state.num_live()
    loaded = np.flatnonzero((counts > 0) & ~state.lost)
    if len(loaded) <= num_kept:
        return []
    context = np.bincount(live.devices, weights=live.context_tokens, minlength=state.num_devices)
    by_load = sorted(loaded.tolist(), key=lambda device: (-counts[device], -context[device], device))
    for kept in range(max(1, num_kept), len(by_load)):
        moves = _assign(state, by_load[:kept], np.ones(len(live)) if loads is None else loads)
        if moves is not None:
            return moves
    return []


def feed(
    state: RolloutState,
    moves: Iterable[Migrate] = (),
    piece_tokens: float | None = None,
    least_tokens: float | None = None,
) -> list[Action]:
    """Give devices that are free, once `moves` are done, finished samples to score, in even pieces or longest first.

    While samples are live, a piece has at most `piece_tokens`, or one sample, and nothing is scored before
    `least_tokens` have come together; by default both are parts of a device's share of all that is in sight. When none
    is live, nothing more is to come: then each device gets at once what it has yet to score.
    """
    if not len(state.finished_ids):
        return []
    free = free_devices(state, moves)
    if not free:
        return []
    tokens = state.finished_tokens.tolist()
    share = (sum(tokens) + int(state.live.context_tokens.sum())) / state.num_devices
    if least_tokens is None:
        least_tokens = min(_LEAST_PIECE_TOKENS, share / (2 * _PIECES))
    if not len(state.live):
        pieces = _last_pieces(tokens, state, free, least_tokens)
    elif sum(tokens) < least_tokens:
        return []
    else:
        most = max(_LEAST_PIECE_TOKENS, share / _PIECES) if piece_tokens is None else piece_tokens
        pieces = _next_pieces(tokens, len(free), most)
    return [
        action
        for device, piece in zip(free, pieces, strict=True)
        if piece
        for action in _infer(state, device, [int(state.finished_ids[index]) for index in piece])
    ]


def _next_pieces(tokens: Sequence[int], num_pieces: int, piece_tokens: float) -> list[list[int]]:
    """All in even pieces where they hold it, else the longest first."""
    if sum(tokens) <= piece_tokens * num_pieces:
        return balance(tokens, num_pieces)
    pieces: list[list[int]] = [[] for _ in range(num_pieces)]
    longest_first = iter(sorted(range(len(tokens)), key=lambda index: -tokens[index]))
    index = next(longest_first, None)
    for piece in pieces:
        held = 0
        while index is not None and (not piece or held + tokens[index] <= piece_tokens):
            piece.append(index)
            held += tokens[index]
            index = next(longest_first, None)
    return pieces


def _last_pieces(
    tokens: Sequence[int], state: RolloutState, free: Sequence[int], least_tokens: float
) -> list[list[int]]:
    """What each free device is to score so that all devices end together, those that score something now, too.

    These get the rest when they are done; less than `least_tokens` is not worth pieces of its own.
    """
    loads = [0.0] * len(free) + state.inferring_left[state.inferring_tokens > 0].tolist()
    shares = balance(tokens, len(loads), loads)
    rest = sum(tokens[index] for share in shares[len(free) :] for index in share)
    return shares[: len(free)] if rest >= least_tokens else balance(tokens, len(free))


def free_devices(state: RolloutState, moves: Iterable[Migrate] = ()) -> list[int]:
    """Devices with neither live samples nor inference once `moves` are done, released ones first."""
    num_live = state.num_live()
    for move in moves:
        num_live[move.source] -= 1
        num_live[move.target] += 1
    free = np.flatnonzero((num_live == 0) & (state.inferring_tokens == 0))
    return sorted(free.tolist(), key=lambda device: (not state.released[device], device))


class Room:
    """Places and KV tokens left on each engine, counting samples that wait or are on their way."""

    def __init__(self, state: RolloutState) -> None:
        limits, live = state.limits, state.live
        reserved = np.bincount(
            live.devices, weights=live.prompt_tokens + limits.max_new_tokens, minlength=state.num_devices
        )
        self._max_new_tokens = limits.max_new_tokens
        self._places: list[int] = (limits.max_batch - state.num_live()).tolist()
        self._tokens: list[float] = (limits.kv_capacity_tokens - reserved).tolist()

    def fits(self, device: int, prompt_tokens: int) -> bool:
        """Whether the engine would hold one more sample of this prompt to its end."""
        return self._places[device] >= 1 and self._tokens[device] >= prompt_tokens + self._max_new_tokens

    def move(self, source: int, target: int, prompt_tokens: int) -> None:
        """Account for a migration."""
        for device, sign in ((source, 1), (target, -1)):
            self._places[device] += sign
            self._tokens[device] += sign * (prompt_tokens + self._max_new_tokens)


def balance(tokens: Sequence[int], num_shares: int, loads: Sequence[float] | None = None) -> list[list[int]]:
    """Split indices so that the shares' token counts are about equal: longest first, to the share with the fewest.

    loads: tokens that the shares have beforehand; by default none. Source: Graham 1969, longest processing time first:
    the largest share is at most 4/3 of the smallest possible.
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    totals = [(0.0 if loads is None else loads[share], share) for share in range(num_shares)]
    heapq.heapify(totals)
    for index in sorted(range(len(tokens)), key=lambda index: -tokens[index]):
        total, share = heapq.heappop(totals)
        shares[share].append(index)
        heapq.heappush(totals, (total + tokens[index], share))
    return shares


def _assign(state: RolloutState, kept: Sequence[int], loads: NDArray[np.float64]) -> list[Migrate] | None:
    """Move all samples that can move to the kept engines, or None if they do not fit."""
    live = state.live
    room = Room(state)
    totals = np.bincount(live.devices, weights=loads, minlength=state.num_devices)
    queue = [(float(totals[device]), device) for device in kept]
    heapq.heapify(queue)
    leaving = np.flatnonzero(live.movable & ~np.isin(live.devices, kept))
    moves: list[Migrate] = []
    for index in leaving[np.argsort(-live.context_tokens[leaving], kind="stable")].tolist():
        prompt_tokens, source = int(live.prompt_tokens[index]), int(live.devices[index])
        full = []
        while queue and not room.fits(queue[0][1], prompt_tokens):
            full.append(heapq.heappop(queue))
        if not queue:
            return None
        total, target = heapq.heappop(queue)
        room.move(source, target, prompt_tokens)
        moves.append(Migrate(int(live.ids[index]), source, target))
        for entry in (*full, (total + float(loads[index]), target)):
            heapq.heappush(queue, entry)
    return moves


def _infer(state: RolloutState, device: int, samples: Sequence[int]) -> list[Action]:
    infer = Infer(device, tuple(samples))
    return [infer] if state.released[device] else [Release(device), infer]
