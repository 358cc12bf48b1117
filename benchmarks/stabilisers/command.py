"""`fuse bench stabilisers`: what each option against going too far does to the demonstration's policy.

The `rl` step of a recipe is run with and without each option, on several seeds, from one fine-tuned model and with one
reward model. Of each policy, on rows that no step has seen: the mean score of a response to each prompt, the KL of
these responses to the fine-tuned model, in nats a response, and the loss of the responses that people chose, in nats a
token. With an average of weights it is the average that is measured. Rows that the JSON file has are not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fuse.benchmarks.measure import describe_machine
from fuse.benchmarks.options import Row, add_json_option, add_selection, rows_table, tell, write_rows
from fuse.commands.options import add_numbers, check_counts
from fuse.commands.tables import print_table
from fuse.recipe import reward
from fuse.recipe.comparison import sampled_responses
from fuse.recipe.data import data_file
from fuse.recipe.demo import MOST_DIGITS, RL_OPTIONS
from fuse.recipe.training import read_tokenised
from fuse.trainers.data import read_rows
from fuse.trainers.publish import AVERAGE_DIRECTORY
from fuse.training.reading import TokenSequence
from fuse.training.scoring import reference_logprobs, scores

_NONE, _AVERAGE = "none", "ema"
STABILISERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        _NONE: (),
        "clip": ("--reward-clip-range", "-1", "1"),
        "baseline": ("--reward-baseline=reference",),
        _AVERAGE: ("--ema-decay=0.95",),
        "filter": ("--min-reward-variance=0.2",),
        "text": ("--auxiliary-dataset={text}", "--auxiliary-coef=0.1"),
    }
)
"""Options of `fuse train`, by what the table calls them."""
_OPTIONS = ("recipe", "stabilisers", "seeds", "updates")
_COLUMNS = {
    "": "{stabiliser}",
    "score": "{score}",
    "KL, nats": "{kl}",
    "loss of held-out text": "{sft_loss}",
    "s": "{seconds}",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fuse bench stabilisers`."""
    parser.add_argument(
        "--recipe",
        type=Path,
        default=Path("out/recipe"),
        metavar="OUT",
        help="made by `fuse recipe --demo --output-dir OUT --steps sft reward` (default: out/recipe)",
    )
    add_selection(parser, "--stabilisers", list(STABILISERS), "with what, one after the other")
    add_numbers(parser, seeds=([0, 1, 2], "of the runs"), updates=(15, "of each run, of 64 prompts"))
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train and measure, print a table of means and ranges, and write every run to `arguments.json`."""
    check_counts(arguments, "updates")
    recipe: Path = arguments.recipe
    for path in (recipe / "sft", recipe / "reward", data_file(recipe, "rl", held_out=True)):
        if not path.exists():
            raise ValueError(
                f"{path} is missing: make it by `fuse recipe --demo --output-dir {recipe} --steps sft reward`"
            )
    rows = _known(arguments)
    before = _measured(recipe / "sft", recipe, seed=0)
    for seed in arguments.seeds:
        for stabiliser in arguments.stabilisers:
            if not any((row["stabiliser"], row["seed"]) == (stabiliser, seed) for row in rows):
                tell(f"{stabiliser}, seed {seed} ...")
                rows.append({"stabiliser": stabiliser, "seed": seed} | _trained(stabiliser, seed, arguments))
                write_rows(arguments, describe_machine(), _OPTIONS, rows=rows, before=before)
    shown = [{"stabiliser": "fine-tuned", "seconds": "", **_written(before)}, *_means(rows)]
    print_table(rows_table(shown, _COLUMNS))
    return 0


def _known(arguments: argparse.Namespace) -> list[Row]:
    """Rows of the JSON file that were made with the same options."""
    if arguments.json is None or not arguments.json.exists():
        return []
    known = json.loads(arguments.json.read_text(encoding="utf-8"))
    if known["options"]["updates"] != arguments.updates:
        raise ValueError(f"{arguments.json} has runs of {known['options']['updates']} updates: name another file")
    rows: list[Row] = known["rows"]
    return rows


def _trained(stabiliser: str, seed: int, arguments: argparse.Namespace) -> Row:
    recipe, start_s = arguments.recipe, time.monotonic()
    added = [option.format(text=data_file(recipe, "sft")) for option in STABILISERS[stabiliser]]
    with tempfile.TemporaryDirectory() as directory:
        command = [
            *(sys.executable, "-m", "fuse", "train", *RL_OPTIONS),
            *(f"--model={recipe / 'sft'}", f"--reward-model={recipe / 'reward'}"),
            *(f"--dataset={data_file(recipe, 'rl')}", "--prompt-column=prompt", f"--output-dir={directory}"),
            *(f"--seed={seed}", "--report-to=none", "--save-strategy=no", "--trace-steps=0"),
            *(f"--total-episodes={64 * arguments.updates}", *added),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - start_s
        policy = Path(directory, AVERAGE_DIRECTORY) if stabiliser == _AVERAGE else Path(directory)
        return {"seconds": seconds, **_measured(policy, recipe, seed)}


@torch.inference_mode()
def _measured(policy: Path, recipe: Path, seed: int) -> Row:
    """score, kl, sft_loss: as above."""
    prompts = read_rows(data_file(recipe, "rl", held_out=True))
    sampled = sampled_responses(str(policy), prompts, seed=seed, temperature=1.0, max_new_tokens=MOST_DIGITS + 1)
    judge, _ = reward.load(str(recipe / "reward"))
    model, fine_tuned = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (policy, recipe / "sft"))
    own, other = (reference_logprobs(one, sampled, 1.0) for one in (model, fine_tuned))
    tokenizer = AutoTokenizer.from_pretrained(recipe / "sft")
    chosen = [
        TokenSequence(one.prompt_ids, one.chosen_ids)
        for one in read_tokenised(str(data_file(recipe, "sft", held_out=True)), tokenizer)
    ]
    of_text = reference_logprobs(model, chosen, 1.0)
    return {
        "score": statistics.fmean(scores(judge.eval(), sampled)),
        "kl": statistics.fmean(float((a - b).sum()) for a, b in zip(own, other, strict=True)),
        "sft_loss": -sum(float(one.sum()) for one in of_text) / sum(map(len, of_text)),
    }


def _means(rows: Sequence[Row]) -> list[Row]:
    """Over the seeds, with the least and the largest."""
    made = []
    for stabiliser in dict.fromkeys(row["stabiliser"] for row in rows):
        own = [row for row in rows if row["stabiliser"] == stabiliser]
        made.append({"stabiliser": stabiliser} | _written({name: [row[name] for row in own] for name in _FIGURES}))
    return made


_FIGURES = ("score", "kl", "sft_loss", "seconds")


def _written(figures: Mapping[str, Any]) -> Row:
    def text(value: Any) -> str:
        if not isinstance(value, list):
            return f"{value:.3f}"
        return f"{statistics.fmean(value):.3f} ({min(value):.3f} to {max(value):.3f})"

    return {name: text(value) for name, value in figures.items()}
