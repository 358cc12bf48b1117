"""The oracle's runs, computed once per session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from peft import get_peft_model

from fuse.intrastage.adapters import base_of

from .cases import Case, build_models, draw_adapters, peft_config
from .oracle import Recording, record


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Recording]:
    @cache
    def checked(case: Case) -> Recording:
        recording = record(case, tmp_path_factory.mktemp(f"oracle-{case.name}"))
        _assert_weights_move(case, recording)
        return recording

    return checked


def _assert_weights_move(case: Case, recording: Recording) -> None:
    """Far beyond the tolerance of what is compared with them."""
    initial, config = build_models(case), peft_config(case)
    policy = initial.policy if config is None else get_peft_model(initial.policy, config)
    draw_adapters(policy)
    for before, after in ((base_of(policy), recording.policy), (initial.value, recording.value)):
        assert max((after[name] - weight).abs().max().item() for name, weight in before.state_dict().items()) > 1e-3
