"""Which cores the devices of a run on this machine are: not those of another run, while there are others."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle, islice

_NAME = "fuse core"

_logger = logging.getLogger(__name__)


@contextmanager
def claimed_cores(count: int) -> Iterator[list[int]]:
    """Places of `count` cores among those that this process may use, in order of their numbers; unclaimed ones first.

    They are claimed until the body ends, or the process: a claim is a name in the system's abstract socket namespace,
    which leaves nothing behind. Where there are too few, devices share cores.
    """
    with ExitStack() as claims:
        free: list[int] = []
        taken: list[int] = []
        for place, core in enumerate(sorted(os.sched_getaffinity(0))):
            claim = claims.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            try:
                if len(free) == count:
                    break
                claim.bind(f"\0{_NAME} {core}")
                free.append(place)
            except OSError:
                taken.append(place)
        if len(free) < count:
            _logger.info("%d of %d devices share a core: other runs have claimed them", count - len(free), count)
        yield list(islice(cycle([*free, *taken]), count))
