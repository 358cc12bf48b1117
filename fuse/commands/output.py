"""Files that commands write: named before hours are spent on their contents, and written whole."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from schedules.files import write_whole


def output_file(text: str) -> Path:
    """Type of an option that names a file to write: its directory must exist before hours are spent on the contents."""
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"directory {path.parent} does not exist: create it first")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a directory: name a file")
    return path


def write_json(path: str | Path, results: object) -> None:
    """Write `results` as JSON: the whole file or none of it."""
    write_whole(Path(path), json.dumps(results, indent=2) + "\n")
