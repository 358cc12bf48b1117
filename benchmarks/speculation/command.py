"""`fuse bench speculation`: how much faster drafts make the transformers engine, for batches of one size each.

Every side decodes the same samples at temperature 1 in turn, plain decoding first, on one thread, prefills included;
that all draw the same tokens is checked. How far is drafted, engines decide as in a run; they learn in the first round,
which is not counted. With --devices whole rollouts are measured instead, generation and inference (`rollouts.py`):

  fuse bench speculation --model smollm2 --batches 1 16 --prompts 8 --new-tokens 512
  fuse bench speculation --model smollm2 --devices 2 --batches 32 --drafts int8 --new-tokens 64

With --agreement nothing is timed: how often are drafts right that read all keys, or a window (`agreement.py`)?

  fuse bench speculation --model smollm2 --agreement 0 1600 2900 --drafts int8 --prompts 2 --new-tokens 640
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedModel

from fuse.benchmarks.llama import causal_model
from fuse.benchmarks.measure import alternate, describe_machine
from fuse.benchmarks.options import Row, add_json_option, add_model_options, add_selection, tell, telling, write_rows
from fuse.benchmarks.smollm2 import resolve
from fuse.benchmarks.speculation.prompts import questions, random_prompts
from fuse.commands.options import add_numbers, check_counts
from fuse.engines.engine import GenerationRequest, SamplingParams
from fuse.engines.speculation import SpeculationKind
from fuse.engines.transformers import TransformersEngine

_PLAIN = "off"
_DRAFTS = ("int8", "int4", "ngram")
_OPTIONS = (
    "model", "vocab_size", "kv_heads", "batches", "drafts", "devices", "agreement", "prompts", "new_tokens",
    "prompt_tokens", "warmup", "repeats",
)  # fmt: skip
_LINE = (
    "{draft}, batch {batch}: {tokens_per_s:.0f} tokens/s, plain {plain_tokens_per_s:.0f}: {ratio:.2f} times as fast; "
    "{tokens_per_step:.2f} tokens a step, {right:.0%} of {num_drafted} drafted ones right"
)


@dataclass(frozen=True, slots=True)
class _Decoded:
    """Of one round: the tokens by sample, and what they took."""

    token_ids: Mapping[int, Sequence[int]]
    seconds: float
    num_steps: int  # of samples: a step of four counts four times
    num_drafted: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fuse bench speculation`."""
    add_model_options(parser)
    add_numbers(parser, batches=([1, 4, 16], "samples decoded side by side, or rolled out"))
    add_selection(parser, "--drafts", ("auto", *_DRAFTS), f"what drafts (default: {' '.join(_DRAFTS)})")
    parser.set_defaults(drafts=list(_DRAFTS))
    add_numbers(
        parser,
        new_tokens=(256, "tokens of each response"),
        prompt_tokens=(32, "tokens of each prompt, where the model is a random one"),
        prompts=(1, "samples of a round at least, as many at once as the batch has"),
        warmup=(1, "rounds before these"),
        repeats=(3, "counted rounds"),
    )
    parser.add_argument("--devices", type=int, metavar="N", help="measure whole rollouts on so many cores")
    text = "count how often drafts are right, after N tokens of solved problems"
    parser.add_argument("--agreement", type=int, nargs="+", metavar="N", help=text)
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure every batch with every draft, print a line each, and write them to `arguments.json`."""
    check_counts(arguments, "batches", "devices", "prompts", "new_tokens", "prompt_tokens", "repeats")
    if arguments.warmup < 0:
        raise ValueError(f"--warmup is {arguments.warmup}: it is a number of rounds, 0 or more")
    if arguments.agreement and arguments.devices:
        raise ValueError("--agreement is of engines by themselves: leave out --devices")
    if any(num_tokens < 0 for num_tokens in arguments.agreement or []):
        raise ValueError(f"--agreement is {min(arguments.agreement)}: it is a number of tokens, 0 or more")
    if arguments.agreement and not _selves(arguments.drafts):
        raise ValueError("--agreement is of drafts that are the model itself: name one with --drafts, as int8")
    torch.set_num_threads(1)
    path = None if arguments.model is None else resolve(arguments.model)
    context = arguments.new_tokens + max(arguments.agreement or [0])
    context += arguments.prompt_tokens if path is None else 512
    model = causal_model(path, context=context, vocab_size=arguments.vocab_size, kv_heads=arguments.kv_heads)
    rows = list(_agreement(model, path, arguments)) if arguments.agreement else _timed(model, path, arguments)
    write_rows(arguments, describe_machine(), _OPTIONS, rows=rows)
    return 0


def _agreement(model: PreTrainedModel, path: str | None, arguments: argparse.Namespace) -> Iterator[Row]:
    from fuse.benchmarks.speculation.agreement import AGREEMENT_LINE, agreement_rows

    prompts = [prompt for num_tokens in arguments.agreement for prompt in _prompts(model, path, arguments, num_tokens)]
    engines = _engines(model, _selves(arguments.drafts), 1, prompts, arguments.new_tokens)
    for row in agreement_rows(engines, prompts, arguments.new_tokens):
        print(AGREEMENT_LINE.format(**row), flush=True)
        yield row


def _selves(drafts: Sequence[SpeculationKind]) -> list[SpeculationKind]:
    """Those that are the model itself."""
    return [kind for kind in drafts if kind not in ("auto", "ngram")]


def _prompts(
    model: PreTrainedModel, path: str | None, arguments: argparse.Namespace, num_before: int = 0
) -> list[list[int]]:
    """num_before: tokens in front of each."""
    num_prompts = arguments.prompts if arguments.agreement else max(arguments.prompts, *arguments.batches)
    if path is None:
        return random_prompts(model, num_prompts, num_before + arguments.prompt_tokens)
    return questions(path, num_prompts, num_before)


def _timed(model: PreTrainedModel, path: str | None, arguments: argparse.Namespace) -> list[Row]:
    prompts = _prompts(model, path, arguments)
    rows: list[Row] = []
    for batch in arguments.batches:
        if arguments.devices:
            rows += _rolled_out(model, prompts[:batch], arguments)
        else:
            rows += _decoded(model, batch, prompts[: max(batch, arguments.prompts)], arguments)
    return rows


def _rolled_out(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], arguments: argparse.Namespace
) -> Iterator[Row]:
    from fuse.benchmarks.speculation.rollouts import ROLLOUT_LINE, rollout_row  # seconds

    for draft in arguments.drafts:
        rounds = arguments.warmup + arguments.repeats
        tell(f"{draft}, {len(prompts)} samples on {arguments.devices} devices: {rounds} rounds ...")
        row = rollout_row(model, prompts, _PLAIN, draft, arguments)
        print(ROLLOUT_LINE.format(**row), flush=True)
        yield row


def _decoded(
    model: PreTrainedModel, batch: int, prompts: Sequence[Sequence[int]], arguments: argparse.Namespace
) -> Iterator[Row]:
    engines = _engines(model, arguments.drafts, batch, prompts, arguments.new_tokens)
    sides = {kind: partial(_decode, kind, engine, prompts, arguments.new_tokens) for kind, engine in engines.items()}
    tell(f"batch {batch}: {arguments.warmup + arguments.repeats} rounds of {len(sides)} ...")
    decoded = alternate(sides, arguments.repeats, arguments.warmup)
    for draft in arguments.drafts:
        row = _row(draft, batch, decoded[draft], decoded[_PLAIN])
        print(_LINE.format(**row), flush=True)
        yield row


def _engines(
    model: PreTrainedModel,
    kinds: Sequence[SpeculationKind],
    batch: int,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
) -> dict[str, TransformersEngine]:
    """By what drafts, plain decoding first."""
    limits: dict[str, Any] = {"max_batch": batch, "max_context": max(map(len, prompts)) + new_tokens}
    # Engines that draft change linear layers. Weights are shared: where they lie makes up to a twentieth of the time.
    weights = {id(one): one for one in chain(model.parameters(), model.buffers())}
    engines = {_PLAIN: TransformersEngine(copy.deepcopy(model, weights), **limits)}
    return engines | {kind: TransformersEngine(model, speculation=kind, **limits) for kind in kinds}


def _decode(kind: str, engine: TransformersEngine, prompts: Sequence[Sequence[int]], new_tokens: int) -> _Decoded:
    """All samples, which are as long as they may be."""
    began_s = time.perf_counter()
    params = SamplingParams(seed=0, temperature=1.0, max_new_tokens=new_tokens)
    for sample_id, prompt_ids in enumerate(prompts):
        engine.submit(GenerationRequest(sample_id=sample_id, prompt_ids=tuple(prompt_ids), params=params))
    token_ids: dict[int, list[int]] = {sample_id: [] for sample_id in range(len(prompts))}
    num_steps = num_drafted = 0
    with telling(lambda: f"{kind}: {sum(map(len, token_ids.values()))} of {len(prompts) * new_tokens} tokens"):
        while tokens := engine.step():
            num_steps += len({token.sample_id for token in tokens})
            for token in tokens:
                token_ids[token.sample_id].append(token.token_id)
                num_drafted += token.drafted_tokens
    return _Decoded(token_ids, time.perf_counter() - began_s, num_steps, num_drafted)


def _row(draft: str, batch: int, decoded: Sequence[_Decoded], plain: Sequence[_Decoded]) -> Row:
    """Seconds are medians over rounds; counts are of all of them.

    Raises: AssertionError where a token differs from plain decoding's.
    """
    for one, other in zip(decoded, plain, strict=True):
        assert one.token_ids == other.token_ids, f"{draft} at batch {batch} has changed tokens"
    seconds, plain_seconds = (statistics.median(one.seconds for one in side) for side in (decoded, plain))
    num_tokens = plain[0].num_steps
    num_drafted, num_steps = sum(one.num_drafted for one in decoded), sum(one.num_steps for one in decoded)
    num_right = num_tokens * len(decoded) - num_steps
    return {
        "draft": draft,
        "batch": batch,
        "num_tokens": num_tokens,
        "seconds": seconds,
        "plain_seconds": plain_seconds,
        "tokens_per_s": num_tokens / seconds,
        "plain_tokens_per_s": num_tokens / plain_seconds,
        "ratio": plain_seconds / seconds,
        "tokens_per_step": num_tokens * len(decoded) / num_steps,
        "num_drafted": num_drafted,
        "right": num_right / num_drafted if num_drafted else 0.0,
    }
