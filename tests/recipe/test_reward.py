"""The reward model's loss, and what it is trained on."""

import json
import re

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from fuse.demo.tokenizer import arithmetic_tokenizer
from fuse.demo.warmup import small_llama
from fuse.recipe.configs import RewardStepConfig
from fuse.recipe.reward import load, train_reward_model
from fuse.recipe.reward_loss import AdvantageTrainer, SquareRegularisedTrainer
from fuse.recipe.training import TrainingStep, check_options
from fuse.training.reading import TokenSequence
from fuse.training.scoring import scores

from ..tiny_models import build, classifier


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    tokenizer = arithmetic_tokenizer()
    small_llama(tokenizer, seed=0, hidden_size=32, num_layers=1).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def step(base, tmp_path, rows, *options):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainingStep(
        model=base, data=str(file), held_out=str(file), output_dir=str(tmp_path / "reward"), seed=0, options=options
    )


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def config(tmp_path, **options):
    return RewardStepConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none", **options)


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_the_loss_is_the_pairwise_one_and_the_squares(base, tmp_path, coefficient):
    pairs = Dataset.from_list(
        [{"chosen_ids": [3, 4, 1], "rejected_ids": [3, 1]}, {"chosen_ids": [5, 1], "rejected_ids": [6, 7, 1]}]
    )
    args = config(tmp_path, square_coefficient=coefficient)
    trainer = SquareRegularisedTrainer(
        model=base, args=args, train_dataset=pairs, processing_class=arithmetic_tokenizer()
    )
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(pairs)))
    chosen, rejected = (
        torch.stack([trainer.model(torch.tensor([one[name]])).logits[0, 0] for one in pairs])
        for name in ("chosen_ids", "rejected_ids")
    )
    expected = -logsigmoid(chosen - rejected).mean() + coefficient * (chosen**2 + rejected**2).mean()
    torch.testing.assert_close(loss, expected)


def test_the_advantage_models_loss_and_gradients_are_those_of_its_formula(base, tmp_path):
    """The prompt's expectation is what one that it is given alone has; gradients through it are of its own loss."""
    margin, coefficient = 1.5, 0.3
    pairs = Dataset.from_list(
        [
            {"prompt_ids": [9, 3], "chosen_ids": [9, 3, 4, 1], "rejected_ids": [9, 3, 1]},
            {"prompt_ids": [5], "chosen_ids": [5, 8, 1], "rejected_ids": [5, 6, 7, 7, 1]},
        ]
    )
    args = config(tmp_path, loss="advantage", advantage_margin=margin, expectation_coefficient=coefficient)
    trainer = AdvantageTrainer(model=base, args=args, train_dataset=pairs, processing_class=arithmetic_tokenizer())
    model = trainer.model
    torch.nn.init.normal_(model.score.weight, std=0.5)
    trainer.compute_loss(model, trainer.data_collator(list(pairs))).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    loss = trainer.compute_loss(model, trainer.data_collator(list(pairs)))
    model.zero_grad()

    def outputs(name, label):
        return torch.stack([model.score(model.model(torch.tensor([one[name]]))[0])[0, -1, label] for one in pairs])

    chosen, rejected, expected = outputs("chosen_ids", 0), outputs("rejected_ids", 0), outputs("prompt_ids", 1)
    better, worse = chosen - expected.detach(), rejected - expected.detach()
    by_hand = (
        torch.log1p(torch.exp(worse - better))
        + torch.log1p(torch.exp(better - margin))
        + torch.log1p(torch.exp(-worse - margin))
        + coefficient * (expected - ((chosen + rejected) / 2).detach()) ** 2
    ).mean()
    torch.testing.assert_close(loss, by_hand)
    by_hand.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_an_advantage_model_learns_what_prompts_let_expect(base, tmp_path):
    """Responses score on both sides of 0, within the margin, and their prompts' expectation lies between them."""
    rows = [pair(f"{index}+{other}=", "#1", "#2") for index in range(4) for other in range(4)]
    options = ("--loss=advantage", "--advantage_margin=2", "--max_steps=30", "--learning_rate=1e-2", "--use_cpu")
    results = train_reward_model(step(base, tmp_path, rows, *options, "--length_buckets=0"))
    assert results["held_out"]["accuracy"] == 1.0
    assert results["held_out"]["calibration_error"] < 0.5
    model, tokenizer = load(str(tmp_path / "reward"))
    assert model.config.id2label == {0: "reward", 1: "expected_reward"}
    assert model.config.pad_token_id == tokenizer.pad_token_id
    end = [tokenizer.eos_token_id]
    good, bad = (TokenSequence(tokenizer("1+2=").input_ids, tokenizer(text).input_ids + end) for text in ("#1", "#2"))
    better, worse = scores(model.eval(), [good, bad])
    assert -2 < worse < -0.1 < 0.1 < better < 2


def test_sequences_that_end_as_they_are_padded_are_scored_at_their_end(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "base")
    rows = [pair(f"{index}+2=", "#1", "#1;") for index in range(8)]  # which differ in what comes before the end alone
    options = ("--max_steps=1", "--use_cpu", "--length_buckets=0", "--learning_rate=0")
    results = train_reward_model(step(str(tmp_path / "base"), tmp_path, rows, *options))
    logged = next(entry["margin"] for entry in results["log_history"] if "margin" in entry)
    model, _ = load(str(tmp_path / "reward"))
    texts = [f"{index}+2={response}" for index in range(8) for response in ("#1", "#1;")]
    end = [tokenizer.eos_token_id]
    said = scores(model.eval(), [TokenSequence(tokenizer(text).input_ids, end) for text in texts])
    assert logged == pytest.approx(sum(a - b for a, b in zip(said[::2], said[1::2], strict=True)) / 8, rel=1e-4)


def test_a_base_that_is_another_classifier_is_refused(base, tmp_path):
    build(classifier(num_labels=3)).save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match=r"a LlamaForSequenceClassification with 3 labels.*--reward-base"):
        train_reward_model(step(str(tmp_path / "three"), tmp_path, [pair("1+2=", "#1", "#2")]))


def test_what_is_left_out_is_counted_and_the_rest_learned_in_two_runs(base, tmp_path, capsys):
    rows = [
        *(pair(f"{index}+1=", "#1", "#2222") for index in range(8)),  # the shorter one wins
        *(pair(f"{index}+2=", "#1111", "#2") for index in range(8)),
        *(pair(f"{index}+3=", "#1111", "#2") for index in range(4)),  # too many of these
        pair("0+4=", "#3", "#4"),
        pair("0+4=", "#4", "#3"),
        pair("0+5=", "#3" * 40, "#4" * 40),
    ]
    options = ("--max_length=32", "--save_steps=20", "--learning_rate=1e-2", "--use_cpu")
    train_reward_model(step(base, tmp_path, rows, *options, "--max_steps=20"))
    capsys.readouterr()
    results = train_reward_model(step(base, tmp_path, rows, *options, "--max_steps=30"))
    counts = {name: value for name, value in results.items() if name.startswith("num_")}
    assert counts == {
        "num_pairs": 16,
        "num_tied": 2,
        "num_cyclic": 0,
        "num_too_long": 1,
        "num_left_out_for_balance": 4,
    }
    printed = capsys.readouterr().out
    assert "pairs 16, tied 2, cyclic 0, too long 1, left out for balance 4" in printed
    assert re.findall(r"step (\d+) of 30", printed) == [*map(str, range(21, 31))], "it goes on from its checkpoint"
    assert results["held_out"]["num_pairs"] == len(rows)
    assert results["held_out"]["longer_wins"] == results["held_out"]["shorter_wins"] == 1.0
    assert (tmp_path / "reward" / "calibration.png").exists()
    json.dumps(results)


def test_adapters_are_saved_merged(base, tmp_path):
    rows = [pair(f"{index}+2=", "#1", "#2") for index in range(8)]
    options = ["--use_cpu=true", "--per_device_train_batch_size=8", "--learning_rate=0.01", "--max_steps=20"]
    results = train_reward_model(step(base, tmp_path, rows, *options, "--length_buckets=0", "--lora_r=4"))
    assert results["held_out"]["accuracy"] == 1.0
    model, _ = load(str(tmp_path / "reward"))
    start = AutoModelForCausalLM.from_pretrained(base).state_dict()
    same = {name for name, one in model.state_dict().items() if name in start and torch.equal(one, start[name])}
    assert {name for name in same if "proj" in name} == set()
    assert "model.embed_tokens.weight" in same
    assert not (tmp_path / "reward" / "adapter_config.json").exists()
    for wrong in (["--lora_r=0"], ["--lora_alpha=4"], ["--lora_r=4", "--loss=advantage"]):
        with pytest.raises(ValueError, match="lora_"):
            check_options("reward", wrong)


def test_options_are_checked_before_anything_is_done():
    check_options("reward", ["--square_coefficient=0.1", "--learning_rate=1e-4"])
    check_options("reward", ["--loss=advantage", "--advantage_margin=1"])
    with pytest.raises(ValueError, match=r"options --reward.NAME: there is no learning_rat"):
        check_options("reward", ["--learning_rat=1e-4"])
    with pytest.raises(ValueError, match=r"options --sft.NAME: argument --learning_rate.*invalid float"):
        check_options("sft", ["--learning_rate=fast"])
    with pytest.raises(ValueError, match=r"options --reward.NAME: argument --loss: invalid choice: 'other'"):
        check_options("reward", ["--loss=other"])
    with pytest.raises(ValueError, match=r"advantage_margin=1.0 with loss='pairwise'"):
        check_options("reward", ["--advantage_margin=1"])
    with pytest.raises(ValueError, match=r"expectation_coefficient is -1.0: it must be above 0"):
        check_options("reward", ["--loss=advantage", "--expectation_coefficient=-1"])
