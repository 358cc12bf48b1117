"""Which tokens end a response, of tokenizer and model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from fuse.trainers.special_tokens import special_tokens

from . import tiny


@pytest.mark.parametrize(
    ("options", "of_model", "eos", "stop"),
    [
        ({"stop_token": None}, [5, 6], (1,), ()),
        ({"stop_token": "none"}, [5, 6], (1,), ()),
        ({"stop_token": "eos"}, [5, 6], (1,), (1,)),
        ({"stop_token": "model"}, [5, 6], (5, 6, 1), (5, 6, 1)),
        ({"stop_token": "model"}, [5, 1], (5, 1), (5, 1)),
        ({"stop_token": "model"}, 7, (7, 1), (7, 1)),
        ({"stop_token": "model"}, None, (1,), (1,)),
        ({"stop_token": None, "stop_token_id": 9}, [5, 6], (1,), (9,)),
    ],
)
def test_stop_tokens(
    options: dict[str, Any], of_model: Any, eos: tuple[int, ...], stop: tuple[int, ...], tmp_path: Path
) -> None:
    policy = tiny.policy()
    policy.generation_config = GenerationConfig(eos_token_id=of_model)
    tokens = special_tokens(tiny.config(tmp_path, **options), tiny.tokenizer(), policy)
    assert (tokens.pad, tokens.eos, tokens.stop, tokens.num_tokens) == (0, eos, stop, None)


@pytest.mark.parametrize("stop_token", ["eos", "model"])
def test_no_end_is_refused(stop_token: str, tmp_path: Path) -> None:
    tokenizer, policy = tiny.tokenizer(), tiny.policy()
    tokenizer.eos_token = None
    policy.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=f"stop_token='{stop_token}' but the tokenizer has no end-of-sequence token"):
        special_tokens(tiny.config(tmp_path, stop_token=stop_token), tokenizer, policy)


def test_a_padded_vocabulary_is_known_but_in_trls_layout(tmp_path: Path) -> None:
    policy = tiny.policy(vocab_size=40)
    for quirks, expected in ((False, len(tiny.VOCABULARY)), (True, None)):
        found = special_tokens(tiny.config(tmp_path), tiny.tokenizer(), policy, samples_padding=quirks)
        assert found.num_tokens == expected
