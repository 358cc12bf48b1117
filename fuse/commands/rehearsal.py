"""Choose examples for a policy to rehearse: of prompts and responses in clusters, the best of each by score.

  fuse rehearsal --model OUT/policy --data good.jsonl --reward-model OUT/reward --clusters 50 --out rehearsal.jsonl
  fuse rehearsal ... --reward-function rewards:score --per-cluster 4

Rows of the data are {"prompt": ..., "response": ...}, or preferences as of `fuse recipe`, of which the chosen response
counts: strings, or lists of chat messages. A reward function is called as that of `fuse train` with PPO. Clusters are
of k-means on the policy's mean hidden states. What is chosen is written as rows {"prompt": ..., "response": ...}, with
the number of their cluster and their score.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from fuse.commands.model_path import check_model_path
from fuse.commands.models import load_classifier, load_policy, load_reading_tokenizer
from fuse.commands.options import check_counts
from fuse.commands.output import output_file, write_json
from fuse.commands.progress import run_progress
from fuse.commands.reward_function import load_reward_function
from fuse.engines.limits import num_positions
from fuse.printable import printable
from fuse.recipe.preferences import check_bad_rows
from fuse.recipe.rehearsal import (
    Example,
    best_of_each,
    clusters_of,
    examples_of,
    in_pieces,
    scores_by_cluster,
    tokens_of,
)
from fuse.trainers.data import read_rows
from fuse.trainers.lone_engine import lone_device
from fuse.trainers.rewards import RewardFunction, call_reward_function
from fuse.training.scoring import mean_hidden_states, scores
from schedules.files import write_whole

Tell = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fuse rehearsal`."""
    parser.usage = "%(prog)s --model POLICY --data DATA --reward-model PATH --clusters K --out FILE [OPTIONS]"
    parser.add_argument("--model", required=True, metavar="PATH", help="policy: a causal language model")
    parser.add_argument("--data", required=True, metavar="DATA", help="a file, directory or name, as for `fuse train`")
    parser.add_argument("--reward-model", metavar="PATH", help="sequence classifier that scores responses")
    parser.add_argument(
        "--reward-function", metavar="MODULE:FUNCTION", help="Python function that scores responses instead"
    )
    parser.add_argument("--clusters", type=int, required=True, metavar="K", help="how many there are to be")
    parser.add_argument("--per-cluster", type=int, default=1, metavar="N", help="rows kept of each (default: 1)")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave out rows without prompt and response")
    parser.add_argument("--seed", type=int, default=0, help="of the clusters (default: 0)")
    parser.add_argument("--out", type=output_file, required=True, metavar="FILE", help="JSON lines to write")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write clusters, scores and seconds to FILE")


def run(arguments: argparse.Namespace) -> int:
    """Embed, cluster, score and choose."""
    start_s = time.monotonic()
    _check(arguments)
    function = load_reward_function(arguments.reward_function) if arguments.reward_function else None
    console = Console(highlight=False)
    disable_progress_bar()
    with run_progress(console, "rehearsal") as progress:
        tell = progress.activity.tell
        tell("data: reading")
        rows = read_rows(arguments.data)
        tell("embedding: loading the policy")
        tokenizer, policy = load_reading_tokenizer(arguments.model), _ready(load_policy(arguments.model))
        examples, bad, num_repeated = examples_of(rows, tokenizer, num_positions(policy.config))
        kind = "prompts with a response"
        check_bad_rows(bad, len(rows), skips=arguments.skip_bad_rows, tell=progress.announce, what=kind)
        pieces = in_pieces(examples, tell, "embedding")
        embeddings = [one for piece in pieces for one in mean_hidden_states(policy, [of.tokens for of in piece])]
        del policy
        tell("clusters: k-means")
        clusters = clusters_of(np.array(embeddings), arguments.clusters, arguments.seed)
        if function is not None:
            scored = _scores_of_function(function, examples, tokenizer, tell)
        else:
            scored = _scores_of_model(arguments.reward_model, examples, tell)
    kept = best_of_each(clusters, scored, arguments.per_cluster)
    lines = [
        {
            "prompt": examples[index].prompt,
            "response": examples[index].response,
            "cluster": clusters[index],
            "score": scored[index],
        }
        for index in kept
    ]
    write_whole(arguments.out, "".join(json.dumps(line) + "\n" for line in lines))
    of_clusters = scores_by_cluster(clusters, scored)
    results: dict[str, Any] = {
        "num_rows": len(rows),
        "num_bad": len(bad),
        "num_repeated": num_repeated,
        "num_kept": len(kept),
        "mean_score": float(np.mean(scored)),
        "kept_mean_score": float(np.mean([scored[index] for index in kept])),
        "clusters": [
            {"num_responses": len(own), "mean_score": float(np.mean(own)), "best_score": max(own)}
            for own in of_clusters
        ],
        "seconds": time.monotonic() - start_s,
    }
    text = (
        f"{len(kept)} of {len(examples)} responses kept, of {len(of_clusters)} clusters: mean score "
        f"{results['kept_mean_score']:.3f}, of all {results['mean_score']:.3f}; written to {arguments.out}"
    )
    console.print(printable(text), markup=False, soft_wrap=True)
    if arguments.json:
        write_json(arguments.json, results)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raises: ValueError for what can be seen to be wrong before anything is loaded."""
    check_counts(arguments, "clusters", "per_cluster")
    if (arguments.reward_model is None) == (arguments.reward_function is None):
        raise ValueError("give --reward-model PATH or --reward-function MODULE:FUNCTION: a response needs one score")
    for path in (arguments.model, arguments.reward_model):
        if path is not None:
            check_model_path(path)


def _scores_of_model(path: str, examples: Sequence[Example], tell: Tell) -> list[float]:
    """As it reads them, by its own tokenizer."""
    tell("scoring: loading the reward model")
    tokenizer, model = load_reading_tokenizer(path), _ready(load_classifier(path))
    pieces = in_pieces(examples, tell, "scoring")
    read = ([tokens_of(one.prompt, one.response, tokenizer) for one in piece] for piece in pieces)
    found = [score for sequences in read for score in scores(model, sequences)]
    if not np.isfinite(found).all():
        raise ValueError(f"the model at {path} gives scores that are no finite numbers: check its weights")
    return found


def _scores_of_function(
    function: RewardFunction, examples: Sequence[Example], tokenizer: Any, tell: Tell
) -> list[float]:
    """Of texts as a run decodes them."""
    found: list[float] = []
    for piece in in_pieces(examples, tell, "scoring"):
        prompts, responses = (
            tokenizer.batch_decode([list(ids) for ids in of_all], skip_special_tokens=True)
            for of_all in ([one.tokens.prompt_ids for one in piece], [one.tokens.response_ids for one in piece])
        )
        rows = [one.row for one in piece]
        found += call_reward_function(function, prompts, responses, [one.columns for one in piece], rows)
    return found


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    """To compute with, on the accelerator where there is one."""
    device: Any = lone_device()
    untyped: Any = model
    ready: PreTrainedModel = untyped.to(device).eval()
    return ready
