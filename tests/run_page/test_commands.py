"""`fuse show` of a run, of one of its traces, and of a made-up run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fuse.cli import main
from fuse.commands import run_text, show_run
from fuse.run_page.demo import Demo, write_demo


def test_a_run_is_told_and_written(run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(run_directory)]) == 0
    printed = capsys.readouterr().out
    assert "of all devices' time" in printed
    assert "reward 0." in printed
    out = tmp_path / "run.html"
    assert main(["show", str(run_directory), "--html", str(out)]) == 0
    document = out.read_text(encoding="utf-8")
    assert document.count('id="update-') == 2
    assert f"<title>{run_directory.name}</title>" in document


def test_a_trace_is_its_rollout_and_all_its_steps(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, out = run_directory / "traces" / "iteration-00008.json", tmp_path / "update.html"
    assert main(["show", str(trace), "--html", str(out)]) == 0
    printed = capsys.readouterr().out
    for words in ("rollout, executed", "rollout, simulated, adaptive", "16 samples", "step 1 of 2", "step 2 of 2"):
        assert words in printed
    assert 'id="update-8"' in out.read_text(encoding="utf-8")
    assert main(["show", str(trace), "--step", "2"]) == 0
    printed = capsys.readouterr().out
    assert "step 2 of 2" in printed
    assert "rollout" not in printed


def test_a_run_that_nobody_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = Demo(num_updates=2, num_devices=2, num_samples=4, num_traces=1)
    monkeypatch.setattr(show_run, "write_demo", partial(write_demo, demo=small))
    out = tmp_path / "demo.html"
    assert main(["show", "--demo", "--html", str(out)]) == 0
    assert "made-up rewards</title>" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no FILE: give a problem, schedule, solution or trace, the output directory of a run, or --demo"),
        (["empty", "--playground", "out.html"], "--playground is of no FILE: give it alone"),
        (["--demo"], "--demo has nothing to print: give --html FILE"),
        (["empty"], "empty has no updates.jsonl: give the output directory of a run"),
        (["empty", "--svg", "out.svg"], "--svg is of one schedule or trace: a run has --html"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["show", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_an_interrupted_run_says_how_to_go_on() -> None:
    saved: Any = SimpleNamespace(how_to_resume="checkpoint-2 is in out, to go on with by resume_from_checkpoint=True")
    text = run_text.how_to_go_on(saved)
    assert text == "checkpoint-2 is in out, to go on with by the same command with --resume-from-checkpoint true"
    unsaved: Any = SimpleNamespace(how_to_resume="nothing was saved to resume from")
    assert run_text.how_to_go_on(unsaved) == "nothing was saved to resume from"
