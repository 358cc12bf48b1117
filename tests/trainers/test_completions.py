"""Completions of evaluation prompts: printed, and given to TensorBoard and Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from transformers.integrations import TensorBoardCallback, WandbCallback

from fuse.sample import Sample
from fuse.trainers.completions import show_completions

from . import tiny


class Wandb(WandbCallback):
    """Without the package, whose table is what it is made of."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self._wandb = SimpleNamespace(run=object(), log=self.logged.append, Table=lambda **table: table)


def samples(count: int) -> list[Sample]:
    return [
        Sample(id=index, prompt_ids=(2, 3 + index), response_ids=[2, 1, 0], length=2, score=index / 4)
        for index in range(count)
    ]


def test_tables_say_after_which_update(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wandb, tensorboard = Wandb(), TensorBoardCallback(SummaryWriter(str(tmp_path)))
    show_completions(tiny.tokenizer(), samples(7), 12, [tensorboard, wandb])
    tensorboard.tb_writer.close()

    printed = [line for line in capsys.readouterr().out.splitlines() if "12" in line]
    assert len(printed) == 5
    assert [cell.strip() for cell in printed[1].strip("│").split("│")] == ["12", "a c", "a <eos>", "0.25"]

    (logged,) = wandb.logged
    assert logged["train/global_step"] == 12
    assert logged["completions"]["columns"] == ["step", "query", "model response", "score"]
    assert logged["completions"]["data"][6] == [12, "a h", "a <eos>", 1.5]

    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    (event,) = accumulator.Tensors("completions/text_summary")
    lines = event.tensor_proto.string_val[0].decode().splitlines()
    assert event.step == 12
    assert (lines[0], len(lines)) == ("| step | query | model response | score |", 2 + 7)
    assert lines[3] == "| 12 | a c | a <eos> | 0.25 |"


def test_callbacks_that_log_nothing_get_nothing() -> None:
    wandb = Wandb()
    wandb._wandb.run = None
    show_completions(tiny.tokenizer(), samples(1), 0, [wandb, TensorBoardCallback()])
    assert wandb.logged == []
