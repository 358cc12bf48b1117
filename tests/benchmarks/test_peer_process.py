"""A process that answers: what ends it is raised here, and so is its end."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from operator import methodcaller
from pathlib import Path

import pytest

from fuse import cli
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


@pytest.mark.processes
def test_a_script_that_is_not_guarded_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from operator import methodcaller\n"
        "from fuse.benchmarks.peer_process import PeerProcess, end_if_started_again\n"
        "end_if_started_again()\n"
        "with PeerProcess('the peer', methodcaller('send', 'ready')) as peer:\n"
        "    peer.answer()\n"
    )
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    last = run.stderr.splitlines()[-1]
    assert "the peer cannot start: it imports this program's script" in last
    assert last.endswith('put what the script does under if __name__ == "__main__":')


def test_a_benchmark_does_not_start_in_a_process_that_is_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(SystemExit, match="64"):
        cli.main(["bench", "iteration", "--peer", "trl"])
