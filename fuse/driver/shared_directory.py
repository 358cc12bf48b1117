"""Whether a run's directory is the same for its driver and for workers on other hosts."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fuse.workers.calls import Worker


def check_shared(directory: Path | None, elsewhere: Mapping[str, Worker[Any]]) -> None:
    """Write a file there and have a worker of every other host look for it. elsewhere: by host.

    Costs nothing without a directory, and where all workers are on the driver's host.

    Raises: ValueError when a host does not see it.
    """
    if directory is None or not elsewhere:
        return
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".shared-", suffix=".tmp") as probe:
        seen = {host: worker.sees(probe.name) for host, worker in elsewhere.items()}
        unseen = [host for host, future in seen.items() if not future.result()]
    if unseen:
        raise ValueError(
            f"output_dir={str(directory)!r} is another directory on {', '.join(unseen)}, whose workers write their "
            "part of each checkpoint there: name one that all hosts share"
        )
