"""The arithmetic tokenizer."""

from pathlib import Path

from transformers import AutoTokenizer

from fuse.demo.task import worked_answer
from fuse.demo.tokenizer import arithmetic_tokenizer


def test_a_token_per_character_and_back() -> None:
    tokenizer = arithmetic_tokenizer()
    text = worked_answer((7, 9, 5))
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) == len(text)
    ended = [*tokens, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode(ended, skip_special_tokens=True) == text
    assert tokenizer.unk_token_id not in tokens


def test_it_loads_from_where_a_policy_is_saved(tmp_path: Path) -> None:
    arithmetic_tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("7+9=")["input_ids"] == arithmetic_tokenizer()("7+9=")["input_ids"]
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)
