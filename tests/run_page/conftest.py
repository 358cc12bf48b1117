"""A small run that nobody ran, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuse.run_page.demo import Demo, write_demo


@pytest.fixture(scope="session")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight updates on two devices, of which the last two have traces."""
    directory = tmp_path_factory.mktemp("demo")
    write_demo(directory, Demo(num_updates=8, num_devices=2, num_samples=16, num_traces=2))
    return directory
