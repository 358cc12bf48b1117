"""An engine in another process answers as it would here, and its end is noticed."""

from __future__ import annotations

import os
import signal
from functools import partial

import psutil
import pytest

from fuse.engines.engine import GeneratedToken, GenerationRequest, SamplingParams
from fuse.engines.replay import ReplayEngine

from ..engines.engine_process import DistantEngine

REQUEST = GenerationRequest(
    sample_id=0, prompt_ids=(1,), params=SamplingParams(seed=0, temperature=1.0, max_new_tokens=2)
)


def test_calls_are_answered_errors_raised_and_the_end_noticed() -> None:
    core = max(os.sched_getaffinity(0))
    with DistantEngine(partial(ReplayEngine, {0: ([4, 6], [-1.0, -3.0])}), core=core) as engine:
        process = psutil.Process(engine.process_id)
        assert process.cpu_affinity() == [core]
        engine.submit(REQUEST)
        with pytest.raises(ValueError, match="sample 0 is already in the engine") as refusal:
            engine.submit(REQUEST)
        assert "replay.py" in refusal.value.__notes__[0], "where it was raised"
        assert engine.step() == [GeneratedToken(0, 4, -1.0, False)]
        engine.admit(engine.evict(0))
        assert engine.step() == [GeneratedToken(0, 6, -3.0, True)]

        engine.restart(partial(ReplayEngine, {0: ([8], [-1.0])}))
        engine.submit(REQUEST)
        assert engine.step() == [GeneratedToken(0, 8, -1.0, True)]

        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="process has ended with exit code -9"):
            engine.step()
    assert not process.is_running()
