"""`fuse demo`, with a warm-up of no steps and an update or two."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from fuse import cli
from fuse.commands import demo


@pytest.mark.usefixtures("in_process_workers")
def test_it_leaves_a_curve_a_trace_a_policy_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "warm_up", lambda *models, **options: None)
    monkeypatch.setattr(demo, "BATCH_SIZE", 8)
    monkeypatch.setattr(demo, "MICRO_BATCH_SIZE", 2)
    options = f"--updates 2 --devices 1 --output-dir {tmp_path}/demo --json {tmp_path}/demo.json".split()
    assert cli.main(["demo", *options]) == 0
    figures = json.loads((tmp_path / "demo.json").read_text())
    assert len(figures["rewards"]) == 2
    assert {"warm-up", "rollout", "training"} <= figures["phases"].keys()
    assert sum(figures["phases"].values()) == pytest.approx(figures["seconds"])
    assert (tmp_path / "demo/learning_curve.png").stat().st_size > 0
    assert json.loads((tmp_path / "demo/traces/iteration-00002.json").read_text())["traceEvents"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "demo/policy")
    output = capsys.readouterr().out
    for text in ("where", "idle during PPO: device0", "iteration-00002.json", "learning_curve.png"):
        assert text in output.replace("\n", "")


@pytest.mark.parametrize("option", ["--devices", "--updates"])
def test_none_of_something_is_refused(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", option, "0", "--output-dir", str(tmp_path / "demo")]) == 2
    assert capsys.readouterr().err == f"fuse demo: {option} is 0: it must be at least 1\n"
    assert not (tmp_path / "demo").exists()
