"""`fuse bench speculation` writes one complete row per batch and draft, and sees a token that differs."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import pytest

from fuse.benchmarks.speculation import command, rollouts
from fuse.benchmarks.speculation.command import _Decoded
from fuse.engines.quantized_draft import QuantizedSelf


def run(*options: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(["--vocab-size", "50", "--repeats", "1", *options]))


def test_writes_a_row_per_batch_and_draft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    assert run("--batches", "1", "3", "--new-tokens", "12", "--prompt-tokens", "5", "--json", str(path)) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["batch"], row["draft"]) for row in rows] == list(product((1, 3), ("int8", "int4", "ngram")))
    for row in rows:
        assert row["ratio"] == pytest.approx(row["plain_seconds"] / row["seconds"])
        assert row["num_tokens"] == 12 * row["batch"]
        assert 1 <= row["tokens_per_step"] <= 9
        assert 0 <= row["right"] <= 1
    assert "int8, batch 3: " in capsys.readouterr().out


def test_more_samples_than_are_decoded_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    options = ["--batches", "2", "--prompts", "5", "--drafts", "ngram", "--new-tokens", "6", "--warmup", "0"]
    assert run(*options, "--json", str(path)) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["batch"], row["num_tokens"]) == (2, 30)


@pytest.mark.parametrize("is_exact", [True, False])
def test_agreement_is_of_all_tokens_in_every_place(
    is_exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A draft that is the model is always right if it reads all keys, and as often in a window until that is full."""
    if is_exact:
        monkeypatch.setattr(QuantizedSelf, "prepare", lambda draft: setattr(draft, "_decoder", draft._target))
    path = tmp_path / "out.json"
    options = ["--agreement", "0", "600", "--drafts", "int8", "--prompts", "2", "--new-tokens", "38"]
    assert run(*options, "--prompt-tokens", "9", "--json", str(path)) == 0
    rows = {(row["keys"], row["to_tokens"]): row for row in json.loads(path.read_text())["rows"]}
    assert {most for _, most in rows} == {16, 32, 64, 1024}
    for keys in ("all", "window"):
        drafted = {most: row["num_drafted"] for (own, most), row in rows.items() if own == keys}
        assert sum(drafted.values()) == 2 * 2 * (8 + 8 + 8 + 8 + 1), "of nine tokens eight, and one of the last two"
        assert drafted[1024] == sum(drafted.values()) / 2
    assert all(rows["all", most]["right"] == rows["window", most]["right"] for most in (16, 32, 64))
    assert not is_exact or all(rows["all", most]["right"] == 1 for most in (16, 32, 64, 1024))
    assert not is_exact or rows["window", 1024]["right"] < 1
    assert all(row["right"] > 0.5 for row in rows.values())
    assert "int8, window of 513 to 1024 keys: " in capsys.readouterr().out


def test_agreement_of_what_reads_no_keys_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a model is loaded."""
    monkeypatch.delattr(command, "causal_model")
    with pytest.raises(ValueError, match="--agreement is of drafts that are the model itself: name one with --drafts"):
        run("--agreement", "0", "--drafts", "ngram")


def test_whole_rollouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pooled_workers: None
) -> None:
    monkeypatch.setattr(rollouts, "local_cluster", lambda *_: nullcontext())  # the pool has one
    path = tmp_path / "out.json"
    options = ["--devices", "2", "--batches", "6", "--drafts", "int8", "--new-tokens", "30", "--prompt-tokens", "5"]
    assert run(*options, "--json", str(path)) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["draft"], row["devices"], row["batch"], row["num_tokens"]) == ("int8", 2, 6, 180)
    assert 0 < row["generation_seconds"] <= row["seconds"]
    assert row["ratio"] == pytest.approx(row["plain_seconds"] / row["seconds"])
    assert 1 <= row["tokens_per_step"] <= 9
    steps = [count for count, _ in row["steps_by_batch"].values()]
    assert row["drafted_steps"] == sum(drafted for _, drafted in row["steps_by_batch"].values()) / sum(steps)
    said = capsys.readouterr()
    assert "int8, 6 samples on 2 devices: " in said.out
    assert [line.partition(":")[0] for line in said.err.splitlines() if line.endswith(" s")] == ["off", "int8"] * 2


def test_steps_with_drafts_are_told_by_batch() -> None:
    steps, drafted = Counter({1: 40, 2: 10, 3: 5, 4: 5, 7: 20}), Counter({1: 30, 3: 5, 4: 2})
    assert rollouts._by_batch(steps, drafted) == "75% of 1, 0% of 2, 70% of 3 to 4, 0% of 7 samples"


def test_a_token_that_differs_is_seen() -> None:
    plain, other = (_Decoded({0: [1, token_id]}, 1.0, 1, 0) for token_id in (2, 3))
    with pytest.raises(AssertionError, match="int8 at batch 1 has changed tokens"):
        command._row("int8", 1, [other], [plain])
