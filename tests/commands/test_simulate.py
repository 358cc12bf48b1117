"""`fuse simulate`: what it prints and writes, and the one line it answers bad input with."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fuse.cli import main
from fuse.interstage.costs import SMALL_CPU, costs_to_json


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Thirty-two prompts of 500 tokens; every fourth response is long."""
    path = tmp_path / "lengths.csv"
    path.write_text("prompt_tokens,output_tokens\n" + "500,100\n500,8\n500,9\n500,10\n" * 8)
    return path


def test_compares_policies_on_a_trace(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    command = ["simulate", "--lengths", str(trace), "--devices", "4", "--batch", "16", "--iterations", "2"]
    assert main([*command, "--policy", "threshold,adaptive,none", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "costs llama-33b-8xh800: a decode step of one sample with 1,000 tokens" in printed
    assert "G generates, i infers" in printed
    devices = [line.split()[0] for line in printed.splitlines() if re.fullmatch(r" +[0-9]+ [Gi.]+", line)]
    assert devices == ["0", "1", "2", "3"] * 4
    assert "bound: no policy is faster" in printed

    written = json.loads(out.read_text())
    rows = {row["policy"]: row for row in written["rows"]}
    assert list(rows) == ["none", "threshold", "adaptive", "known"]
    for row in rows.values():
        assert row["lengths"] == "lengths"
        assert row["simulated_seconds"] >= row["oracle_seconds"] > 0
        assert row["gain"] == pytest.approx(rows["none"]["simulated_seconds"] / row["simulated_seconds"])
    assert rows["none"]["migrations"] == 0
    assert rows["adaptive"]["simulated_seconds"] < rows["none"]["simulated_seconds"]
    assert len(written["timelines"]["adaptive"]) == 4
    kinds = {kind for device in written["timelines"]["adaptive"] for kind, _, _ in device}
    assert kinds == {"generate", "infer"}


def test_says_what_tail_training_hides(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With one long sample a batch, of which the others' training hides all but what devices keep for the end."""
    out = tmp_path / "out.json"
    trace.write_text("prompt_tokens,output_tokens\n" + ("500,900\n" + "500,8\n" * 15) * 4)
    command = ["simulate", "--lengths", str(trace), "--devices", "4", "--batch", "16", "--policy", "adaptive"]
    tail = ["--tail-training", "groups", "--group-size", "2", "--epochs", "2", "--json", str(out)]
    assert main([*command, *tail]) == 0
    printed = capsys.readouterr().out
    assert "t trains" in printed
    assert "update gain" in printed
    assert "where replicas could idle for as long as what may train early takes" in printed
    rows = {row["policy"]: row for row in json.loads(out.read_text())["tail_training"]}
    assert rows["none"]["hidden_share"] == 0
    assert rows["none"]["gain"] == pytest.approx(1)
    row = rows["adaptive"]
    assert row["hidden_share"] > 0.4
    left_s = row["training_s"] - row["hidden_share"] * row["first_step_s"] / 4
    assert row["gain"] == pytest.approx((row["plain_rollout_s"] + row["training_s"]) / (row["rollout_s"] + left_s))
    assert row["gain"] > 1
    hidden = {}
    for factors in ("2", "1.1"):
        assert main([*command, *tail, "--train-stages", "4", "--tail-sharing", factors, factors]) == 0
        hidden[factors] = {row["policy"]: row for row in json.loads(out.read_text())["tail_training"]}["adaptive"]
    assert hidden["2"]["hidden_share"] == 0, "a pipeline over all devices, whose time is split"
    assert hidden["1.1"]["hidden_share"] > 0.4
    assert hidden["1.1"]["gain"] > 1
    assert "where replicas could" not in capsys.readouterr().out, "a pipeline over all devices never could"
    assert main([*command, *tail, "--train-stages", "3"]) == 2
    assert "replicas of 3 devices do not divide 4: choose a divisor" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--tail-training", "actor"])
    assert main([*command, "--tail-training", "critic", "--train-token-s", "0"]) == 2
    assert "training on a token takes 0.0 s: give --train-token-s, above 0" in capsys.readouterr().err


def test_says_what_drafts_bring(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain_out, out = tmp_path / "plain.json", tmp_path / "out.json"
    command = ["simulate", "--lengths", str(trace), "--devices", "4", "--batch", "16", "--policy", "adaptive"]
    assert main([*command, "--json", str(plain_out)]) == 0
    assert "drafts" not in capsys.readouterr().out
    drafts = ["--speculation", "int8", "--acceptance", "0.9", "--draft-share", "0.4"]
    assert main([*command, *drafts, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "drafts: 0.9 of tokens are right, a step takes 0.4 of the model's; tokens drafted in batches" in printed
    assert "no drafts" in printed

    plain, written = (json.loads(path.read_text()) for path in (plain_out, out))
    assert written["costs"]["speculation"] | {"acceptance": 0.9, "draft_share": 0.4} == written["costs"]["speculation"]
    seconds = {row["policy"]: row["simulated_seconds"] for row in written["rows"]}
    plain_s = {row["policy"]: row["simulated_seconds"] for row in plain["rows"]}
    for row in written["speculation"]:
        assert (row["plain_s"], row["seconds"]) == (plain_s[row["policy"]], seconds[row["policy"]])
        assert row["gain"] == pytest.approx(row["plain_s"] / row["seconds"])
        assert row["gain"] > 1.05

    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps(written["costs"]))
    assert main([*command, "--costs", str(costs), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["rows"] == written["rows"]


def test_several_traces_and_maxima_make_a_table(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, out = tmp_path / "others.csv", tmp_path / "out.json"
    other.write_text(trace.read_text())
    command = ["simulate", "--lengths", str(trace), str(other), "--max-tokens", "20", "60", "--devices", "4"]
    assert main([*command, "--batch", "16", "--policy", "adaptive", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "max tokens" in printed
    assert "G generates" not in printed

    rows = json.loads(out.read_text())["rows"]
    settings = [(row["lengths"], row["max_tokens"]) for row in rows if row["policy"] == "none"]
    assert settings == [("lengths", 20), ("lengths", 60), ("others", 20), ("others", 60)]
    gains = [row["gain"] for row in rows if row["policy"] == "adaptive"]
    assert gains[:2] == gains[2:]
    for known in (row for row in rows if row["policy"] == "known"):
        others = [row for row in rows if (row["lengths"], row["max_tokens"]) == (known["lengths"], known["max_tokens"])]
        assert known["simulated_seconds"] == min(row["simulated_seconds"] for row in others)


def test_names_of_traces_are_no_markup(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = tmp_path / "[red]x[ red] [\x1b].csv"
    odd.write_text(trace.read_text())
    command = ["simulate", "--lengths", str(odd), str(trace), "--devices", "2", "--batch", "8", "--policy", "none"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "[red]x" in printed
    assert "\x1b" not in printed


def test_pictures_and_tables_call_policies_alike(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.svg"
    assert main(["simulate", "--lengths", str(trace), "--devices", "2", "--batch", "8", "--svg", str(out)]) == 0
    printed = capsys.readouterr().out
    for name in ("none", "threshold", "adaptive"):
        assert re.search(rf"\n +{name} ", printed)
        assert f">{name}" in out.read_text()


def test_two_runs_write_the_same(trace: Path, tmp_path: Path) -> None:
    outs = [tmp_path / name for name in ("a.json", "b.json")]
    for out in outs:
        assert main(["simulate", "--lengths", str(trace), "--devices", "2", "--batch", "8", "--json", str(out)]) == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_a_prompts_past_is_used(tmp_path: Path) -> None:
    """All that tells the long samples is that their prompt was long before: knowing it must not be worth nothing."""
    rows = [(f"p{index % 8}", 400 if index % 8 == 0 else 20) for index in range(64)]
    seconds = []
    for header, with_id in (("prompt_id,output_tokens", True), ("output_tokens", False)):
        path = tmp_path / "lengths.csv"
        lines = [f"{prompt},{tokens}" if with_id else str(tokens) for prompt, tokens in rows]
        path.write_text("\n".join([header, *lines]) + "\n")
        out = tmp_path / "out.json"
        command = ["simulate", "--lengths", str(path), "--devices", "2", "--batch", "8", "--costs", "small-cpu"]
        assert main([*command, "--policy", "adaptive", "--json", str(out)]) == 0
        (row,) = [row for row in json.loads(out.read_text())["rows"] if row["policy"] == "adaptive"]
        seconds.append(row["simulated_seconds"])
    assert seconds[0] < seconds[1]


def test_costs_come_from_a_file(trace: Path, tmp_path: Path) -> None:
    costs, out = tmp_path / "costs.json", tmp_path / "out.json"
    costs.write_text(json.dumps(costs_to_json(SMALL_CPU)))
    command = ["simulate", "--lengths", str(trace), "--devices", "2", "--batch", "8", "--no-transfer"]
    assert main([*command, "--costs", str(costs), "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["costs"] == costs_to_json(SMALL_CPU)
    assert written["options"]["can_transfer"] is False


@pytest.mark.parametrize(
    ("content", "options", "line"),
    [
        ("length\n3\n", [], "has no column output_tokens: its columns are length"),
        ("", [], "has no column output_tokens: its columns are none"),
        ("output_tokens\n", [], "has 0 rows, and 512 responses are needed: lower --batch"),
        ("output_tokens\n5\nmany\n", [], "line 3: output_tokens is 'many', not a whole number"),
        ("output_tokens\n5\n", [], "has 1 rows, and 512 responses are needed: lower --batch"),
        ("output_tokens\n5\n", ["--batch", "0"], "--batch is 0: it must be at least 1"),
        ("output_tokens\n5\n", ["--batch", "1", "--max-tokens", "0"], "--max-tokens is 0"),
        ("output_tokens\n5\n", ["--batch", "1", "--kv-tokens", "9"], "may need 133 tokens of KV"),
        ("output_tokens\n5\n", ["--acceptance", "0.9"], "--acceptance says what drafts are like: give --speculation"),
        (
            "output_tokens\n5\n",
            ["--speculation", "ngram", "--acceptance", "2"],
            "acceptance is 2.0: a chance is 0 to 1",
        ),
        ("output_tokens\n5\n", ["--batch", "1", "--costs", "h1000"], "--costs h1000 is neither a file nor one of"),
    ],
)
def test_bad_input_is_one_line(
    content: str, options: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text(content)
    assert main(["simulate", "--lengths", str(path), *options]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_an_unknown_policy_is_one_line(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["simulate", "--lengths", str(trace), "--policy", "none,best"])
    assert exit_info.value.code == 2
    assert "unknown policy 'best': use none, threshold, adaptive" in capsys.readouterr().err


def test_an_absent_trace_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--lengths", str(tmp_path / "absent.csv")]) == 2
    assert "No such file or directory" in capsys.readouterr().err
