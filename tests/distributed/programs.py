"""Programs of this folder, run beside the tests: a process can be in one world at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_program(module: str, directory: Path, *arguments: str) -> str:
    """Have a program measure into the directory; what it printed says why something is missing there."""
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"{__package__}.{module}", str(directory), *arguments],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    return finished.stdout + finished.stderr
