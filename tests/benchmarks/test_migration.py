"""`fuse bench migration` writes one complete row per context length, and refuses what it cannot measure."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import pytest

from fuse.benchmarks import migration


def run(*options: str) -> int:
    parser = argparse.ArgumentParser()
    migration.add_arguments(parser)
    return migration.run(parser.parse_args(["--vocab-size", "50", "--repeats", "1", *options]))


def test_writes_a_row_per_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    assert run("--context-tokens", "8", "40", "--json", str(path)) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["context_tokens"] for row in rows] == [8, 40]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["recompute_ms"] / row["transfer_ms"])
        # 4 layers of keys and values of 4 heads of 64 in fp32, for all tokens but the one or more that were generated
        assert row["kv_bytes"] >= row["context_tokens"] * 4 * 2 * 256 * 4
        assert row["kv_transfer"] == "object_store"
    assert "transformers, 40 tokens: " in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="NIXL is not installed: make setup-vllm-cpu")
def test_puts_carriers_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    assert run("--context-tokens", "40", "--kv-transfer", "nixl", "object_store", "--json", str(path)) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["kv_transfer"] for row in rows] == ["nixl", "object_store"]
    nixl_ms, store_ms = (f"{row['transfer_ms']:.1f} ms by {row['kv_transfer']}" for row in rows)
    assert capsys.readouterr().out.endswith(f"40 tokens with KV: {nixl_ms}, {store_ms}\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--context-tokens", "0"), "must be at least 1"), (("--repeats", "0"), "must be at least 1")],
)
def test_refuses_what_it_cannot_measure(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(*options)
