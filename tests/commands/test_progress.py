"""Progress of a run on a terminal: paths in it are neither markup nor commands."""

from __future__ import annotations

import io

from rich.console import Console

from fuse.commands.progress import UpdateProgress


def test_what_is_told_is_shown_as_it_is() -> None:
    for is_terminal in (True, False):
        out = io.StringIO()
        console = Console(file=out, force_terminal=is_terminal, width=120, color_system=None, legacy_windows=False)
        progress = UpdateProgress(console, "PPO")
        progress.start()
        progress.tell("loading: the policy at [red]x[/] [/]\x07")
        progress.stop()
        assert r"loading: the policy at [red]x[/] [/]\x07" in out.getvalue()
