"""One step in a process of its own: `python -m fuse.recipe.process FILE.json`.

The file names the step, its settings, and where its results go. Exit status: 0 done, 1 failed, 2 bad input.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

from accelerate import PartialState
from datasets import disable_progress_bars
from transformers.utils.logging import disable_progress_bar

from fuse.printable import printable
from schedules.files import write_whole

KINDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "sft": ("fuse.recipe.training:TrainingStep", "fuse.recipe.supervised:fine_tune"),
        "reward": ("fuse.recipe.training:TrainingStep", "fuse.recipe.reward:train_reward_model"),
        "comparison": ("fuse.recipe.comparison:Comparison", "fuse.recipe.comparison:compare"),
    }
)
"""What a step is told, and what does it."""


def main() -> int:
    """Run the step of the file that the command line names."""
    told = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    disable_progress_bar()
    disable_progress_bars()
    settings, work = KINDS[told["step"]]
    try:
        results = _named(work)(_named(settings)(**told["settings"]))
    except ValueError as error:
        if PartialState().is_main_process:
            print(f"{told['step']}: {printable(' '.join(str(error).split()))}", flush=True)
        return 2
    if PartialState().is_main_process:
        write_whole(Path(told["results"]), json.dumps(results) + "\n")
    return 0


def _named(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


if __name__ == "__main__":
    sys.exit(main())
