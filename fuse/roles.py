"""The models of a run by what they are for: which train, which score, and what a score fills in.

A run has some of these; whatever is done with models is a loop over those that are present. Of several models that are
for the same, all but the first have a number in their name: reward, reward_1, reward_2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

ScoreKind = Literal["reference_logprobs", "values", "scores"]
"""Fields of a `Sample` that models fill in."""

GENERATING = "actor"
"""The role whose weights the engines have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """What a model does. trains: in a pipeline. scores: what it says of a finished sample; None when nothing."""

    trains: bool = False
    scores: ScoreKind | None = None


ROLES = MappingProxyType(
    {
        "actor": Role(trains=True),
        "critic": Role(trains=True, scores="values"),
        "reference": Role(scores="reference_logprobs"),
        "reward": Role(scores="scores"),
    }
)


def numbered(role: str, count: int) -> tuple[str, ...]:
    """Names of so many models of this role."""
    return tuple(f"{role}_{index}" if index else role for index in range(count))


def role_of(name: str) -> Role:
    """What the model of this name does."""
    return ROLES[_kind(name)]


def _kind(name: str) -> str:
    return name.partition("_")[0]


def _ordered(names: Iterable[str]) -> list[str]:
    given = list(dict.fromkeys(names))
    return [name for kind in ROLES for name in given if _kind(name) == kind]


def training(roles: Iterable[str]) -> tuple[str, ...]:
    """Those of the roles that train, in the table's order."""
    return tuple(name for name in _ordered(roles) if role_of(name).trains)


def scoring(roles: Iterable[str]) -> tuple[str, ...]:
    """Those of the roles that score, in the table's order."""
    return tuple(name for name in _ordered(roles) if role_of(name).scores is not None)
