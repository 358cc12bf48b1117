"""The reward model's loss, and what it is trained on."""

import json
import re

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid

from fuse.demo.tokenizer import arithmetic_tokenizer
from fuse.demo.warmup import small_llama
from fuse.recipe.configs import RewardStepConfig
from fuse.recipe.reward import SquareRegularisedTrainer, train_reward_model
from fuse.recipe.training import TrainingStep, check_options


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


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_the_loss_is_the_pairwise_one_and_the_squares(base, tmp_path, coefficient):
    config = RewardStepConfig(
        output_dir=str(tmp_path), square_coefficient=coefficient, bf16=False, use_cpu=True, report_to="none"
    )
    pairs = Dataset.from_list(
        [{"chosen_ids": [3, 4, 1], "rejected_ids": [3, 1]}, {"chosen_ids": [5, 1], "rejected_ids": [6, 7, 1]}]
    )
    trainer = SquareRegularisedTrainer(
        model=base, args=config, train_dataset=pairs, processing_class=arithmetic_tokenizer()
    )
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(pairs)))
    chosen, rejected = (
        torch.stack([trainer.model(torch.tensor([one[name]])).logits[0, 0] for one in pairs])
        for name in ("chosen_ids", "rejected_ids")
    )
    expected = -logsigmoid(chosen - rejected).mean() + coefficient * (chosen**2 + rejected**2).mean()
    torch.testing.assert_close(loss, expected)


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


def test_options_are_checked_before_anything_is_done():
    check_options("reward", ["--square_coefficient=0.1", "--learning_rate=1e-4"])
    with pytest.raises(ValueError, match=r"options --reward.NAME: there is no learning_rat"):
        check_options("reward", ["--learning_rat=1e-4"])
    with pytest.raises(ValueError, match=r"options --sft.NAME: argument --learning_rate.*invalid float"):
        check_options("sft", ["--learning_rate=fast"])
