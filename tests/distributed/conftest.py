"""What programs measured, of which all that the session's tests ask for run in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .programs import NAMES, run_programs

Measured = Callable[[str], Path]


@pytest.fixture(scope="session")
def measured_by(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Where a program has measured."""
    asked = {
        getattr(item.module, "PROGRAM", None) for item in request.session.items if isinstance(item, pytest.Function)
    }
    directory = tmp_path_factory.mktemp("programs")
    run_programs([name for name in NAMES if name in asked], directory)
    return lambda name: directory / name
