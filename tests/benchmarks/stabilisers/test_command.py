"""`fuse bench stabilisers` says what it needs, and does not mix runs of different lengths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fuse.cli import main


def test_a_recipe_that_is_not_there_is_named_with_the_command_that_makes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "stabilisers", "--recipe", str(tmp_path)]) == 2
    made_by = f"make it by `fuse recipe --demo --output-dir {tmp_path} --steps sft reward`"
    assert made_by in capsys.readouterr().err


def test_rows_of_other_lengths_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("sft", "reward", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "data" / "rl_held_out.jsonl").write_text("")
    known = tmp_path / "known.json"
    known.write_text(json.dumps({"options": {"updates": 3}, "rows": []}))
    assert main(["bench", "stabilisers", "--recipe", str(tmp_path), "--updates", "4", "--json", str(known)]) == 2
    assert "has runs of 3 updates: name another file" in capsys.readouterr().err
