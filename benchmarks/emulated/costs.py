"""What the operations of an emulated device take: affine functions, named or from a file, in an exact JSON form.

    decode step      = step_s + sample_s * batch + context_s * (tokens of context in the batch)
    prefill          = fixed_s + token_s * tokens
    scoring          = fixed_s * micro-batches + token_s * tokens     (of each model; see `SCORING_BATCH_TOKENS`)
    forward, ...     = fixed_s + token_s * tokens, over the number of stages             (tokens: with padding)
    message          = fixed_s + token_s * tokens                      (from a stage to the next, and back)
    optimizer step   = optimizer_s over the number of stages
    new weights      = weights_s                                       (from what trains to all engines)

A device is whatever runs one engine and one stage of each model that trains. Processes of emulated devices import this,
and so it imports little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from typing import Any, get_args, get_origin, get_type_hints

from fuse.interstage.costs import CostModel
from fuse.interstage.speculation import Speculation, speculation_from_json
from schedules import Kind

SCORING_BATCH_TOKENS = 16_384
"""Of a micro-batch that is scored."""
_NO_LINK_S = 1e12
"""KV is not moved: samples that migrate are computed again."""
_MOST = 1e21


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine:
    """Seconds of something, and of every token more."""

    fixed_s: float
    token_s: float

    def __call__(self, tokens: int) -> float:
        return self.fixed_s + self.token_s * tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCosts:
    """Of a decode step; see the module's equations."""

    step_s: float
    sample_s: float
    context_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCosts:
    """Of a whole model that trains, on one device. A backward is an `input_grad` and a `weight_grad`.

    forward_flops_per_token: what the model does; not waited for.
    """

    forward: Affine
    input_grad: Affine
    weight_grad: Affine
    optimizer_s: float
    forward_flops_per_token: float

    def operation_s(self, kind: Kind, tokens: int, num_stages: int) -> float:
        """Seconds of an operation of one of equal stages on a micro-batch of so many tokens."""
        parts = {
            Kind.F: (self.forward,),
            Kind.B: (self.input_grad, self.weight_grad),
            Kind.I: (self.input_grad,),
            Kind.W: (self.weight_grad,),
        }[kind]
        return sum(part(tokens) for part in parts) / num_stages


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatedCosts:
    """Of everything that an emulated device does, in seconds.

    scoring: by role, each model on its own. training: by role. device_flops_per_s: of the data sheet. speculation: how
    engines draft; None if they do not.
    """

    name: str
    device: str
    device_flops_per_s: float
    decode: DecodeCosts
    prefill: Affine
    scoring: Mapping[str, Affine]
    training: Mapping[str, TrainingCosts]
    message: Affine
    weights_s: float
    speculation: Speculation | None = None

    @property
    def rollout(self) -> CostModel:
        """What the simulator and policies know of it."""
        return CostModel(
            **asdict(self.decode),
            prefill_s=self.prefill.fixed_s,
            prefill_token_s=self.prefill.token_s,
            inference_s=sum(one.fixed_s for one in self.scoring.values()),
            inference_token_s=sum(one.token_s for one in self.scoring.values()),
            inference_batch_tokens=SCORING_BATCH_TOKENS,
            kv_bytes_per_token=0,
            transfer_s=_NO_LINK_S,
            transfer_byte_s=0.0,
            speculation=self.speculation,
        )

    def scoring_s(self, role: str, tokens: int) -> float:
        """Seconds in which a model scores sequences of so many tokens in all."""
        costs = self.scoring[role]
        return costs.fixed_s * math.ceil(tokens / SCORING_BATCH_TOKENS) + costs.token_s * tokens

    def scaled(self, factor: float) -> EmulatedCosts:
        """The same with every second as long as `factor` seconds."""
        scaled: EmulatedCosts = _map_seconds(self, lambda seconds: seconds * factor)
        return scaled


def _map_seconds(value: Any, change: Callable[[float], float]) -> Any:
    """A copy in which whatever is named `..._s` is changed."""
    if isinstance(value, Mapping):
        return {name: _map_seconds(one, change) for name, one in value.items()}
    if not is_dataclass(value) or isinstance(value, type):
        return value
    changed = {field.name: _map_seconds(getattr(value, field.name), change) for field in fields(value)}
    times = {name: change(changed[name]) for name in changed if name.endswith("_s") and not name.endswith("_per_s")}
    return replace(value, **changed | times)


def costs_from_json(value: object, training: Sequence[str], scoring: Sequence[str]) -> EmulatedCosts:
    """What `dataclasses.asdict` makes of costs. training, scoring: roles that it has to have.

    Raises:
        ValueError: a field is missing, unknown or no usable number.
    """
    costs: EmulatedCosts = _read(EmulatedCosts, value, "costs")
    for name, of_roles, roles in (("training", costs.training, training), ("scoring", costs.scoring, scoring)):
        _check_names(of_roles, f"costs.{name}", roles)
    if costs.decode.step_s <= 0:
        raise ValueError(f"costs.decode.step_s is {costs.decode.step_s}: a decode step takes time")
    return costs


def _read(kind: Any, value: object, where: str) -> Any:
    """A number, a text, a dataclass of these, a table of dataclasses by name, or how engines draft."""
    if kind is str:
        return str(value)
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST:
            raise ValueError(f"{where} is {value!r}: it must be a number, 0 to {_MOST:g}")
        return float(value)
    if Speculation in get_args(kind):
        return None if value is None else speculation_from_json(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {value!r}: it must be an object")
    if get_origin(kind) is Mapping:
        return {name: _read(get_args(kind)[1], one, f"{where}.{name}") for name, one in value.items()}
    kinds = get_type_hints(kind)
    value = {**{field.name: field.default for field in fields(kind) if field.default is not MISSING}, **value}
    _check_names(value, where, list(kinds))
    make: Callable[..., Any] = kind
    return make(**{name: _read(kinds[name], value[name], f"{where}.{name}") for name in kinds})


def _check_names(table: Mapping[str, object], where: str, names: Sequence[str]) -> None:
    if missing := [name for name in names if name not in table]:
        raise ValueError(f"{where}: {missing[0]} is missing")
    if unknown := sorted(set(table) - set(names)):
        raise ValueError(f"{where}: unknown field {unknown[0]}: remove it")
