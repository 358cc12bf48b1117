"""A process that answers: what ends it is raised here, and so is its end."""

from __future__ import annotations

from operator import methodcaller

import pytest

from fuse.benchmarks.peer_process import PeerProcess
from fuse.workers.errors import RunError


def test_its_end_is_noticed() -> None:
    with PeerProcess("the peer", methodcaller("send", "ready")) as peer:
        assert peer.answer() == "ready"
        with pytest.raises(RunError, match="the peer has ended with exit code 0"):
            peer.answer()
    assert peer.process_id is None


def test_what_ends_it_is_raised_here() -> None:
    with PeerProcess("the peer", methodcaller("fly")) as peer:
        with pytest.raises(AttributeError, match="no attribute 'fly'") as refusal:
            peer.answer()
        assert "peer_process.py" in refusal.value.__notes__[0], "where it was raised"
        with pytest.raises(RunError, match="the peer has ended with exit code 0"):
            peer.ask("anything")
