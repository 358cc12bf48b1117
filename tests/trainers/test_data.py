"""Prompts for the trainer: what is read, what is kept, what is refused."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from fuse.demo.tokenizer import arithmetic_tokenizer
from fuse.trainers.data import prompt_rows, read_rows

CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }};{% endfor %}{% if add_generation_prompt %}#{% endif %}"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return arithmetic_tokenizer()


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_jsonl_file_gives_its_rows_and_skips_blank_lines(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", '{"q": "1+1=", "a": 2}', "", '{"q": "2+2=", "a": 4}')
    assert list(read_rows(path)) == [{"q": "1+1=", "a": 2}, {"q": "2+2=", "a": 4}]


def test_a_line_separator_inside_a_string_ends_no_row(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"q": "one\u2028two\x85three"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert list(read_rows(path)) == [{"q": "one\u2028two\x85three"}]


def test_a_saved_dataset_gives_its_rows(tmp_path: Path) -> None:
    rows = [{"q": "1+1=", "a": 2}, {"q": "2+2=", "a": 4}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    assert list(read_rows(tmp_path / "saved")) == rows


def test_one_split_must_be_chosen(tmp_path: Path) -> None:
    split = datasets.Dataset.from_list([{"q": "1+1="}])
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"several splits: give one of .*saved/train, .*saved/test"):
        read_rows(tmp_path / "saved")


def test_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes('{"q": "é"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"p\.jsonl:1 is not UTF-8"):
        read_rows(tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"q": 1}\n{"q": \n', r"p\.jsonl:2 is not JSON"),
        ('{"q": 1}\n[1]\n', r"p\.jsonl:2 is list, not a JSON object"),
        ("", r"p\.jsonl is empty"),
        ("\n\n", r"p\.jsonl is empty"),
    ],
)
def test_bad_files_are_refused_with_the_place(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_rows(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.jsonl does not exist: give a JSONL file"):
        read_rows(tmp_path / "nowhere.jsonl")
    (tmp_path / "plain").mkdir()
    with pytest.raises(ValueError, match="plain holds no dataset"):
        read_rows(tmp_path / "plain")


def test_string_prompts_are_tokenised_and_other_columns_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = prompt_rows([{"q": "1+1=", "a": 2}, {"q": "12=", "b": 3}], tokenizer, prompt_column="q", response_length=4)
    assert rows == [
        {"input_ids": tokenizer("1+1=")["input_ids"], "a": 2, "b": None},
        {"input_ids": tokenizer("12=")["input_ids"], "a": None, "b": 3},
    ]


def test_chat_messages_go_through_the_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    messages = [{"role": "user", "content": "1+1="}]
    (row,) = prompt_rows([{"chat": messages}], tokenizer, prompt_column="chat", response_length=4)
    assert tokenizer.decode(row["input_ids"]) == "1+1=;#"


def test_tokenised_rows_pass_through(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"input_ids": [4, 13, 4], "attention_mask": [1, 1, 1], "a": 2}]
    assert prompt_rows(rows, tokenizer, response_length=4) == [{"input_ids": [4, 13, 4], "a": 2}]


@pytest.mark.parametrize(
    ("rows", "column", "message"),
    [
        ([{"q": "1", "a": 2}], "question", r"no column 'question' \(it has: q, a\)"),
        ([{"q": "1", "a": 2}], None, r"no column 'input_ids' \(it has: q, a\): name the prompt column"),
        ([{"q": "1"}, {"a": 2}], "q", r"row 1 has no column 'q' \(it has: a\)"),
        ([{"q": "1"}, {"q": "  "}], "q", "row 1 has an empty prompt"),
        ([{"q": "1"}, {"q": []}], "q", "row 1 has an empty prompt"),
        ([{"input_ids": [3]}, {"input_ids": []}], None, "row 1 has an empty prompt"),
        ([{"q": "1"}, {"q": 7}], "q", "row 1 has a prompt of type int"),
        ([{"q": [{"role": "user", "content": "1"}]}], "q", "no chat template"),
        ([{"q": "1"}, {"q": "1" * 13}], "q", r"row 1 has 13 prompt tokens.*context of 16 less response_length=4"),
        ([{"q": "1", "responses": 1}], "q", "column 'responses', an argument of every reward function"),
        ([], "q", "the dataset is empty"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(
    tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], column: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        prompt_rows(rows, tokenizer, prompt_column=column, response_length=4, context=16)
    assert "\n" not in str(caught.value)


def test_the_longest_prompt_that_fits_is_taken(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(prompt_rows([{"q": "1" * 12}], tokenizer, prompt_column="q", response_length=4, context=16)) == 1


def test_a_tokenizer_without_pad_token_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad token"):
        prompt_rows([{"q": "1"}], tokenizer, prompt_column="q", response_length=4)
