"""`fuse bench migration`: for how long a sample pauses that moves between engines, computed anew or with its KV.

Two generation workers, as in a run, each on its device. The pause is from the moment the one engine is asked for the
sample to the end of the other's first step with it. Every sample has another prompt: engines remember prefixes.

With several carriers of KV, each has two workers of its own, one pair after the other.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count

import numpy as np
from transformers import PreTrainedModel

from fuse.benchmarks.llama import causal_model
from fuse.benchmarks.measure import alternate, describe_machine
from fuse.benchmarks.options import Row, add_engine_option, add_json_option, add_model_options, tell, write_rows
from fuse.commands.options import add_numbers, check_counts
from fuse.driver.engine_choice import EngineFactory, choose_engine
from fuse.driver.kv_choice import KVCarrier, choose_kv_transfer
from fuse.engines.engine import GenerationRequest, SamplingParams
from fuse.engines.limits import num_positions
from fuse.training.model_spec import ModelSpec
from fuse.workers.calls import gather
from fuse.workers.cluster import Cluster
from fuse.workers.generation_handle import GenerationHandle
from fuse.workers.generation_worker import Departure
from fuse.workers.kv.transfer import MakeKVTransfer
from fuse.workers.weights import put_state_dict

_NEW_TOKENS = 256  # room to go on in until the evict arrives
_POLL_S = 0.01
_OPTIONS = ("engine", "kv_transfer", "context_tokens", "repeats", "model", "vocab_size", "kv_heads")
_LINE = (
    "{engine}, {context_tokens} tokens: {recompute_ms:.1f} ms computed anew, {transfer_ms:.1f} ms with {kv_mib:.1f} "
    "MiB of KV by {kv_transfer}: {ratio:.2f} times as long"
)

Move = tuple[float, int]
"""Seconds that a sample paused, and the bytes of its KV that moved."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fuse bench migration`."""
    add_engine_option(parser)
    parser.add_argument(
        "--kv-transfer", choices=("object_store", "nixl"), nargs="+", default=["object_store"],
        help="what carries KV: Ray's object store, NIXL, or both to compare them (default: object_store)",
    )  # fmt: skip
    add_numbers(parser, context_tokens=([64, 256, 1024, 2048], "tokens of the samples that move"))
    add_model_options(parser)
    add_numbers(parser, repeats=(9, "samples of each length and kind"))
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure every length, print a line each, and write them to `arguments.json`."""
    check_counts(arguments, "context_tokens", "repeats")
    longest = max(arguments.context_tokens)
    context = longest + _NEW_TOKENS
    model = causal_model(arguments.model, context=context, vocab_size=arguments.vocab_size, kv_heads=arguments.kv_heads)
    positions = num_positions(model.config)
    if positions is not None and context > positions:
        raise ValueError(
            f"--context-tokens {longest} and {_NEW_TOKENS} more do not fit the model's {positions} positions: measure "
            "shorter ones"
        )
    rows = []
    carriers: list[KVCarrier] = list(dict.fromkeys(arguments.kv_transfer))
    transfers = [choose_kv_transfer(carrier, "cpu", is_local=True) for carrier in carriers]  # before anything starts
    engine = choose_engine(arguments.engine, max_batch=2)
    for carrier, transfer in zip(carriers, transfers, strict=True):
        with _engines(model, engine, transfer) as (source, target):
            sample_ids = count()
            for context_tokens in arguments.context_tokens:
                requests = _requests(model.config.get_text_config().vocab_size, context_tokens, sample_ids)
                kinds = {with_kv: partial(_move, source, target, requests, with_kv) for with_kv in (False, True)}
                moves = alternate(kinds, arguments.repeats)
                rows.append(_row(arguments.engine, carrier, context_tokens, moves))
                print(_LINE.format(**rows[-1], kv_mib=rows[-1]["kv_bytes"] / 2**20), flush=True)
    if len(carriers) > 1:
        print(format_comparison(rows))
    write_rows(arguments, describe_machine(), _OPTIONS, rows=rows)
    return 0


@contextmanager
def _engines(
    model: PreTrainedModel, engine: EngineFactory, transfer: MakeKVTransfer
) -> Iterator[tuple[GenerationHandle, GenerationHandle]]:
    """Two, on a device each."""
    tell("starting two engines ...")
    with Cluster(2) as cluster:
        make = partial(engine, ModelSpec.of(model), [put_state_dict(model.state_dict())], "cpu")
        source, target = (GenerationHandle.spawn(cluster, device, make, transfer) for device in (0, 1))
        yield source, target


def _row(engine: str, carrier: str, context_tokens: int, moves: Mapping[bool, Sequence[Move]]) -> Row:
    """Milliseconds are medians. moves: by whether KV moved. ratio: how many times as long computing anew takes."""
    recompute_ms, transfer_ms = (1e3 * statistics.median(one for one, _ in moves[with_kv]) for with_kv in (False, True))
    return {
        "engine": engine,
        "kv_transfer": carrier,
        "context_tokens": context_tokens,
        "recompute_ms": recompute_ms,
        "transfer_ms": transfer_ms,
        "kv_bytes": max(num_bytes for _, num_bytes in moves[True]),
        "ratio": recompute_ms / transfer_ms,
    }


def _requests(vocab_size: int, context_tokens: int, sample_ids: Iterator[int]) -> Iterator[GenerationRequest]:
    params = SamplingParams(seed=0, temperature=1.0, max_new_tokens=_NEW_TOKENS)
    for sample_id in sample_ids:
        prompt_ids = np.random.default_rng(sample_id).integers(0, vocab_size, context_tokens).tolist()
        yield GenerationRequest(sample_id=sample_id, prompt_ids=tuple(prompt_ids), params=params)


def _move(
    source: GenerationHandle, target: GenerationHandle, requests: Iterator[GenerationRequest], with_kv: bool
) -> Move:
    departures: list[Departure] = []
    while not departures:  # the sample before ended sooner than it could be taken out
        sample_id = (request := next(requests)).sample_id
        source.submit([request]).result()
        _wait_for_tokens(source, sample_id)
        departures = source.evict([sample_id], with_kv).result()
    target.admit(departures).result()
    _wait_for_tokens(target, sample_id)
    target.evict([sample_id]).result()
    before, after = gather([engine.drain_spans() for engine in (source, target)])
    asked_s = max(span.start_s for span in before if span.name == "evict")
    went_on_s = next(span.end_s for span in after if span.name == "decode")
    kv = departures[0].kv
    assert (kv is not None) == with_kv
    return went_on_s - asked_s, 0 if kv is None else kv.num_bytes


def _wait_for_tokens(engine: GenerationHandle, sample_id: int) -> None:
    while all(progress.sample_id != sample_id for progress in engine.poll(_POLL_S).result()):
        pass


def format_comparison(rows: Sequence[Row]) -> str:
    """The carriers' milliseconds side by side, a line for each context length."""
    sides: dict[int, list[str]] = {}
    for row in rows:
        sides.setdefault(row["context_tokens"], []).append("{transfer_ms:.1f} ms by {kv_transfer}".format_map(row))
    return "\n".join(f"{context_tokens} tokens with KV: {', '.join(those)}" for context_tokens, those in sides.items())
