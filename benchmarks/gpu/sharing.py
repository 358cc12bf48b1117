"""How decoding and training slow one another down on one device, in two processes: what `tail_sharing` asks for.

On CPUs both are bound to one core, which is what a device is there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection

import torch

from fuse.benchmarks.gpu.requests import requests_of
from fuse.benchmarks.gpu.setup import Row, Setup, random_model, synchronize
from fuse.benchmarks.peer_process import PeerProcess
from fuse.engines.transformers import TransformersEngine
from fuse.interstage.tail import MOST_BESIDE, Sharing

_WINDOW_S = {"cuda": 3.0, "cpu": 0.3}
_SAMPLES_TRAINED = 2


def check(setup: Setup) -> Iterator[Row]:
    """A row: how many times as long steps of each take beside the other as alone."""
    if setup.device == "cpu":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    num_samples = MOST_BESIDE
    with PeerProcess("the process that trains", _serve_training, setup, context=setup.context) as trainer:
        decode = _decode(setup, num_samples)
        assert trainer.answer() == "ready"
        trainer.send("train")
        time.sleep(_WINDOW_S[setup.device])
        training_alone_s = trainer.ask("pause")
        decoding_alone_s = decode()
        trainer.send("train")
        decoding_s = decode()
        training_s = trainer.ask("pause")
        trainer.send("end")
    factors = max(1.0, decoding_s / decoding_alone_s), max(1.0, training_s / training_alone_s)
    detail = f"decoding, training; alone their steps take {decoding_alone_s:.4f} s and {training_alone_s:.4f} s"
    if setup.device == "cuda":  # a tiny model on a core that others use tells nothing
        sharing = Sharing(decoding=factors[0], training=factors[1])
        verdict = "pays" if sharing.pays(num_replicas=1) else "does not pay"
        detail += f"; tail_sharing={factors[0]:.2f} {factors[1]:.2f}, which {verdict} for one replica"
    yield Row(
        name=f"training beside {num_samples} samples",
        measured=f"x {factors[0]:.2f}, x {factors[1]:.2f}",
        ok=True,
        detail=detail,
    )


def _decode(setup: Setup, num_samples: int) -> Callable[[], float]:
    """What decodes for a while, and tells the mean seconds of a step in which all samples get a token."""
    num_tokens = num_samples + setup.decode_steps  # the first ones decode while others are prefilled
    max_context = setup.prompt_tokens + num_tokens
    model = random_model(setup, "actor", setup.dtype)
    engine = TransformersEngine(model, max_batch=num_samples, max_context=max_context)

    def decode() -> float:
        num_steps, seconds, end_s = 0, 0.0, time.perf_counter() + _WINDOW_S[setup.device]
        while time.perf_counter() < end_s:
            for request in requests_of(setup, num_samples, num_tokens):
                engine.submit(request)
            start_s = time.perf_counter()
            while tokens := engine.step():
                synchronize(setup)
                now_s = time.perf_counter()
                if len(tokens) == num_samples:
                    num_steps, seconds = num_steps + 1, seconds + now_s - start_s
                start_s = now_s
        return seconds / num_steps

    decode()  # to warm up
    return decode


def _serve_training(connection: Connection, setup: Setup) -> None:
    """Trains from "train" on; "pause" ends it, and is told the mean seconds of a step."""
    step = partial(_step, random_model(setup, "actor", torch.float32).requires_grad_(), setup)
    step()
    connection.send("ready")
    while connection.recv() != "end":
        num_steps, start_s = 0, time.perf_counter()
        while not connection.poll():
            step()
            num_steps += 1
        seconds = time.perf_counter() - start_s
        connection.recv()
        connection.send(seconds / max(1, num_steps))


def _step(model: torch.nn.Module, setup: Setup) -> None:
    """Forward and backward of a micro-batch."""
    tokens = torch.ones(
        _SAMPLES_TRAINED, setup.prompt_tokens + setup.response_tokens, dtype=torch.long, device=setup.device
    )
    with torch.autocast(setup.device, torch.bfloat16, enabled=setup.device == "cuda"):
        model(input_ids=tokens, labels=tokens).loss.backward()
    synchronize(setup)
