"""A run's log of updates: a line of JSON each, what pages of a run are made of.

A line holds an update's metrics, the driver's phases, and of every device a strip: a letter for each of `NUM_CELLS`
equal parts of the update's time, for what took most of it. Traces hold more, and are deleted sooner.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from fuse.idle_causes import CAUSES, NOT_BUSY, Tracks, idle_intervals
from fuse.trace import PhaseClock, Span
from schedules.files import write_whole
from schedules.reading import parse_json

NAME = "updates.jsonl"
NUM_CELLS = 64
BUSY_LETTERS: Mapping[str, str] = MappingProxyType(
    {"generate": "G", "transfer": "X", "infer": "I", "train": "T", "optimizer": "O", "weights": "W"}
)
"""By category of spans; others are "B"."""
IDLE_LETTERS: Mapping[str, str] = MappingProxyType({cause: chr(ord("a") + index) for index, cause in enumerate(CAUSES)})


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRecord:
    """An update that is over.

    update: as the run counts them. start_s, end_s: seconds since the epoch. metrics: as logged. phases: (name, start,
    end) of the driver, in seconds from start_s. strips: by device, a letter per cell.
    """

    update: int
    start_s: float
    end_s: float
    metrics: Mapping[str, float]
    phases: Sequence[tuple[str, float, float]]
    strips: Mapping[str, str]


def record_of(update: int, metrics: Mapping[str, float], tracks: Tracks, clock: PhaseClock) -> UpdateRecord:
    """The record of an update: tracks, clock: as of `fuse.trainers.report.iteration_report`."""
    idle = idle_intervals(tracks, clock.start_s, clock.end_s, clock.spans)
    return UpdateRecord(
        update=update,
        start_s=clock.start_s,
        end_s=clock.end_s,
        metrics={name: value for name, value in metrics.items() if isinstance(value, int | float)},
        phases=[(one.name, one.start_s - clock.start_s, one.end_s - clock.start_s) for one in clock.spans],
        strips={
            device: strip(
                [span for spans in workers.values() for span in spans], idle[device], clock.start_s, clock.end_s
            )
            for device, workers in tracks.items()
        },
    )


def strip(spans: Sequence[Span], idle: Sequence[tuple[float, float, str]], start_s: float, end_s: float) -> str:
    """What a device did most in each cell of the time."""
    cell_s = max(end_s - start_s, 1e-9) / NUM_CELLS
    cells: list[dict[str, float]] = [{} for _ in range(NUM_CELLS)]
    told = [(begin, end, IDLE_LETTERS[cause]) for begin, end, cause in idle]
    told += [
        (span.start_s, span.end_s, BUSY_LETTERS.get(span.category, "B"))
        for span in spans
        if span.category not in NOT_BUSY
    ]
    for begin, end, letter in told:
        begin, end = max(0.0, begin - start_s) / cell_s, min(end - start_s, cell_s * NUM_CELLS) / cell_s
        for cell in range(int(begin), min(NUM_CELLS, int(end) + 1)):
            part = min(end, cell + 1) - max(begin, cell)
            if part > 0:
                cells[cell][letter] = cells[cell].get(letter, 0.0) + part
    driver = IDLE_LETTERS["driver"]
    return "".join(max(cell, key=cell.__getitem__) if cell else driver for cell in cells)


def append(path: Path, record: UpdateRecord) -> None:
    """Raises: OSError when it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(record), separators=(",", ":")) + "\n")


def read(path: Path) -> list[UpdateRecord]:
    """All records, in order. A last line that is being written, or was cut off by a full disk, is left out.

    Raises:
        ValueError: another line is damaged.
        OSError: it cannot be read.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_record(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not an update ({error}): delete the line") from None
    return records


def keep_until(path: Path, update: int) -> None:
    """Forget what comes after an update, from which a run goes on, and lines that are damaged; 0 forgets all.

    Raises: OSError when it cannot be written.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            if _record(line).update <= update:
                kept.append(line + "\n")
    write_whole(path, "".join(kept))


def _record(line: str) -> UpdateRecord:
    value = parse_json(line, any_number=True)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return UpdateRecord(
        update=int(value["update"]),
        start_s=float(value["start_s"]),
        end_s=float(value["end_s"]),
        metrics={str(name): float(one) for name, one in value["metrics"].items()},
        phases=[(str(name), float(begin), float(end)) for name, begin, end in value["phases"]],
        strips={str(device): str(one) for device, one in value["strips"].items()},
    )
