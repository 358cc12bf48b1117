"""Prompts for the trainer: what is read, what is kept, what is refused."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fuse.demo.tokenizer import arithmetic_tokenizer
from fuse.trainers.data import check_dataset, prompt_rows, read_rows

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


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("state.json", lambda content: b"{}"),
        ("state.json", lambda content: b"[" * 5000),
        ("state.json", lambda content: content.replace(b"filename", b"fi")),
        ("dataset_info.json", lambda content: content.replace(b"dtype", b"d")),
        ("dataset_info.json", lambda content: b"\xff" + content),
        ("data-00000-of-00001.arrow", lambda content: content[: len(content) // 2]),
        ("data-00000-of-00001.arrow", lambda content: content.replace(b"\4\0\0\0\10\0\0\0", b"\4\0\0\0\0\0\0\xf0")),
    ],
)
def test_a_damaged_saved_dataset_is_refused_in_one_line(
    name: str, change: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    datasets.Dataset.from_list([{"q": "1+1=", "a": 2}, {"q": "2+2=", "a": 4}]).save_to_disk(str(saved))
    content = (saved / name).read_bytes()
    assert change(content) != content
    (saved / name).write_bytes(change(content))
    with pytest.raises(ValueError, match=r"saved is damaged \(.*\): save the dataset again") as refusal:
        read_rows(saved)
    assert "\n" not in str(refusal.value)


JSON_ROWS = [{"q": "1+1=", "a": 2}, {"q": "é", "a": 4}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in JSON_ROWS).encode()
ARRAY = json.dumps(JSON_ROWS, indent=2).encode()
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def _parquet(rows: list[dict[str, Any]], path: Path) -> bytes:
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path.read_bytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", BYTE_ORDER_MARK + LINES),
        ("p.json", ARRAY),
        ("p.json", BYTE_ORDER_MARK + b"\n" + ARRAY),
        ("p.jsonl", json.dumps(JSON_ROWS).encode()),
        ("p.jsonl.gz", gzip.compress(LINES)),
        ("p.jsonl.gz", gzip.compress(BYTE_ORDER_MARK + LINES)),
        ("p.json.gz", gzip.compress(ARRAY)),
    ],
)
def test_json_comes_in_many_forms(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert list(read_rows(tmp_path / name)) == JSON_ROWS


def test_parquet_gives_its_rows(tmp_path: Path) -> None:
    rows = [{"chat": [{"role": "user", "content": "1+1="}], "a": 2}, {"chat": [], "a": 3}]
    _parquet(rows, tmp_path / "p.parquet")
    assert list(read_rows(tmp_path / "p.parquet")) == rows


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (lambda path: gzip.compress(LINES)[:-12], r"p is damaged .*compress the file again"),
        (lambda path: _parquet(JSON_ROWS, path)[:-8], r"p is damaged .*write the file again"),
        (lambda path: ARRAY[:-3], r"p is not JSON .* at line \d+ column \d+.*: give one object per line, or an array"),
        (lambda path: b"[1, 2]", r"p: item 0 is int, not a JSON object"),
        (lambda path: b"[]", "p is empty"),
    ],
)
def test_what_is_damaged_is_named_in_one_line(tmp_path: Path, damaged: Callable[[Path], bytes], message: str) -> None:
    (tmp_path / "p").write_bytes(damaged(tmp_path / "whole"))
    with pytest.raises(ValueError, match=message) as caught:
        read_rows(tmp_path / "p")
    assert "\n" not in str(caught.value)


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


def test_reward_functions_may_get_chats_as_messages(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    chat = [{"role": "user", "content": "1+1="}]
    options: dict[str, Any] = {"prompt_column": "q", "response_length": 4, "with_messages": True}
    rows = prompt_rows([{"q": chat, "a": 2}, {"q": "1+1=", "a": 2}], tokenizer, **options)
    assert [row["messages"] for row in rows] == [chat, None]
    (row,) = prompt_rows([{"q": "1+1="}], tokenizer, **options)
    assert "messages" not in row, "there is no chat"
    (row,) = prompt_rows([{"q": chat, "messages": "its own"}], tokenizer, **options)
    assert row["messages"] == "its own"
    (row,) = prompt_rows([{"q": chat}], tokenizer, **{**options, "with_messages": False})
    assert "messages" not in row


def test_a_rendered_chat_begins_once(tokenizer: PreTrainedTokenizerFast) -> None:
    """The template writes the beginning of sequence, and so does the tokenizer in front of other strings."""
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair=None, special_tokens=[("<s>", begin)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    chat = [{"role": "user", "content": "1+1="}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    rows = [{"q": chat}, {"q": rendered}, {"q": "1+1="}]
    by_template, by_string, plain = (
        row["input_ids"] for row in prompt_rows(rows, tokenizer, prompt_column="q", response_length=4)
    )
    assert by_string == by_template
    assert by_string.count(begin) == plain.count(begin) == 1


def test_a_response_continues_the_assistants_last_message(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    messages = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "1"}]
    (row,) = prompt_rows([{"chat": messages}], tokenizer, prompt_column="chat", response_length=4)
    assert tokenizer.decode(row["input_ids"]) == "1+1=;1"


@pytest.mark.parametrize(
    ("template", "last"),
    [
        ("{{ raise_exception('roles must alternate') }}", {"role": "user", "content": "1"}),
        (CHAT_TEMPLATE, {"role": "assistant"}),  # nothing to continue
        (CHAT_TEMPLATE, {"role": "assistant", "content": 7}),
    ],
)
def test_messages_that_the_template_refuses_are_named(
    tokenizer: PreTrainedTokenizerFast, template: str, last: dict[str, Any]
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=r"^dataset row 0 has messages that .* template refuses \(.+\)") as caught:
        prompt_rows([{"q": [last]}], tokenizer, prompt_column="q", response_length=4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            datasets.DatasetDict({"train": datasets.Dataset.from_list(JSON_ROWS), "test": []}),
            r"eval is a DatasetDict of several splits: pass one of them, eval\['train'\] or eval\['test'\]",
        ),
        (
            datasets.Dataset.from_list(JSON_ROWS).to_iterable_dataset(),
            r"eval is a IterableDataset, of which rows cannot be counted .*: pass a list or a Dataset",
        ),
        (datasets.IterableDatasetDict({"train": []}), "IterableDatasetDict of several splits"),
        (iter(JSON_ROWS), "list_iterator, of which rows cannot be counted"),
    ],
)
def test_splits_and_streams_are_refused(dataset: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_dataset(dataset, "eval")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dataset", [JSON_ROWS, tuple(JSON_ROWS), datasets.Dataset.from_list(JSON_ROWS)])
def test_rows_in_any_order_are_a_dataset(dataset: Any) -> None:
    check_dataset(dataset, "train")


def test_tokenised_rows_pass_through(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"input_ids": [0, 4, 13, 4], "attention_mask": [0, 1, 1, 1], "a": 2}]
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
        ([{"q": "1" * 14}, {"q": "1"}, {"q": "1" * 13}], "q", "row 0 has 14 .*, and so have 1 more of 3 rows: shorten"),
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
