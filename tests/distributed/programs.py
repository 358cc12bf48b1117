"""Programs of this folder, run beside the tests: a process can be in one world at a time.

As a program: DIRECTORY PROGRAM ..., each of which measures into DIRECTORY/PROGRAM; all in one process, as importing
takes longer than most of what they do.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

NAMES = ("world", "megatron_world", "megatron_training_world")


def run_programs(names: Sequence[str], directory: Path) -> None:
    """Have programs measure.

    Raises: RuntimeError with what they printed where one failed; those after it have not measured.
    """
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", __name__, str(directory), *names],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    if finished.returncode:
        raise RuntimeError(finished.stdout + finished.stderr)


def main(directory: Path, *names: str) -> None:
    gc.disable()  # imports leave none
    programs = {name: import_module(f"{__package__}.{name}") for name in names}
    gc.freeze()  # processes that are forked look for none there, either
    gc.enable()
    for name, program in programs.items():
        (directory / name).mkdir()
        program.main(directory / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
