"""What a run's own operations cost, learnt from their spans: the cost model of the live policies.

A decode step is timed with its batch and context, and batches of all sizes count: steps of the long tail are the most
and the last, and of few samples alone nobody learns what a sample costs. What drafts take and bring is learnt apart
(`decode_calibration.py`). Steps that computed prompts anew tell what prefill adds; inference is timed with its tokens
and the micro-batches that hold them; KV transfers are timed at both ends, but for those that lost some. Until enough
has been seen of prefill, it counts as one model's part of inference; until enough has been seen of transfers, they
count as copies through a host's memory. What calls to score took beyond inference is their hand-out, and what grows of
it with their tokens counts as inference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from fuse.interstage.costs import CostModel, fit_affine, fit_linear, non_negative_least_squares
from fuse.interstage.decode_calibration import DecodeCalibration, DecodeStep
from fuse.interstage.fading import Fading
from fuse.trace import Span

_KEPT = 512
"""Latest rows of each kind that are fitted."""

TRANSFER_S = 3e-3
TRANSFER_BYTE_S = 1 / 2e9
"""Assumed of KV transfers on one host until some have been timed: a hop through shared memory."""


class Calibration:
    """Collects measurements over iterations; `costs` is the model fitted to them. num_scoring: models that score."""

    def __init__(self, kv_bytes_per_token: int, inference_batch_tokens: int, num_scoring: int) -> None:
        self._kv_bytes_per_token, self._inference_batch_tokens = kv_bytes_per_token, inference_batch_tokens
        self._num_scoring = num_scoring
        self._decode = DecodeCalibration()
        self._filled: Fading[DecodeStep] = Fading(_KEPT)
        self._inference: Fading[tuple[float, float]] = Fading(_KEPT)
        self._calls: Fading[tuple[float, float]] = Fading(_KEPT)
        self._moved: dict[str, Fading[tuple[float, float]]] = {end: Fading(_KEPT) for end in ("evict", "admit")}
        self._iteration = 0

    def begin_iteration(self) -> None:
        """What has been learnt so far is one iteration older, and counts less: see `fading.py`."""
        self._iteration += 1

    def add(self, spans: Iterable[Span]) -> None:
        """Learn from one worker's spans of an iteration."""
        inference: dict[tuple[object, object], float] = {}
        decode = []
        for span in spans:
            sizes = span.arguments
            if span.name == "decode":
                decode.append((sizes, span.duration_s))
            elif span.name in self._moved and sizes["bytes"] and not sizes.get("lost"):
                self._moved[span.name].add(self._iteration, [(_number(sizes["bytes"]), span.duration_s)])
            elif span.category == "infer":  # the models that score take turns on the same sequences
                key = sizes["call"], sizes["tokens"]
                stages = _number(sizes.get("stages", 1))  # of which this device runs one; the others take as long
                inference[key] = inference.get(key, 0.0) + span.duration_s * stages
        self._inference.add(self._iteration, ((_number(tokens), seconds) for (_, tokens), seconds in inference.items()))
        self._filled.add(self._iteration, self._decode.add(decode, self._iteration))

    def add_calls(self, calls: Iterable[tuple[float, float]]) -> None:
        """Learn from calls to score, as who calls sees them: tokens, and seconds until the answer."""
        self._calls.add(self._iteration, calls)

    def costs(self) -> CostModel | None:
        """The costs, or None before anything is known of decoding or inference."""
        decode, now = self._decode.costs(self._iteration), self._iteration
        if decode is None or len({tokens for tokens, _ in self._inference}) < 2:
            return None
        batch_tokens = self._inference_batch_tokens
        inference_s, inference_token_s = fit_linear(
            "inference",
            [(math.ceil(tokens / batch_tokens), tokens, seconds) for tokens, seconds in self._inference],
            self._inference.weights(now),
        )
        prefill_s, prefill_token_s = inference_s / self._num_scoring, inference_token_s / self._num_scoring
        beyond_decoding = [(step.prefill_tokens, step.seconds - decode.model_s(step)) for step in self._filled]
        is_beyond = np.array([seconds > 0 for _, seconds in beyond_decoding], dtype=np.bool_)
        prefill = [row for row in beyond_decoding if row[1] > 0]
        if len({tokens for tokens, _ in prefill}) >= 2:
            prefill_s, prefill_token_s = fit_affine("prefill", prefill, self._filled.weights(now)[is_beyond])
        transfer_s, transfer_byte_s = TRANSFER_S, TRANSFER_BYTE_S
        if all(len({num_bytes for num_bytes, _ in rows}) >= 2 for rows in self._moved.values()):
            ends = [fit_affine("transfer", list(rows), rows.weights(now)) for rows in self._moved.values()]
            transfer_s, transfer_byte_s = (sum(coefficients) for coefficients in zip(*ends, strict=True))
        costs = CostModel(
            step_s=decode.step_s,
            sample_s=decode.sample_s,
            context_s=decode.context_s,
            prefill_s=prefill_s,
            prefill_token_s=prefill_token_s,
            inference_s=inference_s,
            inference_token_s=inference_token_s,
            inference_batch_tokens=batch_tokens,
            kv_bytes_per_token=self._kv_bytes_per_token,
            transfer_s=transfer_s,
            transfer_byte_s=transfer_byte_s,
            speculation=decode.speculation,
        )
        if not self._calls:
            return costs
        beyond_s = np.array([seconds - costs.inference(int(tokens)) for tokens, seconds in self._calls])
        sizes = np.array([(1.0, tokens) for tokens, _ in self._calls])
        roots = np.sqrt(self._calls.weights(now))
        hand_out_s, token_s = non_negative_least_squares(sizes * roots[:, None], beyond_s * roots).tolist()
        return replace(costs, hand_out_s=hand_out_s, inference_token_s=inference_token_s + token_s)


def _number(value: object) -> float:
    assert isinstance(value, int)
    return float(value)
