"""Progress of a run: as lines, which updates get one; anywhere, paths in it are neither markup nor commands."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from fuse.commands.progress import UpdateProgress
from fuse.commands.run_text import update_text


@pytest.mark.parametrize(
    ("seconds_per_update", "num_updates", "shown"),
    [
        (60.0, 6, [1, 2, 3, 4, 5, 6]),
        (1.0, 14, [1, 6, 11, 14]),
        (0.001, 1000, [1, 1000]),
    ],
)
def test_lines_come_by_time_and_not_by_number(seconds_per_update: float, num_updates: int, shown: list[int]) -> None:
    now_s = 0.0
    console = Console(file=io.StringIO(), force_terminal=False)
    progress = UpdateProgress(console, "PPO", clock=lambda: now_s)
    for update in range(1, num_updates + 1):
        now_s = update * seconds_per_update
        state = SimpleNamespace(global_step=update, max_steps=num_updates)
        logs = {"objective/scores": 0.5, "time/total": seconds_per_update}
        progress.on_log(None, state, None, logs)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == shown
    assert lines[0] == f"PPO 1/{num_updates}: reward 0.500, {seconds_per_update:.1f} s per update"


def test_an_update_says_what_people_look_at_first() -> None:
    logs = {
        "reward": 0.25,
        "kl": 0.0123,
        "completions/clipped_ratio": 0.25,
        "completions/mean_length": 99.6,
        "tokens_per_s/total": 1234.4,
        "idle/device0": 0.1,
        "idle/device1": 0.3,
        "time/total": 2.0,
    }
    assert update_text(logs) == (
        "reward 0.250, KL 0.0123, 75% ended by EOS, 100 tokens long, 1,234 tokens/s, 20% idle, 2.0 s per update"
    )
    many = {"objective/scores": 1.0, "time/total": 1.0, "idle/min": 0.0, "idle/mean": 0.4, "idle/max": 0.5}
    assert update_text(many) == "reward 1.000, 40% idle, 1.0 s per update"


def test_what_is_told_is_shown_as_it_is() -> None:
    for is_terminal in (True, False):
        out = io.StringIO()
        console = Console(file=out, force_terminal=is_terminal, width=120, color_system=None, legacy_windows=False)
        progress = UpdateProgress(console, "PPO")
        progress.start()
        progress.tell("loading: the policy at [red]x[/] [/]\x07")
        progress.stop()
        assert r"loading: the policy at [red]x[/] [/]\x07" in out.getvalue()
