"""The models of a run by what they are for: which train, which score, and what a score fills in.

A run has some of these; whatever is done with models is a loop over those that are present.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

ScoreKind = Literal["reference_logprobs", "values", "score"]
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
        "reward": Role(scores="score"),
    }
)


def training(roles: Iterable[str]) -> tuple[str, ...]:
    """Those of the roles that train, in the table's order."""
    return tuple(role for role in ROLES if role in set(roles) and ROLES[role].trains)


def scoring(roles: Iterable[str]) -> tuple[str, ...]:
    """Those of the roles that score, in the table's order."""
    return tuple(role for role in ROLES if role in set(roles) and ROLES[role].scores is not None)
