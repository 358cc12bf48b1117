"""`fuse bench kernels` writes complete rows, for the kernels asked for."""

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch

from fuse.benchmarks.kernels import cases, command
from fuse.benchmarks.kernels.adapters import lora_cases
from fuse.benchmarks.kernels.rows import Case, Rates, roofline_ms
from fuse.benchmarks.kernels.schedules import schedule_cases

KEYS = {
    "kernel", "pass", "shape", "dtype", "implementation", "reference", "ms", "reference_ms", "peak_bytes",
    "reference_peak_bytes", "result_bytes", "bytes_moved", "flops", "roofline_ms", "roofline_share", "instructions",
    "instructions_note",
}  # fmt: skip
RATES = Rates(copy_bytes_per_s=1e9, product_flops_per_s={torch.float32: 1e12, torch.bfloat16: 4e12})
SMALL = {
    "gae": (
        partial(cases.gae_cases, num_samples=3, max_tokens=5),
        partial(cases.shaped_gae_cases, num_samples=3, max_tokens=5),
    ),
    "sample_tokens": (partial(cases.sample_cases, rows=2, vocab_size=9),),
    "decode_attention": (partial(cases.decode_attention_cases, rows=2, kv_heads=1, context=9, head_dim=8),),
    "layer_steps": (partial(cases.layer_steps_cases, samples=1, tokens=3, width=8, head_dim=4),),
    "lora": (partial(lora_cases, hidden_size=8, intermediate_size=12),),
    "kv_blocks": (partial(cases.kv_blocks_cases, num_layers=2, num_tokens=3, head_dim=4),),
    "schedules": (partial(schedule_cases, num_ranks=2, num_micro_batches=2),),
    "skinny_linear": (partial(cases.skinny_linear_cases, outs=5, width=8),),
    "quantized_linear": (partial(cases.quantized_linear_cases, outs=5, width=8),),
    "suffix_index": (partial(cases.suffix_index_cases, batches=(3,), context=5),),
    "linear_logprob": (
        partial(cases.linear_logprob_cases, num_tokens=5, vocab_size=40, hidden_size=8),
        partial(cases.linear_logprob_cases, num_tokens=5, vocab_size=40, hidden_size=8, dtype=torch.bfloat16),
    ),
}


@pytest.fixture(autouse=True)
def few_to_collect():
    """Every measured peak collects garbage first: let it look at none of what the tests before have made."""
    gc.freeze()
    yield
    gc.unfreeze()


VALGRIND = """#!/bin/sh
# Of `... schedule_calls RANKS MICRO_BATCHES EVALUATIONS STEPS`: 1,000 to start, 30 an evaluation, 7 a step.
for last do evaluations=$steps steps=$last; done
echo "==1== Collected : $((1000 + 30 * evaluations + 7 * steps))" >&2
"""


def stand_in(program: str, tmp_path, monkeypatch) -> None:
    """Put a valgrind first on the path."""
    path = tmp_path / "bin" / "valgrind"
    path.parent.mkdir()
    path.write_text(program)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")


def measure(arguments: list[str], tmp_path, monkeypatch) -> dict:
    assert command.CASES.keys() == SMALL.keys()
    monkeypatch.setattr(command, "CASES", SMALL)
    monkeypatch.setattr(command, "measure_rates", lambda: RATES)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    path = tmp_path / "out.json"
    assert command.run(parser.parse_args(["--repeats", "2", "--json", str(path), *arguments])) == 0
    return json.loads(path.read_text())


def test_writes_complete_rows_of_every_kernel(tmp_path, monkeypatch, capsys):
    stand_in(VALGRIND, tmp_path, monkeypatch)
    results = measure([], tmp_path, monkeypatch)
    assert results["machine"]["num_cores"] >= 1
    assert results["machine"]["copy_bytes_per_s"] == 1e9
    found = {}
    for row in results["rows"]:
        assert row.keys() == KEYS
        assert row["implementation"].startswith("native") or row["kernel"] == "lora"  # torch both ways
        assert row["ms"] > 0
        assert row["reference_ms"] > 0
        if row["kernel"] not in ("local_search", "suffix_index"):
            assert row["roofline_share"] == pytest.approx(row["roofline_ms"] / row["ms"])
        found.setdefault(row["kernel"], []).append((row["pass"], row["dtype"], row["reference"]))
    assert found.keys() == {
        "gae", "shaped_gae", "sample_tokens", "decode_attention", "kv_gather", "kv_scatter", "linear_logprob",
        "rms_norm", "rotary", "swiglu", "skinny_linear", "int8_linear", "int4_linear", "suffix_index", "lora",
        "schedule_evaluation", "local_search",
    }  # fmt: skip
    references = ("log_softmax and gather", "checkpointed chunks")
    passes = ("forward", "forward_backward")
    dtypes = ("float32", "bfloat16")
    expected = [(name, dtype, reference) for dtype in dtypes for name in passes for reference in references]
    assert found["linear_logprob"] == expected
    assert len(capsys.readouterr().out.splitlines()) == len(results["rows"])


def test_measures_the_kernels_asked_for(tmp_path, monkeypatch):
    (row,) = measure(["--kernels", "sample_tokens"], tmp_path, monkeypatch)["rows"]
    assert (row["kernel"], row["shape"], row["dtype"]) == ("sample_tokens", [2, 9], "float32")


def test_the_roofline_is_the_slower_of_moving_and_multiplying():
    nothing = {"kernel": "", "shape": [], "result_bytes": 0, "implementation": "", "function": int, "references": {}}
    moving = Case(bytes_moved=2_000_000, flops=10**9, **nothing)
    multiplying = Case(dtype=torch.bfloat16, bytes_moved=1, flops=10**10, **nothing)
    assert roofline_ms(moving, RATES) == pytest.approx(2.0)
    assert roofline_ms(multiplying, RATES) == pytest.approx(2.5)


def test_counts_what_calls_add_to_a_process(tmp_path, monkeypatch, capsys):
    stand_in(VALGRIND, tmp_path, monkeypatch)
    evaluation, step = measure(["--kernels", "schedules"], tmp_path, monkeypatch)["rows"]
    assert (evaluation["kernel"], evaluation["instructions"], evaluation["roofline_ms"] > 0) == (
        "schedule_evaluation", 30, True,
    )  # fmt: skip
    assert (step["kernel"], step["instructions"], step["roofline_ms"]) == ("local_search", 7, None)
    assert "30 instructions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "note"),
    [(None, "is not installed"), ("#!/bin/sh\necho 'no such tool' >&2\nexit 1\n", "valgrind failed: no such tool")],
)
def test_says_why_no_instructions_were_counted(program, note, tmp_path, monkeypatch, capsys):
    if program is None:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    else:
        stand_in(program, tmp_path, monkeypatch)
    for row in measure(["--kernels", "schedules"], tmp_path, monkeypatch)["rows"]:
        assert row["instructions"] is None
        assert note in row["instructions_note"]
    assert "no instructions counted (valgrind" in capsys.readouterr().out


def test_what_callgrind_runs_starts_without_torch():
    program = "import sys; from fuse.benchmarks.schedule_calls import main; main(2, 2, 3, 5); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "schedules._native" in modules
    assert "torch" not in modules
