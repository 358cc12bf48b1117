"""`fuse bench rollout` writes one complete row per mix of lengths, and refuses what it cannot measure."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import pytest

from fuse.benchmarks.rollout import command

SMALL = ["--num-samples", "5", "--batch", "2", "--context", "24", "--prompt-tokens", "4", "--vocab-size", "50",
         "--repeats", "1"]  # fmt: skip


def run(*options: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([*SMALL, *options]))


def lengths_file(path: Path, *lengths: int) -> str:
    path.write_text("prompt_tokens,output_tokens\n" + "".join(f"7,{length}\n" for length in lengths))
    return str(path)


def test_writes_a_row_per_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    chat_csv = lengths_file(tmp_path / "chat.csv", 1, 3, 200, 50, 20, 9)
    assert run("--against", "generate", "--lengths", chat_csv, "--json", str(path)) == 0
    results = json.loads(path.read_text())
    chat, uniform = results["rows"]
    assert (chat["lengths"], uniform["lengths"]) == ("chat", "uniform")
    # 5 of the 6 rows, scaled by 20 / 200: 1 (at least one), 1, 20, 5, 2.
    assert (chat["num_tokens"], chat["longest_tokens"], chat["num_samples"]) == (29, 20, 5)
    assert (uniform["num_tokens"], uniform["longest_tokens"]) == (30, 6)
    for row in (chat, uniform):
        assert (row["engine"], row["against"], row["batch"]) == ("transformers", "generate", 2)
        assert row["tokens_per_s"] == pytest.approx(row["num_tokens"] / row["seconds"])
        assert row["ratio"] == pytest.approx(row["tokens_per_s"] / row["against_tokens_per_s"])
    assert results["machine"]["num_cores"] >= 1
    assert "chat: 5 responses" in capsys.readouterr().out


def test_writes_a_row_per_mix_and_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pooled_workers: None
) -> None:
    path = tmp_path / "out.json"
    chat_csv = lengths_file(tmp_path / "chat.csv", *range(1, 41))
    assert run("--devices", "2", "--num-samples", "12", "--lengths", chat_csv, "--json", str(path)) == 0
    results = json.loads(path.read_text())
    rows = results["rows"]
    names = [(row["lengths"], row["policy"]) for row in rows]
    assert names == [(mix, policy) for mix in ("chat", "uniform") for policy in ("none", "threshold", "adaptive")]
    for row in rows:
        assert row["engine"] == "transformers"
        assert row["num_samples"] == 12
        assert 0 < row["generation_seconds"] <= row["seconds"]
        assert 0 <= row["idle_share"] < 1
        assert 0 < row["oracle_seconds"] <= 1.05 * max(one["simulated_seconds"] for one in rows)
        assert row["simulated_seconds"] > 0
    none = [row for row in rows if row["policy"] == "none"]
    assert all(row["migrations"] == 0 and row["gain"] == row["simulated_gain"] == 1 for row in none)
    assert "chat, adaptive:" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_compares_with_vllm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    assert run("--against", "vllm", "--json", str(path)) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["lengths"], row["against"]) for row in rows] == [("synthetic", "vllm"), ("uniform", "vllm")]
    assert "synthetic: 5 responses" in capsys.readouterr().out


def test_a_file_without_the_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "wrong.csv"
    path.write_text("tokens\n3\n")
    with pytest.raises(ValueError, match="no column output_tokens"):
        run("--lengths", str(path))


def test_a_short_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 2 rows, and 5 responses are needed"):
        run("--lengths", lengths_file(tmp_path / "short.csv", 1, 2))


def test_a_context_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="no room for a response"):
        run("--context", "4")
