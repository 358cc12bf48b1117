"""Ends what a local Ray cluster leaves behind when its driver is killed. Run as a script: `reaper.py DIRECTORY`.

Ray's own processes watch their parents, but its agents take a minute to notice, and nobody watches over the files.
The script waits for the end of its standard input, which is the end of the driver, and then cleans up. It knows the
cluster's processes, and theirs, by an environment variable that holds the cluster's directory.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Set
from contextlib import suppress
from pathlib import Path

MARK = "FUSE_RAY_DIRECTORY"
ESSENTIAL = {"raylet": "node", "gcs_server": "control service"}
"""Processes without which a cluster does not go on, as the system names them, and as people do."""
_POLL_S = 0.02


def processes_of(directory: Path) -> set[int]:
    """Ids of the processes that carry the cluster's mark and have not ended."""
    mark = f"{MARK}={directory}".encode()
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.add(int(process.name))
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue  # it has ended, or is another user's
    return found


def end_processes_of(directory: Path, grace_s: float, spared: Set[int] = frozenset()) -> None:
    """Return when none but those spared is left; who has not ended by itself after `grace_s` is killed."""
    kill_at_s = time.monotonic() + grace_s
    while processes := processes_of(directory) - spared:
        if time.monotonic() >= kill_at_s:
            for process in processes:
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    continue  # it has just ended
        time.sleep(_POLL_S)


def ended(name: str) -> str:
    """What a user is told when a process of Ray itself, which has this name in `ESSENTIAL`, has ended."""
    return (
        f"Ray's {ESSENTIAL[name]} has ended, and with it the run: see that the machine has memory left, and resume "
        "from the last checkpoint"
    )


def _names_of(processes: set[int]) -> Iterator[str]:
    for process in processes:
        with suppress(OSError):  # it has just ended
            yield Path(f"/proc/{process}/comm").read_text().strip()


def main(directory: Path) -> None:
    sys.stdin.read()
    for name in ESSENTIAL.keys() - _names_of(processes_of(directory)):
        print(ended(name), file=sys.stderr)  # Ray has ended the driver for that, without a word
    end_processes_of(directory, grace_s=0.0)
    shutil.rmtree(directory, ignore_errors=True)  # the driver removes it too, when it ends in order


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main(Path(sys.argv[1]))
