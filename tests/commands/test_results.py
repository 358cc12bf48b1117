"""What a run's log is summed up to."""

import argparse
from pathlib import Path

import pytest

from fuse.commands.output import output_file
from fuse.commands.results import RunResults

LOG = [
    {"objective/scores": 0.25, "time/total": 4.0, "time/generation": 1.0, "time/training": 2.0, "idle/device0": 0.5},
    {"eval_loss": 1.0},
    {"objective/scores": 0.75, "time/total": 1.0, "time/generation": 0.5, "time/training": 0.5, "idle/device0": 0.0},
]


def test_rewards_per_update_seconds_per_phase_and_idle_share_of_the_time() -> None:
    results = RunResults.from_log(LOG)
    assert results.rewards == (0.25, 0.75)
    assert results.phases_s == pytest.approx({"generation": 1.5, "training": 2.5, "other": 1.0})
    assert results.idle == pytest.approx({"device0": 0.4})


def test_a_file_to_write_needs_its_directory(tmp_path: Path) -> None:
    assert output_file(str(tmp_path / "new.json")) == tmp_path / "new.json"
    with pytest.raises(argparse.ArgumentTypeError, match="does not exist"):
        output_file(str(tmp_path / "missing" / "new.json"))
    with pytest.raises(argparse.ArgumentTypeError, match="is a directory"):
        output_file(str(tmp_path))
