"""`fuse bench tail` writes a row per setting, in which every idea is on top of those before it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fuse.benchmarks.tail.siblings import held_against, in_groups, told
from fuse.cli import main
from fuse.interstage.length_trace import LengthTrace


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """One long response in sixteen."""
    path = tmp_path / "some.csv"
    path.write_text("prompt_tokens,output_tokens\n" + ("100,900\n" + "100,40\n" * 15) * 8)
    return path


def test_a_row_per_setting(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    command = ["bench", "tail", "--lengths", str(trace), "--sizes", "4x32", "2x32", "--group-size", "2"]
    options = ["--epochs", "1", "3", "--iterations", "2", "--correlations", "0.5"]
    assert main([*command, *options, "--markdown", "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["options"]["sizes"] == ["4 x 32", "2 x 32"]
    assert [written["options"][name] for name in ("speculation", "acceptance", "draft_share")] == ["int8", 0.97, 0.5]
    rows = {(row["devices"], row["trains"], row["epochs"]): row for row in written["rows"]}
    assert len(rows) == len(written["rows"]) == 2 * 2 * 2
    for (devices, trains, epochs), row in rows.items():
        seconds, once = row["simulated_seconds"], rows[devices, trains, 1]
        assert row["training_seconds"] == pytest.approx(epochs * once["training_seconds"])
        assert seconds["tail"] < seconds["drafts"] < seconds["adaptive"] <= seconds["none"]
        assert row["gains"]["tail"] == pytest.approx(seconds["none"] / seconds["tail"])
        assert 0 < row["hidden_share"] <= 1
        assert seconds["none"] - row["training_seconds"] == pytest.approx(
            once["simulated_seconds"]["none"] - once["training_seconds"]
        ), "the rollout"
    assert rows[4, "critic", 1]["training_seconds"] == pytest.approx(2 * rows[4, "groups", 1]["training_seconds"])
    for row in written["drafts"]:
        assert 1 < row["gain"] <= row["bound_gain"]
        assert row["blind_bound_gain"] <= row["bound_gain"]
    for row in written["siblings"]:
        assert row["simulated_seconds"].keys() == row["told"].keys() == {"pooled", "siblings", "history"}
        assert row["gains"]["pooled"] == 1
    printed = capsys.readouterr().out
    assert "| some | 4 x 32 | critic | 1 | 1 | " in printed
    assert "where replicas could idle for as long as what may train early takes (2 of 4): " in printed
    assert "| median | 2 x 32 |" in printed


def test_groups_have_the_trace_s_lengths_correlated_as_asked_for() -> None:
    random = np.random.default_rng(0)
    tokens = np.ceil(np.exp(random.normal(5, 1, 4003))).astype(np.int64)
    trace = LengthTrace(random.integers(1, 99, 4003), tokens, (None,) * 4003)
    for correlation in (0.0, 0.5, 0.9):
        grouped = in_groups(trace, 8, correlation)
        assert len(grouped) == 4000
        assert not Counter(grouped.response_tokens.tolist()) - Counter(tokens.tolist())
        assert (grouped.prompt_tokens.reshape(-1, 8) == grouped.prompt_tokens[::8, None]).all()
        logs = np.log(grouped.response_tokens).reshape(-1, 8)
        assert np.corrcoef(logs[:, 0], logs[:, 1])[0, 1] == pytest.approx(correlation, abs=0.08)


def test_siblings_tell_as_much_as_there_is_to_tell() -> None:
    """Groups of two epochs of 8; half of them is held out."""
    random = np.random.default_rng(1)
    tokens = np.ceil(np.exp(random.normal(5, 1, 3200))).astype(np.int64)
    trace = LengthTrace(np.full(3200, 64), tokens, (None,) * 3200)
    scores = [
        held_against(told(in_groups(trace, 16, correlation), 8, slice(0, 100), int(tokens.max())), 8)
        for correlation in (0.0, 0.6)
    ]
    for name in ("siblings", "history"):
        assert scores[0][name]["loss"] == pytest.approx(1, abs=0.02), "nothing, where lengths are independent"
        assert scores[1][name]["off"] < 0.6 * scores[1]["pooled"]["off"]
    assert scores[1]["history"]["loss"] < 0.96 * scores[1]["siblings"]["loss"] < 0.96**2


def test_unusable_arguments_are_one_line(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "tail", "--lengths", str(trace), "--sizes", "8by256"])
    assert "8by256 must be DEVICESxSAMPLES, as 8x256" in capsys.readouterr().err
    assert main(["bench", "tail", "--lengths", str(trace), "--acceptance", "2"]) == 2
    assert "acceptance is 2.0: a chance is 0 to 1" in capsys.readouterr().err
    assert main(["bench", "tail", "--lengths", str(trace), "--speculation", "off"]) == 2
    assert "--speculation is off: drafts are one of the ideas" in capsys.readouterr().err
    assert main(["bench", "tail", "--lengths", str(trace)]) == 2
    assert "512 responses are needed: lower --sizes or --iterations" in capsys.readouterr().err
