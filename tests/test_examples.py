"""The example with a real model, run as a user runs it; the smallest ones are in trainers/test_examples.py."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import uuid
from pathlib import Path
from types import ModuleType

import psutil
import pytest

GSM8K = Path(__file__).parents[1] / "examples" / "gsm8k.py"
MARK = "FUSE_TEST_RUN"


@pytest.fixture(scope="module")
def gsm8k() -> ModuleType:
    """The example, imported: nothing runs."""
    spec = importlib.util.spec_from_file_location("gsm8k", GSM8K)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_reward_is_for_the_number_and_less_for_the_form(gsm8k: ModuleType) -> None:
    scores = {
        "Ada has 3 + 4 = 7 apples.\n#### 7": 1.0,
        "#### 7\n": 1.0,
        "#### 7.0": 1.0,
        "#### 9": 0.2,
        "#### 7\n#### 9": 0.2,
        "#### 7 apples": 0.0,
        "The answer is 7.": 0.0,
        "####7": 0.0,
        "#### ,": 0.0,
        "": 0.0,
    }
    assert {response: gsm8k.score(response, "3 + 4 = 7\n#### 7") for response in scores} == scores
    assert gsm8k.score("#### -1200", "#### -1,200") == 1.0
    with pytest.raises(ValueError, match="does not end with a number"):
        gsm8k.score("#### 7", "seven")


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.usefixtures("smollm2_directory")
def test_a_real_model_is_trained(tmp_path: Path) -> None:
    options = ["--updates", "2", "--batch", "2", "--num-questions", "2", "--response-length", "8", "--devices", "2"]
    paths = ["--output-dir", str(tmp_path / "out"), "--json", str(tmp_path / "out.json")]
    mark = uuid.uuid4().hex
    ended = subprocess.run(
        [sys.executable, str(GSM8K), *options, *paths],
        env=os.environ | {MARK: mark},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert ended.returncode == 0, ended.stderr
    assert not _processes(mark)

    results = json.loads((tmp_path / "out.json").read_text())
    assert results.keys() == {"rewards", "seconds", "phases", "idle", "log_history"}
    assert len(results["rewards"]) == 2
    assert all(0 <= reward <= 1 for reward in results["rewards"])
    for entry in results["log_history"]:
        difference = entry["val/sampler_logprob_diff"]
        assert math.isfinite(difference)
        assert difference < 1e-3
    assert (tmp_path / "out" / "model.safetensors").exists()
    lines = ended.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["update", "1/2", "2/2"]
    assert "exact answers: " in ended.stdout


def _processes(mark: str) -> list[psutil.Process]:
    """Those of a run, by a variable of its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found
