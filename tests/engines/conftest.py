"""Tiny random models, built from config: no download, and spread-out logits, so that greedy text is not constant."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import PreTrainedModel

from .. import tiny_models
from .vllm_pool import VllmPool


def build(
    architecture: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    hidden_size: int = 32,
) -> PreTrainedModel:
    """97 tokens, 256 positions, 4 heads; grouped-query attention, but for GPT-NeoX."""
    shape = {
        "vocab_size": 97,
        "hidden_size": hidden_size,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
    }
    own: dict[str, dict[str, int]] = {
        "llama": {"num_key_value_heads": 2},
        "qwen2": {"num_key_value_heads": 2},
        "qwen3": {"num_key_value_heads": 1, "head_dim": hidden_size // 2},
        "gpt_neox": {},
    }
    model: PreTrainedModel = tiny_models.build(
        tiny_models.language_model(architecture, **shape, **own[architecture]), seed=seed
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2 * (32 / hidden_size) ** 0.5)
    return model.to(dtype).eval()


@pytest.fixture
def build_model() -> Callable[..., PreTrainedModel]:
    return build


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def vllm_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmPool]:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    with VllmPool(tmp_path_factory.mktemp("vllm")) as pool:
        yield pool


@pytest.fixture
def vllm_pool(vllm_processes: VllmPool) -> VllmPool:
    vllm_processes.begin_test()
    return vllm_processes
