"""`fuse bench gpu`: its CPU form where little more than torch and transformers is installed, and its failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fuse.benchmarks.gpu import command, kernels, runner, sanitizer
from fuse.benchmarks.gpu.setup import Row, Setup, setup_of

ABSENT = ("ray", "ortools", "megatron", "vllm", "datasets", "accelerate", "trl")
PROGRAM = f"""
import sys
class Without:
    def __init__(self, finder):
        self._finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT} else self._finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self._finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
from fuse.benchmarks.gpu import command
from fuse.cli import main
command.LIMITS_S = dict.fromkeys(command.LIMITS_S, 800.0)  # of a machine that may be busy
status = main()
assert not set({ABSENT}) & set(sys.modules)
sys.exit(status)
"""
SKIPPED = {"compute-sanitizer", "peak bytes, generation", "peak bytes, inference", "peak bytes, training"}
PASSED = {
    "kernel sample_tokens, float32",
    "kernel sample_tokens, bfloat16",
    "kernel gae",
    "kernel shaped_gae",
    "kernel linear_logprob, float32",
    "kernel linear_logprob, bfloat16",
    "kernel int8_linear, float32",
    "kernel int4_linear, float32",
    "kernel kv_gather",
    "kernel kv_scatter",
    "sleep gives back",
    "tokens after sleep",
    "packed training, float32",
    "packed training, bfloat16",
    "weight sync",
    "fused steps of two ranks",
    "decode, 2 rows",
    "training beside 4 samples",
    "PPO ratio, first epoch",
    "3 PPO updates",
}
TINY = setup_of("cpu")


@pytest.mark.slow
@pytest.mark.processes
def test_all_checks_pass_on_a_cpu_without_ray(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    options = ["bench", "gpu", "--device", "cpu", "--limit-s", "800", "--json", str(found)]
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, *options], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert process.returncode == 0, process.stdout + process.stderr
    results = json.loads(found.read_text())
    by_mark = {mark: {row["name"] for row in results["rows"] if row["ok"] is mark} for mark in (True, False, None)}
    assert by_mark == {True: PASSED, False: set(), None: SKIPPED}
    assert results["machine"]["packages"]["torch"]
    assert all(name in process.stdout for name in PASSED | SKIPPED)


def waits_with_a_child(setup: Setup, write: int) -> Iterator[Row]:
    """Tells a row when another process has the end of the pipe too, and waits for it, which does not end."""
    child = subprocess.Popen(["sleep", "1000"], pass_fds=[write])
    yield Row(name="started", ok=True)
    child.wait()


@pytest.mark.processes
def test_a_check_is_ended_with_all_that_it_started() -> None:
    read, write = os.pipe()
    rows = runner.run("slow", lambda setup: waits_with_a_child(setup, write), TINY, 1000.0)
    assert next(rows).name == "started"
    os.close(write)
    rows.close()  # type: ignore[attr-defined]
    assert os.read(read, 1) == b"", "until the last process that can write has ended"
    os.close(read)


@pytest.mark.processes
def test_a_check_that_takes_too_long_fails() -> None:
    (row,) = runner.run("slow", lambda setup: iter(int, 1), TINY, 0.0)
    assert (row.name, row.ok) == ("slow", False)
    assert row.detail == "took longer than 0 s and was ended"


def tells_and_raises(setup: Setup) -> Iterator[Row]:
    yield Row(name="first", ok=True)
    raise RuntimeError("it broke")


def tells_and_dies(setup: Setup) -> Iterator[Row]:
    yield Row(name="first", ok=True)
    os._exit(3)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("check", "reason"), [(tells_and_raises, "RuntimeError: it broke"), (tells_and_dies, "ended before it was done")]
)
def test_a_check_that_breaks_fails_and_keeps_what_it_told(check: Any, reason: str) -> None:
    first, second = runner.run("breaks", check, TINY, 1000.0)
    assert (first.name, first.ok) == ("first", True)
    assert (second.name, second.ok) == ("breaks", False)
    assert reason in second.detail


@pytest.mark.parametrize(
    ("implementation", "difference", "ok"),
    [("native CUDA", 0.5, True), ("native CUDA", 2.0, False), ("torch reference: not built", 0.0, False),
     ("native CUDA", float("nan"), False)],
)  # fmt: skip
def test_a_kernel_passes_if_it_is_native_and_right(
    monkeypatch: pytest.MonkeyPatch, implementation: str, difference: float, ok: bool
) -> None:
    case = kernels.Case(
        name="one", implementation=implementation, kernel=lambda: None, reference=lambda: None,
        difference=lambda ours, theirs: difference, bound=1.0,
    )  # fmt: skip
    monkeypatch.setattr(kernels, "cases", lambda device, small: iter([case]))
    (row,) = kernels.check(TINY)
    assert row.ok is ok


STAND_IN = """#!/bin/sh
echo "========= ERROR SUMMARY: {errors} errors"
exit {status}
"""


@pytest.mark.processes
@pytest.mark.parametrize(
    ("errors", "status", "ok"), [("0", 0, True), ("2", 86, False), ("Device not supported", 1, None)]
)
def test_what_a_sanitizer_finds_fails(
    errors: str, status: int, ok: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(STAND_IN.format(errors=errors.lower(), status=status))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    rows = list(sanitizer.check(setup_of("cuda")))
    assert [row.name for row in rows] == [f"compute-sanitizer {tool}" for tool in sanitizer.TOOLS]
    assert {row.ok for row in rows} == {ok}
    assert all(errors.lower() in row.measured for row in rows)


@pytest.mark.parametrize(
    ("needed", "refusal"),
    [({"no-such-package": (1, 0)}, "no-such-package is not installed"), ({"numpy": (99, 0)}, "needs 99.0 or later")],
)
def test_packages_that_lack_are_named_first(
    monkeypatch: pytest.MonkeyPatch, needed: dict[str, tuple[int, int]], refusal: str
) -> None:
    monkeypatch.setattr(command, "_NEEDED", needed)
    with pytest.raises(ValueError, match=refusal):
        command._check_packages()
