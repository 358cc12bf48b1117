"""The smallest examples learn."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("example", ["ppo", "grpo"])
def test_the_smallest_run_learns(
    example: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    pooled_workers: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")
    first, last = map(float, re.findall(r"(\d\.\d\d) in the", capsys.readouterr().out.splitlines()[-1]))
    assert last > first + 0.3
