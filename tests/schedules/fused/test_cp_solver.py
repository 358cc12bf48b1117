"""Solvers hear a stop, and leave signals to the program."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from schedules.fused.cp_solver import Watch

_ROOT = Path(__file__).parents[3]

_INTERRUPTED = """
import os, signal
from schedules import evaluate
from schedules.baselines import one_f_one_b, serial
from schedules.fused import cpsat, pattern, windows
from schedules.fused.solve import solve
from tests.schedules.fused.test_cpsat import OPPOSITE

def handler(*_):
    raise KeyboardInterrupt("heard")

start = serial(OPPOSITE, one_f_one_b)
makespan = evaluate(start).makespan
for name, search in {
    "shortest": lambda: cpsat.shortest(OPPOSITE, split=False, makespan=makespan, hint=start, time_limit_s=120),
    "lowest peak": lambda: cpsat.lowest_peak(OPPOSITE, split=False, makespan=makespan, below_bytes=9, time_limit_s=120),
    "shorter window": lambda: windows.shorten(start, windows.Window(0, makespan), time_limit_s=120),
    "leaner window": lambda: windows.lower_peak(start, windows.Window(0, makespan), time_limit_s=120),
    "pattern": lambda: pattern.find_pattern(OPPOSITE, time_limit_s=120),
    "portfolio": lambda: solve(OPPOSITE, time_limit_s=120),
}.items():
    signal.signal(signal.SIGINT, handler)
    found = search()
    assert found is not None
    assert name != "portfolio" or found.status == "optimal"
    assert signal.getsignal(signal.SIGINT) is handler
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    except KeyboardInterrupt as error:
        print(name, error, flush=True)
"""


@pytest.mark.processes
def test_an_interrupt_after_any_search_reaches_the_program() -> None:
    done = subprocess.run([sys.executable, "-c", _INTERRUPTED], cwd=_ROOT, capture_output=True, text=True, timeout=600)
    searches = ("shortest", "lowest peak", "shorter window", "leaner window", "pattern", "portfolio")
    assert done.stdout.splitlines() == [f"{name} heard" for name in searches], done.stderr
    assert done.returncode == 0, done.stderr


def test_solvers_are_made_in_one_place() -> None:
    makers = [path.name for path in (_ROOT / "schedules").rglob("*.py") if "CpSolver()" in path.read_text()]
    assert makers == ["cp_solver.py"]


def test_a_stop_from_before_the_search_is_heard() -> None:
    class Solver:
        """Hears nothing but the third call."""

        num_calls = 0

        def stop_search(self) -> None:
            self.num_calls += 1
            if self.num_calls == 3:
                heard.set()

    heard, answers = threading.Event(), iter([True])
    with Watch(Solver(), lambda: next(answers)):  # type: ignore[arg-type]
        assert heard.wait(60)
