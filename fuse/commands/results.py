"""What a run gives: rewards, and where its time went."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResults:
    """Per update: mean reward. Over the run: seconds per phase, and per device the share of the time it was idle."""

    rewards: tuple[float, ...]
    phases_s: Mapping[str, float]
    idle: Mapping[str, float]

    @classmethod
    def from_log(cls, log_history: Sequence[Mapping[str, Any]]) -> RunResults:
        """Collect what the trainer logged at each update."""
        updates = [entry for entry in log_history if mean_reward(entry) is not None]
        phases_s: dict[str, float] = defaultdict(float)
        idle_s: dict[str, float] = defaultdict(float)
        for entry in updates:
            for name, value in entry.items():
                kind, _, label = name.partition("/")
                if kind == "time" and label != "total":
                    phases_s[label] += value
                elif kind == "idle":
                    idle_s[label] += value * entry["time/total"]
        total_s = sum(entry["time/total"] for entry in updates)
        return cls(
            rewards=tuple(reward for reward in map(mean_reward, updates) if reward is not None),
            phases_s=dict(phases_s) | {"other": max(0.0, total_s - sum(phases_s.values()))},
            idle={device: seconds / total_s for device, seconds in idle_s.items()},
        )


def mean_reward(logged: Mapping[str, Any]) -> float | None:
    """Of an update, as algorithms log it; None of what is no update."""
    rewards = (logged.get(name) for name in ("objective/scores", "reward"))
    return next((float(reward) for reward in rewards if reward is not None), None)


def run_json(log_history: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    """What `--json` of a whole run writes: its results, the seconds that it took, and all that the trainer logged."""
    results = RunResults.from_log(log_history)
    return {
        "rewards": results.rewards,
        "seconds": seconds,
        "phases": results.phases_s,
        "idle": results.idle,
        "log_history": log_history,
    }
