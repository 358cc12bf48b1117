"""The moving average of a model's weights that its stages keep, against one process with torch's AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fuse.intrastage.optimizer import AVERAGE, AdamWConfig, ModelOptimizer
from fuse.intrastage.transformers_stage import TransformersStage
from fuse.micro_batch import Metrics, MicroBatch
from fuse.training.state import load_state, save_state

from ..tiny_models import build, language_model

MODEL = language_model("qwen2", tie_word_embeddings=True, num_hidden_layers=3)
BATCH = MicroBatch(input_ids=torch.tensor([[3, 1, 4, 1, 5]]), head_index=torch.arange(5), targets=None)
DECAY, RATE, NUM_STEPS = 0.75, 0.01, 3


def loss(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
    return head(hidden).square().mean(), {}


class Staged:
    """A model in stages, which trains and averages."""

    def __init__(
        self, num_stages: int, *, seed: int = 0, decay: float | None = DECAY, frozen: frozenset[str] = frozenset()
    ) -> None:
        self.stages = {
            (0, number): TransformersStage(*MODEL, stage=number, num_stages=num_stages, loss=loss)
            for number in range(num_stages)
        }
        for stage in self.stages.values():
            stage.freeze(frozen)
        self.optimizer = ModelOptimizer(
            "actor", self.stages, None, AdamWConfig(eps=1e-3), frozen=frozen, average_decay=decay
        )
        for stage in self.stages.values():  # after the optimizer is made, as in a run
            stage.load_state_dict(build(MODEL, seed=seed).state_dict())

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            hidden = grad = None
            for stage in self.stages.values():
                hidden = stage.forward(0, BATCH, hidden)
            for stage in reversed(self.stages.values()):
                grad = stage.backward(0, grad)
            self.optimizer.step(RATE)


def averaged_in_one_process(frozen: frozenset[str] = frozenset()) -> dict[str, Tensor]:
    model = build(MODEL).eval()
    parameters = {name: one for name, one in model.named_parameters() if name not in frozen}
    adamw = torch.optim.AdamW(parameters.values(), lr=RATE, weight_decay=0.0, eps=1e-3)
    average = {name: one.detach().clone() for name, one in parameters.items()}
    for _ in range(NUM_STEPS):
        adamw.zero_grad()
        loss(model.model(BATCH.input_ids).last_hidden_state.flatten(0, 1), model.lm_head, BATCH)[0].backward()
        adamw.step()
        average = {name: DECAY * average[name] + (1 - DECAY) * one.detach() for name, one in parameters.items()}
    return average


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, atol: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, one in found.items():
        torch.testing.assert_close(one, expected[name], rtol=0, atol=atol)


@pytest.mark.parametrize("num_stages", [1, 3])
@pytest.mark.parametrize("frozen", [frozenset(), frozenset({"model.embed_tokens.weight", "model.norm.weight"})])
def test_it_is_that_of_one_process(num_stages: int, frozen: frozenset[str]) -> None:
    """What does not train is not averaged; of a tied embedding there is one average."""
    staged = Staged(num_stages, frozen=frozen)
    staged.step(NUM_STEPS)
    expected = averaged_in_one_process(frozen)
    assert_close(staged.optimizer.export_state(AVERAGE), expected)
    weights = staged.optimizer.export_state("parameter")
    assert max(float((weights[name] - one).abs().max()) for name, one in expected.items()) > 1e-4


def test_before_the_first_step_it_is_the_weights() -> None:
    weights = {name: one.detach() for name, one in build(MODEL, seed=1).named_parameters()}
    assert_close(Staged(2, seed=1).optimizer.export_state(AVERAGE), weights, atol=0)


@pytest.mark.parametrize("saved_after", [0, 2])
def test_another_split_goes_on_with_what_was_saved(saved_after: int, tmp_path: Path) -> None:
    whole = Staged(3)
    whole.step(saved_after)
    save_state(tmp_path, {"actor": whole.optimizer})
    resumed = Staged(1, seed=1)
    load_state(tmp_path, {"actor": resumed.optimizer})
    resumed.step(NUM_STEPS - saved_after)
    whole.step(NUM_STEPS - saved_after)
    assert_close(resumed.optimizer.export_state(AVERAGE), whole.optimizer.export_state(AVERAGE))
    assert_close(resumed.optimizer.export_state(AVERAGE), averaged_in_one_process())


def test_a_run_with_one_does_not_go_on_from_a_run_without(tmp_path: Path) -> None:
    for name, decays in {"without": (None, DECAY), "with": (DECAY, None)}.items():
        save_state(tmp_path / name, {"actor": Staged(1, decay=decays[0]).optimizer})
        with pytest.raises(ValueError, match=r"actor\.average\.\S+ is .*resume with the models and configuration"):
            load_state(tmp_path / name, {"actor": Staged(1, decay=decays[1]).optimizer})
