"""Which variants of `fuse bench iteration` fit into memory side by side."""

from __future__ import annotations

import os

import pytest

from fuse.benchmarks.iteration import memory, rounds
from fuse.benchmarks.iteration import workload as made


def test_variants_that_do_not_fit_are_taken_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = made.embedded_models(made.SMOKE_SIZE, 16)
    figures = {"batch": 1, "mini_batches": 1, "micro_batch": 1, "epochs": 1, "max_new_tokens": 16}
    workload = made.Workload(models=models, prompts=((2,),), lengths=None, **figures)
    one = memory.fuse_bytes(workload, num_devices=2)
    trl = memory.trl_bytes(workload)
    assert 0.4e9 < trl < one < 3e9, "processes, and little else"

    def fit(available_bytes: int, *names: str) -> bool:
        monkeypatch.setattr(memory, "available_bytes", lambda: available_bytes)
        return rounds.fit(names, workload, num_devices=2)

    assert fit(2 * one, "off", "both")
    assert fit(one + trl, "off", "trl")
    assert capsys.readouterr().err == ""
    assert not fit(2 * one - 1, "off", "both")
    message = capsys.readouterr().err
    assert f"about {2 * one / 1e9:.0f} GB" in message
    assert message.endswith("one at a time\n")
    assert message.count("\n") == 1


def test_available_memory_is_that_of_this_machine() -> None:
    assert 0 < memory.available_bytes() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
