"""Where measurements are kept, so that the same models on the same kind of machine are not measured again."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from fuse.intrastage.cost_profile import Profile, profile_from_json, profile_to_json
from fuse.intrastage.placement import Replica, replica_from_json
from schedules.files import dispensable, user_cache, write_whole

_logger = logging.getLogger(__name__)

NAME = "profile.json"


@dataclass(frozen=True, slots=True)
class Measured:
    """The stages that models are cut into, and what these cost; no profile before training has shown it."""

    placement: tuple[Replica, ...]
    profile: Profile | None


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
                found = json.loads(path.read_text())
                if found["identity"] != json.loads(json.dumps(self.identity)):
                    continue
                profile = found["profile"]
                return Measured(
                    tuple(replica_from_json(one) for one in found["placement"]),
                    None if profile is None else profile_from_json(profile),
                )
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                _logger.warning("measurements in %s are not used (%s): measuring again", path, error)
        return None

    def save(self, measured: Measured) -> None:
        """Keep a measurement; where it cannot be written there is a warning."""
        profile = measured.profile
        text = json.dumps(
            {
                "identity": self.identity,
                "placement": [asdict(replica) for replica in measured.placement],
                "profile": None if profile is None else profile_to_json(profile),
            },
            indent=1,
        )
        for path in self._paths():
            with dispensable(path):
                write_whole(path, text + "\n")

    def _paths(self) -> tuple[Path, Path]:
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:32]
        return self.directory / NAME, user_cache() / "profiles" / f"{digest}.json"


def machine() -> dict[str, object]:
    """What times depend on beside the models."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    except OSError:
        models = {platform.processor()}
    return {"processor": sorted(models), "machine": platform.machine()}
