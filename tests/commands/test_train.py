"""`fuse train`: from paths and options to a trained policy, and what it says of those that cannot be trained."""

import argparse
import dataclasses
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fuse import (
    GRPOConfig,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    PPOConfig,
    ReinforcePlusPlusConfig,
    ReinforcePlusPlusTrainer,
    RLOOConfig,
    cli,
)
from fuse.commands import train
from fuse.commands.make_trainer import make_trainer
from fuse.commands.models import critic_from_policy
from fuse.commands.reward_function import load_reward_function
from fuse.commands.train_inputs import read_inputs
from fuse.config import inherited
from fuse.config.inherited_help import HELP, ONE_VALUE
from fuse.demo.tokenizer import arithmetic_tokenizer
from fuse.demo.warmup import small_llama

from ..tiny_models import build, classifier, language_model

REWARDS = """
seen = []

def short(prompts, responses, answer, **columns):
    seen.append((prompts, responses, answer, columns))
    return [-len(response) / 4 for response in responses]

number = 3
"""
ROWS = [{"question": f"{index}+1=", "answer": index + 1, "note": "n"} for index in range(8)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a policy, a policy without pad token, and a sequence classifier of a smaller vocabulary."""
    directory = tmp_path_factory.mktemp("models")
    tokenizer = arithmetic_tokenizer()
    policy = small_llama(tokenizer, seed=0, hidden_size=32)
    policy.save_pretrained(directory / "policy")
    tokenizer.save_pretrained(directory / "policy")
    unpadded = arithmetic_tokenizer()
    unpadded.pad_token = None
    policy.save_pretrained(directory / "unpadded")
    unpadded.save_pretrained(directory / "unpadded")
    for name, size, labels in (("small_vocabulary", 8, 1), ("two_labels", 17, 2), ("scorer", 17, 1)):
        options = {"hidden_size": 32, "max_position_embeddings": 256, "pad_token_id": 0}
        build(classifier(vocab_size=size, num_labels=labels, **options)).save_pretrained(directory / name)
    return directory


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current directory with prompts and reward functions."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "project_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("project_rewards", None)


def arguments(models: Path, **changes: str | None) -> list[str]:
    options: dict[str, str | None] = {
        "model": str(models / "policy"),
        "dataset": "prompts.jsonl",
        "prompt-column": "question",
        "reward-function": "project_rewards:short",
        "output-dir": "out",
        "per-device-train-batch-size": "4",
        "gradient-accumulation-steps": "1",
        "response-length": "6",
        "total-episodes": "8",
        "num-ppo-epochs": "1",
        "num-devices": "1",
        "report-to": "none",
        "use-cpu": "true",
    }
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    return ["train", *(part for name, value in options.items() if value is not None for part in (f"--{name}", value))]


@pytest.mark.usefixtures("ray_cluster")  # processes start while models are loaded
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "./nowhere"}, "no model at ./nowhere: there is no such directory"),
        ({"model": "."}, "no tokenizer at ."),
        ({"dataset": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        ({"prompt_column": "prompt"}, "no column 'prompt' (it has: question, answer, note)"),
        ({"response_length": "254"}, "more than the model's context of 256"),
        ({"reward_function": None}, "give --reward-function MODULE:FUNCTION or --reward-model PATH"),
        ({"reward_model": "{models}/scorer"}, "give --reward-function MODULE:FUNCTION or --reward-model PATH"),
        ({"reward_function": "project_rewards"}, "not of the form module:function"),
        ({"reward_function": "no_such_module:short"}, "no module 'no_such_module'"),
        ({"reward_function": "project_rewards:long"}, "'long' does not exist"),
        ({"reward_function": "project_rewards:number"}, "'number' is not a function"),
        ({"value_model": "{models}/small_vocabulary"}, "vocabulary mismatch"),
        ({"value_model": "{models}/policy"}, "must be a sequence classifier with one label"),
        ({"value_model": "{models}/two_labels"}, "must be a sequence classifier with one label"),
        ({"model": "{models}/unpadded"}, "no pad token: name one of its tokens with --pad-token"),
        ({"pad_token": "<none>"}, "--pad-token '<none>' is not in the tokenizer's vocabulary"),
        ({"per_device_train_batch_size": "16"}, "8 rows, fewer than one batch of 16"),
        ({"output_dir": "prompts.jsonl/out"}, "cannot write to output_dir='prompts.jsonl/out' ("),
        ({"resume_from_checkpoint": "nowhere"}, "nowhere is not a complete checkpoint"),
        ({"resume_from_checkpoint": "true"}, "no checkpoint to resume from in"),
        ({"kl_coef": "-1"}, "kl_coef=-1.0 must not be negative"),
        ({"kl_cof": "1"}, "unknown option --kl-cof: did you mean --kl-coef?"),
        ({"json": "missing/out.json"}, "directory missing does not exist"),
    ],
)
@pytest.mark.usefixtures("ray_cluster")
def test_bad_input_is_one_line_and_exit_2_and_writes_nothing(
    models: Path, project: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, str | None], message: str
) -> None:
    before = sorted(project.rglob("*.json*"))
    changes = {name: value and value.format(models=models) for name, value in changes.items()}
    try:
        status = cli.main(arguments(models, **changes))
    except SystemExit as error:
        status = int(error.code or 0)
    assert status == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fuse train: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (project / "out").exists()
    assert sorted(project.rglob("*.json*")) == before


@pytest.mark.usefixtures("ray_cluster")
def test_it_trains_on_prompts_with_a_reward_function(
    models: Path, project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(models, json="results.json", learning_rate="1e-3", stop_token="none")) == 0
    seen = sys.modules["project_rewards"].seen
    for prompts, _, answer, columns in seen:  # as samples finish, an update after the other
        assert prompts == [f"{value - 1}+1=" for value in answer]
        assert columns == {"note": ["n"] * len(prompts)}
    texts = [text for _, responses, _, _ in seen for text in responses]
    assert len(texts) == 8
    results = json.loads((project / "results.json").read_text())
    means = [sum(-len(text) / 4 for text in update) / 4 for update in (texts[:4], texts[4:])]
    assert results["rewards"] == pytest.approx(means)
    assert {"rollout", "training"} <= results["phases"].keys()
    assert 0 < sum(results["phases"].values()) < results["seconds"]
    trained = AutoModelForCausalLM.from_pretrained(project / "out").state_dict()
    initial = AutoModelForCausalLM.from_pretrained(models / "policy").state_dict()
    assert any(not torch.equal(trained[name], initial[name]) for name in initial)
    shown = capfd.readouterr().out
    assert "PPO plan: 4 samples an update of 8 prompts; 2 updates of 1 optimizer step; 1 CPU core; resp" in shown
    assert "PPO 2/2: reward -" in shown
    assert "% ended by EOS" in shown


@pytest.mark.usefixtures("in_process_workers")
def test_it_trains_a_model_as_others_leave_it_and_saves_it_so(project: Path) -> None:
    """In float16, its vocabulary padded, a head beside the embedding that it is tied to; padding on the right."""
    tokenizer = arithmetic_tokenizer()
    tokenizer.padding_side = "right"
    options: dict[str, Any] = {"tie_word_embeddings": True, "max_position_embeddings": 256, "pad_token_id": 0}
    policy = build(language_model(vocab_size=17, hidden_size=32, **options))
    policy.resize_token_embeddings(64)
    policy.half().save_pretrained(project / "policy")
    tokenizer.save_pretrained(project / "policy")
    weights = load_file(project / "policy" / "model.safetensors")
    assert "lm_head.weight" not in weights
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file({**weights, **head}, project / "policy" / "model.safetensors", {"format": "pt"})

    assert cli.main(arguments(project, learning_rate="1e-2", stop_token="none")) == 0
    trained = AutoModelForCausalLM.from_pretrained(project / "out", dtype="auto")
    assert trained.dtype == torch.float16
    assert trained.get_output_embeddings().weight is trained.get_input_embeddings().weight
    embedding = trained.get_input_embeddings().weight
    assert embedding.shape == (64, 32)
    moved = (embedding - weights["model.embed_tokens.weight"]).abs().amax(1) > 0
    assert moved[:17].any()
    assert not moved[17:].any(), "the padding is no token"


@pytest.mark.usefixtures("in_process_workers")
def test_a_reward_function_that_raises_is_no_bad_input(
    models: Path, project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with (project / "project_rewards.py").open("a") as file:
        file.write("\ndef strict(prompts, responses, **columns):\n    return [int('seven')]\n")
    assert cli.main(arguments(models, reward_function="project_rewards:strict")) == 1
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("fuse train: "))
    assert line.startswith("fuse train: reward function strict raised for sample")
    assert line.endswith("ValueError: invalid literal for int() with base 10: 'seven'")


def test_a_critic_from_the_policy_has_its_layers_and_values_everything_at_zero() -> None:
    policy = small_llama(arithmetic_tokenizer(), seed=0, hidden_size=32)
    critic = critic_from_policy(policy, pad_token_id=0)
    tokens = torch.tensor([[3, 4, 13, 5]])
    with torch.no_grad():
        assert torch.equal(critic(input_ids=tokens).logits, torch.zeros(1, 1))
        torch.testing.assert_close(
            critic.base_model(input_ids=tokens).last_hidden_state, policy.model(input_ids=tokens).last_hidden_state
        )
    critic.base_model.get_input_embeddings().weight.data.zero_()
    assert policy.model.get_input_embeddings().weight.abs().sum() > 0


def test_what_a_reward_module_lacks_itself_is_not_blamed_on_its_name(project: Path) -> None:
    (project / "project_rewards.py").write_text("import no_such_dependency\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        load_reward_function("project_rewards:short")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "./nowhere"], "no model at ./nowhere"),
        (["--value_model=/no/where"], "no model at /no/where"),
        (["--dataset", "nowhere.jsonl"], "dataset nowhere.jsonl does not exist"),
        (["--output-dir", "/etc/hostname/out"], "cannot write to output_dir='/etc/hostname/out'"),
    ],
)
def test_wrong_paths_are_told_before_what_takes_seconds_is_imported(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    imported: list[str] = []

    def import_module(name: str) -> Any:
        imported.append(name)
        return importlib.import_module(name)

    monkeypatch.setattr(cli, "import_module", import_module)
    assert cli.main(["train", "--reward-function", "rewards:score", *options]) == 2
    assert message in capsys.readouterr().err
    assert "fuse.commands.train" not in imported


def test_help_shows_ppo_options_and_help_all_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as caught:
            cli.main(["train", option])
        assert caught.value.code == 0
        texts.append(capsys.readouterr().out)
    short, long = texts
    assert "--kl-coef" in short
    assert "--reward-function" in short
    assert "--weight-decay" not in short
    assert "--weight-decay" in long
    assert "--long-prompts" in short


@pytest.mark.parametrize(("function", "columns"), [("told", {"messages", "answer"}), ("short", {"answer"})])
def test_chats_reach_reward_functions_that_take_messages(
    models: Path, project: Path, function: str, columns: set[str]
) -> None:
    chats = [{"question": [{"role": "user", "content": f"{index}+1="}], "answer": index + 1} for index in range(4)]
    (project / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (project / "project_rewards.py").write_text(
        "def told(prompts, responses, answer, messages): ...\ndef short(prompts, responses, answer): ..."
    )
    tokenizer = arithmetic_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(project / "tokenizer")
    parser = cli.Parser(parents=train.parents([]))
    train.add_arguments(parser)
    options = arguments(models, tokenizer="tokenizer", reward_function=f"project_rewards:{function}")
    parsed = parser.parse_args(options[1:])
    trainer = make_trainer(parsed, read_inputs(parsed), lambda text: None, None)
    (batch,) = trainer.get_train_dataloader()
    for sample in trainer._training_samples(batch):
        assert sample.columns.keys() == columns
        if "messages" in columns:
            assert sample.columns["messages"] == chats[int(str(sample.columns["answer"])) - 1]["question"]


def parsed(*options: str) -> argparse.Namespace:
    parser = cli.Parser(parents=train.parents(options))
    train.add_arguments(parser)
    return parser.parse_args([*options, "--model", "policy", "--dataset", "prompts.jsonl"])


def test_advantages_losses_and_their_options_are_on_the_command_line() -> None:
    mixed = parsed("--algorithm", "grpo", "--advantage", "grpovi", "--loss", "proximal_rloo", "--dynamic-sampling")
    assert (mixed.advantage, mixed.loss, mixed.dynamic_sampling) == ("grpovi", "proximal_rloo", True)
    assert parsed("--algorithm", "rloo", "--reward-clip-range", "-1", "2.5").reward_clip_range == [-1.0, 2.5]
    assert parsed("--reward-clip-range", "-5", "5").reward_clip_range == [-5.0, 5.0]
    returns = parsed("--algorithm=reinforce++", "--advantage=reinforce++-baseline", "--overlong-buffer", "4")
    assert (returns.advantage, returns.beta, returns.overlong_buffer) == ("reinforce++-baseline", 0.01, 4)
    pairs = parsed("--algorithm", "online-dpo", "--loss-type", "ipo", "--beta", "0.2", "--num-generations", "4")
    assert (pairs.loss_type, pairs.beta, pairs.num_generations) == ("ipo", 0.2, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--algorithm", "reinforce"], "invalid choice: 'reinforce' (choose from"),
        (["--algorithm", "grpo", "--advantage", "gae"], "advantage='gae' is unknown: use 'group', 'leave_one_out', "),
        (["--algorithm", "rloo", "--loss", "grpo"], "loss='grpo' is unknown: use 'rloo' or 'proximal_rloo'"),
        (["--algorithm", "online-dpo", "--advantage", "group"], "unknown option --advantage"),
        (["--algorithm", "online-dpo", "--num-generations", "1"], "num_generations=1: responses are compared with"),
        (["--algorithm", "online-dpo", "--ref-model", "PATH"], "has no reference but the policy it began with"),
    ],
)
def test_one_line_says_which_names_there_are(
    options: list[str], message: str, models: Path, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", str(models / "policy"), "--dataset", "prompts.jsonl", "--prompt-column", "question"]
    given = ["train", *given, "--reward-function", "project_rewards:short", "--use-cpu", *options]
    if "--ref-model" in options:
        given[given.index("PATH")] = str(models / "policy")
    try:
        status = cli.main(given)
    except SystemExit as ended:
        status = int(ended.code or 0)
    assert status == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("fuse train: "))
    assert message in line


@pytest.mark.parametrize(
    ("algorithm", "trainer_class"), [("reinforce++", ReinforcePlusPlusTrainer), ("online-dpo", OnlineDPOTrainer)]
)
def test_the_command_line_makes_the_trainer_of_its_algorithm(
    algorithm: str, trainer_class: type, models: Path, project: Path
) -> None:
    (project / "project_rewards.py").write_text("def short(completions, answer, **columns): ...")
    of_ppo = dict.fromkeys(("response_length", "total_episodes", "num_ppo_epochs"))
    given = ["--algorithm", algorithm, *arguments(models, **of_ppo, max_completion_length="6")[1:]]
    parser = cli.Parser(parents=train.parents(given))
    train.add_arguments(parser)
    options = parser.parse_args(given)
    trainer = make_trainer(options, read_inputs(options), lambda text: None, None)
    assert isinstance(trainer, trainer_class)
    assert trainer.args.max_response_tokens == 6


CONFIGS = {
    "ppo": PPOConfig,
    "grpo": GRPOConfig,
    "rloo": RLOOConfig,
    "reinforce++": ReinforcePlusPlusConfig,
    "online-dpo": OnlineDPOConfig,
}
BY_ALGORITHM = pytest.mark.parametrize("algorithm", CONFIGS)


def _walked(capsys: pytest.CaptureFixture[str], algorithm: str = "ppo") -> dict[str, str]:
    """The options that --help-all lists, and what it says of each."""
    with pytest.raises(SystemExit):
        cli.main(["train", "--algorithm", algorithm, "--help-all"])
    entries = re.split(r"^  (?=--)", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    texts = {entry.split()[0].rstrip(","): " ".join(entry.split()) for entry in entries}
    return {name: re.sub(r"(?<=\w)- (?=\w)", "-", text) for name, text in texts.items()}  # lines break at hyphens


@BY_ALGORITHM
def test_every_option_of_the_help_works_and_says_its_default(
    algorithm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = _walked(capsys, algorithm)
    names = {option.removeprefix("--").removeprefix("no-").replace("-", "_") for option in texts}
    config = {field.name for field in dataclasses.fields(CONFIGS[algorithm])}
    commands = {"model", "ref_model", "reward_function", "reward_model", "value_model", "tokenizer", "pad_token"}
    commands |= {"dataset", "eval_dataset", "prompt_column", "json", "algorithm"}
    commands |= {"lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"}
    assert names >= commands
    unknown = names - config - commands - {"help", "help_all", "config"}
    assert not unknown
    without_effect = names & {*inherited.CANNOT_MATTER, *inherited.REMEDIES}
    assert not without_effect
    assert names >= inherited.WORKS - ONE_VALUE
    for option, text in texts.items():
        is_flag = option in ("--help-all", "--model", "--dataset") or "The same as --" in text
        assert is_flag or "default:" in text.lower(), text
        for of_others in ("Trainer", "DeepSpeed", "num_devices,", "Whether or not", "<"):
            assert of_others not in text, text


def test_inherited_options_are_described_in_words_of_this_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    texts = _walked(capsys)
    assert HELP.keys() | {"bf16"} == inherited.WORKS - ONE_VALUE, "which is our own"
    for name, text in HELP.items():
        assert text.split(" Default:")[0] in texts[f"--{name.replace('_', '-')}"]
    assert "num_devices" not in texts["--gradient-accumulation-steps"]


@BY_ALGORITHM
def test_every_value_that_the_help_lists_is_accepted(
    algorithm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = {
        option.removeprefix("--").replace("-", "_"): found[1].split(",")
        for option, text in _walked(capsys, algorithm).items()
        if (found := re.match(r"--\S+ \{(.+?)\}", text))
    }
    assert {"lr_scheduler_type", "save_strategy", "migration_policy", "reward_workers"} <= listed.keys()
    del listed["algorithm"]
    for name, values in listed.items():
        for value in values:
            CONFIGS[algorithm](output_dir=str(tmp_path), use_cpu=True, **{name: value})


def test_a_number_that_may_be_none_is_given_as_none() -> None:
    (parser,) = train.parents([])
    assert parser.parse_args(["--cliprange-value", "none"]).cliprange_value is None
    assert parser.parse_args(["--cliprange-value", "0.5"]).cliprange_value == 0.5
    assert parser.parse_args([]).cliprange_value == 0.2
    with pytest.raises(SystemExit):
        parser.parse_args(["--cliprange-value", "off"])
