"""`fuse bench speculation --agreement`: how often drafts name the token that the model draws, by context and reading.

The model goes on with texts by plain decoding. Then it does so again, one text at a time, with drafts of what it drew,
so that all are right and each step goes on by as many tokens and one. Before each, what is measured drafts in the same
place with the same noise, each token after the right ones and whatever it would have drafted itself: reading all keys,
and again with the window that engines read where keys are many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch

from fuse.benchmarks.options import Row, tell
from fuse.engines.engine import GenerationRequest, SamplingParams
from fuse.engines.inputs import Inputs
from fuse.engines.quantized_draft import WINDOW, QuantizedSelf
from fuse.engines.rows import Row as EngineRow
from fuse.engines.rows import Rows
from fuse.engines.speculation import FixedLength, Speculation
from fuse.engines.transformers import TransformersEngine

AGREEMENT_LINE = "{draft}, {keys} of {from_tokens} to {to_tokens} keys: {right:.3f} of {num_drafted} drafted right"
_AT_ONCE = 8
"""Tokens drafted in each place, as engines do at most."""
_READINGS = {"all": None, "window": WINDOW}


class Taught:
    """A draft that knows what follows, and counts how often another one, a row at a time, would have named it.

    responses: by sample.
    """

    reads_window = False

    def __init__(self, draft: QuantizedSelf, responses: Mapping[int, Sequence[int]]) -> None:
        self._draft, self._responses = draft, responses
        self.drafted, self.right = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
        """By reading, and the least power of two that the context, the tokens before the drafted one, does not pass."""

    def prepare(self) -> None:
        self._draft.prepare()

    def propose(self, rows: Rows, counts: Sequence[int]) -> list[list[int]]:
        (row,), (count,) = rows, counts
        first = len(row.response_ids)
        following = list(self._responses[row.request.sample_id][first : first + count])
        for keys, window in _READINGS.items():
            for ahead, expected in enumerate(following):
                place = torch.zeros(1, dtype=torch.int64)
                token_ids = torch.tensor([following[ahead - 1] if ahead else row.last_token_id])
                context = row.num_cached + ahead + 1
                inputs = Inputs(token_ids, rows.inputs.positions + ahead, place)
                seen = torch.tensor([following[:ahead]], dtype=torch.int64)
                logits = self._draft.logits(inputs, context, 1, window)
                drawn, _ = rows.draw(logits, place, place + ahead, seen)
                self.drafted[keys, _bin(context)] += 1
                self.right[keys, _bin(context)] += int(drawn) == expected
        return [following]

    def release(self, row: EngineRow) -> None:
        self._draft.release(row)

    def forget(self) -> None:
        self._draft.forget()


def agreement_rows(
    engines: Mapping[str, TransformersEngine], prompts: Sequence[Sequence[int]], new_tokens: int
) -> Iterator[Row]:
    """A row for each draft, reading and range of context.

    engines: of one model, the first without drafts, all others with the model itself; they measure from then on.

    Raises: AssertionError where a token differs from plain decoding's.
    """
    (_, plain), *drafting = engines.items()
    params = SamplingParams(seed=0, temperature=1.0, max_new_tokens=new_tokens)
    requests = [GenerationRequest(sample_id=id, prompt_ids=tuple(ids), params=params) for id, ids in enumerate(prompts)]
    responses = {}
    for request in requests:
        responses[request.sample_id] = _decoded(plain, request)
        tell(f"text {request.sample_id + 1} of {len(requests)}: {len(request.prompt_ids)} tokens and {new_tokens} more")
    for kind, engine in drafting:
        speculation = engine._speculation
        assert speculation is not None
        assert isinstance(speculation.draft, QuantizedSelf)
        taught = Taught(speculation.draft, responses)
        engine._speculation = Speculation(taught, FixedLength(_AT_ONCE), plain._vocab_size)
        for request in requests:
            assert _decoded(engine, request) == responses[request.sample_id], f"{kind} has changed tokens"
            tell(f"{kind}: text {request.sample_id + 1} of {len(requests)}")
        for keys, most in sorted(taught.drafted):
            num_drafted = taught.drafted[keys, most]
            yield {
                "draft": kind,
                "keys": keys,
                "from_tokens": most // 2 + 1,
                "to_tokens": most,
                "num_drafted": num_drafted,
                "right": taught.right[keys, most] / num_drafted,
            }


def _bin(context: int) -> int:
    return 1 << (context - 1).bit_length()


def _decoded(engine: TransformersEngine, request: GenerationRequest) -> list[int]:
    engine.submit(request)
    token_ids: list[int] = []
    while tokens := engine.step():
        token_ids += [token.token_id for token in tokens]
    return token_ids
