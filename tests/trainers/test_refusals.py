"""What the trainer refuses before anything has started: one line each, with the remedy."""

from __future__ import annotations

import copy
import importlib.metadata
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from fuse import PPOTrainer

from . import tiny

Change = Callable[[dict[str, Any]], None]


def _arguments(output_dir: Path) -> dict[str, Any]:
    return {
        "args": tiny.config(output_dir),
        "processing_class": tiny.tokenizer(),
        "model": tiny.policy(),
        "ref_model": None,
        "reward_model": tiny.count_a,
        "train_dataset": tiny.rows(),
        "value_model": tiny.scorer(1),
    }


def _no_padding(arguments: dict[str, Any]) -> None:
    arguments["processing_class"].pad_token = None


def _same_models(arguments: dict[str, Any]) -> None:
    arguments["ref_model"] = arguments["model"]


def _shared_body(one: str, other: str) -> Change:
    """As a critic made on the policy's own layers."""

    def change(arguments: dict[str, Any]) -> None:
        for name in (one, other):
            arguments[name] = tiny.policy() if name in ("model", "ref_model") else tiny.scorer(2)
        arguments[other].model = arguments[one].model

    return change


def _shared_storage(arguments: dict[str, Any]) -> None:
    arguments["value_model"].model.norm.weight.data = arguments["model"].model.norm.weight.data


def _same_scorer(arguments: dict[str, Any]) -> None:
    arguments["reward_model"] = arguments["value_model"]


def _same_scorer_copied(arguments: dict[str, Any]) -> None:
    arguments["reward_model"] = copy.deepcopy(arguments["value_model"])


def _other_reference(arguments: dict[str, Any]) -> None:
    _option(reward_baseline="reference")(arguments)
    arguments["ref_model"] = tiny.policy(num_hidden_layers=1)


def _unpicklable(arguments: dict[str, Any]) -> None:
    lock = threading.Lock()

    def locked(prompts: list[str], responses: list[str], target: list[int]) -> list[float]:
        with lock:
            return [0.0] * len(target)

    arguments["reward_model"] = locked
    _option(reward_workers="process")(arguments)


def _gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=64, n_embd=16, n_layer=2, n_head=2))


def _mistral(window: int) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    options = {**sizes, "num_key_value_heads": 1, **tiny.OPTIONS, "max_position_embeddings": 256}
    return MistralForCausalLM(MistralConfig(**options, sliding_window=window))


def _frozen(part: str, **options: Any) -> Change:
    def change(arguments: dict[str, Any]) -> None:
        _option(**options)(arguments)
        for name, parameter in arguments["model"].named_parameters():
            parameter.requires_grad_(part not in name)

    return change


def _adapted(target_modules: Any = None, models: Any = (), saved: Any = None, **options: Any) -> Change:
    def change(arguments: dict[str, Any]) -> None:
        _option(**options)(arguments)
        config = LoraConfig(target_modules=target_modules and list(target_modules), modules_to_save=saved)
        arguments |= {"peft_config": config, "model": tiny.policy(**dict(models))}

    return change


def _option(**options: Any) -> Change:
    def change(arguments: dict[str, Any]) -> None:
        arguments["args"] = tiny.config(Path(arguments["args"].output_dir), **options)

    return change


def _replace(**replacements: Any) -> Change:
    return lambda arguments: arguments.update(replacements)


def _third(prompts: list[str], completions: list[str], target: list[int]) -> list[float]:
    return [0.0] * len(target)


def _columns(*names: str, without: str = "", reward: Any = tiny.count_a) -> Change:
    rows = [{**row, **dict.fromkeys(names, "a")} for row in tiny.rows()]
    return _replace(
        train_dataset=[{name: value for name, value in row.items() if name != without} for row in rows],
        reward_model=reward,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_no_padding, "no pad token: set tokenizer.pad_token"),
        (_same_models, "model and ref_model are the same object"),
        (_replace(train_dataset=None), "train_dataset is None"),
        (_replace(train_dataset=datasets.DatasetDict({"train": [], "test": []})), "train_dataset is a DatasetDict"),
        (
            _replace(train_dataset=iter(tiny.rows())),
            "train_dataset is a list_iterator, of which rows cannot be counted",
        ),
        (_replace(eval_dataset={"train": tiny.rows()}), r"eval_dataset is a dict .*eval_dataset\['train'\]"),
        (_replace(value_model=None), "value_model is None"),
        (_replace(reward_model=3), "reward_model is 3: pass a sequence classifier"),
        (_replace(peft_config=object()), "peft_config is <object .* pass a peft.LoraConfig"),
        (_replace(peft_config=LoraConfig(lora_dropout=0.1)), "lora_dropout=0.1: models are trained without dropout"),
        (_replace(peft_config=LoraConfig(use_dora=True)), "use_dora=True of LoraConfig is not supported: leave it"),
        (_replace(peft_config=LoraConfig(init_lora_weights="pissa")), "init_lora_weights='pissa' changes the weights"),
        (_adapted(train_backend="megatron"), "train_backend='megatron' trains no adapters"),
        (_adapted(ref_adapter_name="ref"), "ref_adapter_name='ref' is no adapter of the policy beside the one that tr"),
        (_option(model_adapter_name="a"), "model_adapter_name='a' is no adapter of the policy .it has: none"),
        (
            _adapted(None, {"tie_word_embeddings": True}, ["embed_tokens"]),
            "modules_to_save has the embedding or the head",
        ),
        (
            _adapted(None, {"tie_word_embeddings": True}, ["lm_head"]),
            "modules_to_save has the embedding or the head of",
        ),
        (_adapted(("lm_head",), {"tie_word_embeddings": True}), "an adapter is on the head of a LlamaForCausalLM"),
        (_replace(optimizers=(object(), None)), "optimizers must be"),
        (_replace(train_dataset=tiny.rows(7)), "7 rows, fewer than one batch of 8"),
        (_replace(train_dataset=[{"text": "a"}] * 8), "no column 'input_ids' .it has: text."),
        (_replace(train_dataset=[{"input_ids": []}] * 8), "row 0 has an empty prompt"),
        (_replace(train_dataset=[{"input_ids": [2] * 60}] * 8), "row 0 has 60 prompt tokens.* context of 64"),
        (_replace(train_dataset=[{"input_ids": [99]}] * 8), "row 0 holds token 99, the models have 16"),
        (_replace(train_dataset=[{"input_ids": [-1]}] * 8), "row 0 has '-1' among its input_ids"),
        (_replace(train_dataset=[{"input_ids": 3}] * 8), "row 0 has input_ids of type int, not a list of integers"),
        (_replace(value_model=tiny.scorer(1, vocab_size=12)), "vocabulary mismatch: the policy has 16.*value_model"),
        (_replace(ref_model=tiny.policy(vocab_size=32)), "vocabulary mismatch: the policy has 16.*ref_model has 32"),
        (_same_scorer, "value_model and reward_model share parameters .*pass a copy, copy.deepcopy.reward_model"),
        (_shared_body("model", "value_model"), "model and value_model share parameters .*copy.deepcopy.value_model"),
        (_shared_body("model", "ref_model"), "model and ref_model share parameters .*copy.deepcopy.ref_model"),
        (_shared_body("model", "reward_model"), "model and reward_model share parameters .*copy.deepcopy.reward_m"),
        (_shared_body("reward_model", "value_model"), "value_model and reward_model share parameters"),
        (_frozen(""), "no parameter of the LlamaForCausalLM to train requires gradients"),
        (_frozen("k_proj", train_backend="megatron"), r"k_proj.weight is frozen and \S+ is not, .*one matrix"),
        (_replace(model=_gpt2()), "GPT2LMHeadModel declares no pipeline plan"),
        (_replace(model=_mistral(window=8)), "attends to the last 8 tokens only, and .* may have 64 together"),
        (_shared_storage, "model and value_model share parameters .model.model.norm.weight is value_model.model.norm"),
        (_replace(model=3), "model is 3: pass a transformers model"),
        (_other_reference, "reward_baseline='reference' with a ref_model that is not built like model"),
        (_replace(ref_model=3), "ref_model is 3: pass a transformers model"),
        (_replace(value_model=tiny.count_a), "value_model is <function count_a .*: pass a transformers model"),
        (_replace(model=tiny.scorer(1)), "model is a LlamaForSequenceClassification without output embeddings"),
        (_replace(ref_model=tiny.scorer(1)), "ref_model is a LlamaForSequenceClassification without output embeddi"),
        (_replace(value_model=tiny.policy()), "value_model is a LlamaForCausalLM without a `score` head: pass a seq"),
        (_replace(reward_model=tiny.policy()), "reward_model is a LlamaForCausalLM without a `score` head: pass a"),
        (_replace(value_model=tiny.scorer(1, num_labels=2)), "value_model is a .* with 2 labels.* pass one with one"),
        (_replace(reward_model=tiny.scorer(1, num_labels=3)), "reward_model is a .* with 3 labels.* pass one with"),
        (_columns("prompts"), "train_dataset has a column 'prompts', which is what .* count_a gets .*: rename"),
        (_columns("responses"), "train_dataset has a column 'responses', which is what .* count_a gets .*: rename"),
        (_columns("completions", reward=_third), "train_dataset has a column 'completions', which is what .*: rename"),
        (_columns("answer"), "reward function count_a does not take column 'answer' of train_dataset: define it as"),
        (_columns(without="target"), "train_dataset has no column 'target' .it has: none., which reward function"),
        (_replace(eval_dataset=[{"input_ids": [2]}]), "eval_dataset has no column 'target' .it has: none., which"),
        (_replace(eval_dataset=[]), "eval_dataset is empty: "),
        (
            _replace(train_dataset=[*tiny.rows(), {"input_ids": [2]}]),
            "row 16 of train_dataset has the columns input",
        ),
        (_replace(reward_model=lambda completions, **columns: []), "<lambda> takes 1 arguments by position"),
        (
            lambda arguments: _option(reward_workers="process")(arguments) or _same_scorer_copied(arguments),
            "reward_workers='process' is for reward functions, and a model gives the rewards: leave it out",
        ),
        (
            lambda arguments: _option(reward_error_score=0.0)(arguments) or _same_scorer_copied(arguments),
            "reward_error_score=0.0 is for reward functions",
        ),
        (_unpicklable, "reward function locked cannot be sent to a process .*reward_workers='thread'"),
        (_option(eval_strategy="steps"), "eval_strategy='steps' without eval_dataset: pass prompts"),
        (_option(lr_scheduler_kwargs={"wave": 1}), "lr_scheduler_kwargs={'wave': 1} do not fit .*'linear'"),
        (_option(num_mini_batches=3), "num_mini_batches=3 does not divide the batch of 8"),
        (_option(critic_num_mini_batches=3), "critic_num_mini_batches=3 does not divide the batch of 8"),
        (
            _option(num_devices=2, critic_stages=1, critic_num_mini_batches=4, regroup_micro_batches=False),
            "cannot feed 2 .* replicas of the critic",
        ),
        (_option(whiten_rewards=True, num_mini_batches=2), "whiten_rewards needs mini-batches of at least 8"),
        (_option(num_devices=2, actor_stages=3), "actor_stages=3 neither divides the 2 pipeline ranks"),
        (
            _option(num_devices=2, actor_stages=1, num_mini_batches=4, regroup_micro_batches=False),
            "cannot feed 2 data-parallel replicas",
        ),
        (_option(num_devices=2, actor_stages=1, trl_quirks=True), "cannot feed 2 data-parallel replicas"),
    ],
)
def test_refused_with_one_line_and_nothing_written(change: Change, message: str, tmp_path: Path) -> None:
    output_dir = tmp_path / "out"
    arguments = _arguments(output_dir)
    change(arguments)
    with pytest.raises(ValueError, match=message) as refusal:
        PPOTrainer(**arguments)
    assert "\n" not in str(refusal.value)
    assert not output_dir.exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"engine": "vllm"}, r"needs vLLM 0\.32, which is not installed"),
        ({"kv_transfer": "nixl"}, r"kv_transfer='nixl' needs nixl 1\.5\.1, which is not installed"),
    ],
)
def test_a_missing_package_is_reported_before_anything_starts(
    option: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, **option)


def test_there_must_be_something_to_resume_from(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path / "out")
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        trainer.train(resume_from_checkpoint=True)


class _Reward:
    def __call__(self, texts: list[str], completions: list[str], /, target: list[int], scale: float = 1.0) -> Any:
        return [scale] * len(target)


@pytest.mark.parametrize(
    "replacements",
    [
        {"reward_model": _Reward()},
        {"reward_model": lambda *texts, **columns: []},
        {"reward_model": _Reward(), "train_dataset": Dataset.from_list(tiny.rows())},
        {"reward_model": tiny.scorer(3), "train_dataset": [{**row, "prompts": 1} for row in tiny.rows()]},
        {"train_dataset": [{"input_ids": [2], "attention_mask": [1], "target": 1}] * 8},
        {"train_dataset": [{"input_ids": [2]}] * 8, "data_collator": list},  # which may add what there is not
    ],
    ids=["callable object", "any", "Dataset", "reward model", "attention mask", "collator"],
)
def test_what_fits_is_accepted(replacements: dict[str, Any], tmp_path: Path) -> None:
    PPOTrainer(**_arguments(tmp_path) | replacements)


def test_copies_of_one_model_are_accepted(tmp_path: Path) -> None:
    arguments = _arguments(tmp_path)
    arguments["reward_model"] = copy.deepcopy(arguments["value_model"])
    PPOTrainer(**arguments)


def test_dropout_of_a_trained_model_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = _arguments(tmp_path)
    with caplog.at_level(logging.WARNING, logger="fuse"):
        PPOTrainer(**arguments)
        assert caplog.messages == []
        arguments["model"].config.attention_dropout = 0.1
        PPOTrainer(**arguments)
    (message,) = caplog.messages
    assert message.startswith("model.config.attention_dropout=0.1 has no effect")
    assert message.endswith("set it to 0.0")


def test_a_sliding_window_that_no_sequence_exceeds_is_accepted(tmp_path: Path) -> None:
    arguments = _arguments(tmp_path)
    _replace(model=_mistral(window=64))(arguments)
    PPOTrainer(**arguments)


@pytest.mark.parametrize("limit", [0, 9])
def test_a_limit_beyond_all_others_is_refused_before_anything_starts(limit: int, tmp_path: Path) -> None:
    made = PPOTrainer(**_arguments(tmp_path / "out"))
    made.max_new_tokens = {3: limit}
    with pytest.raises(
        ValueError, match=f"max_new_tokens of sample 3 is {limit}: it must be from 1 to response_length"
    ):
        made.train()
    assert not (tmp_path / "out").exists()


def test_an_output_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    arguments = _arguments(tmp_path / "file" / "out")
    with pytest.raises(ValueError, match=r"cannot write to output_dir='.*out' .*file: Not a directory.: name another"):
        PPOTrainer(**arguments)
