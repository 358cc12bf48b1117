"""Where measurements are kept, so that the same models on the same kind of machine are not measured again."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fuse.intrastage.cost_profile import Profile, profile_from_json, profile_to_json
from fuse.intrastage.placement import Replica, replica_from_json
from schedules.files import dispensable, user_cache, write_whole
from schedules.reading import parse_json

_logger = logging.getLogger(__name__)

NAME = "profile.json"


@dataclass(frozen=True, slots=True)
class Measured:
    """The stages that models are cut into, and what these cost; no profile before training has shown it.

    unfused: the stages that training one model after the other would have, and what they would cost; None where that
    would have the same ones.
    update_s: seconds of an optimizer step in these stages after its last micro-batch; None where nobody asked.
    times: as many micro-batches as were drawn, by what was; see `fuse.intrastage.micro_batch_number`.
    """

    placement: tuple[Replica, ...]
    profile: Profile | None
    unfused: Measured | None = None
    update_s: float | None = None
    times: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MeasurementStore:
    """Keeps what was measured for `identity`, in the run's own directory and in the user's cache.

    identity: all that the measurements depend on, as JSON; what was measured for another one is passed over.
    """

    directory: Path
    identity: Mapping[str, object]

    def load(self) -> Measured | None:
        """The run's own measurement, else the user's; a damaged or outdated file is passed over, with a warning."""
        for path in self._paths():
            try:
                found: Any = parse_json(path.read_text(encoding="utf-8"))
                if found["identity"] != json.loads(json.dumps(self.identity)):
                    continue
                return _from_json(found)
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                _logger.warning("measurements in %s are not used (%s): measuring again", path, error)
        return None

    def save(self, measured: Measured) -> None:
        """Keep a measurement; where it cannot be written there is a warning."""
        text = json.dumps({"identity": self.identity, **_to_json(measured)}, indent=1)
        for path in self._paths():
            with dispensable(path):
                write_whole(path, text + "\n")

    def _paths(self) -> tuple[Path, Path]:
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:32]
        return self.directory / NAME, user_cache() / "profiles" / f"{digest}.json"


def _to_json(measured: Measured) -> dict[str, object]:
    return {
        "placement": [asdict(replica) for replica in measured.placement],
        "profile": None if measured.profile is None else profile_to_json(measured.profile),
        "unfused": None if measured.unfused is None else _to_json(measured.unfused),
        "update_s": measured.update_s,
        "times": dict(measured.times),
    }


def _from_json(value: Mapping[str, Any]) -> Measured:
    profile, unfused = value["profile"], value["unfused"]
    return Measured(
        tuple(replica_from_json(one) for one in value["placement"]),
        None if profile is None else profile_from_json(profile),
        None if unfused is None else _from_json(unfused),
        value["update_s"],
        {str(drawn): float(times) for drawn, times in value["times"].items()},
    )


def machine() -> dict[str, object]:
    """What times depend on beside the models."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    except OSError:
        models = {platform.processor()}
    return {"processor": sorted(models), "machine": platform.machine()}
