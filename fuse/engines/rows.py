"""The running batch: one row per sample, on the host as objects and on the device as columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fuse.engines.engine import GeneratedToken, GenerationRequest
from fuse.engines.filters import row_filters, see
from fuse.engines.limits import check_logprob
from fuse.ops.logit_filters import Filters, sample_filtered_tokens
from fuse.ops.sampling import sample_tokens

# Lines of the integer columns. LENGTH and POSITION are neighbours: both grow by one in every step.
_INPUT, _LENGTH, _POSITION, _SEED, _SAMPLE = range(5)


@dataclass(slots=True)
class Row:
    """A running sample. Its last token is not in the cache yet: it is the next step's input.

    shared_tokens: that were copied from another row, until a token tells of them.
    """

    request: GenerationRequest
    response_ids: list[int]
    logprobs: list[float]
    num_cached: int
    shared_tokens: int = 0

    @property
    def last_token_id(self) -> int:
        return self.response_ids[-1] if self.response_ids else self.request.prompt_ids[-1]

    def append(self, token_id: int, logprob: float) -> GeneratedToken:
        self.response_ids.append(token_id)
        self.logprobs.append(logprob)
        self.num_cached += 1
        params = self.request.params
        finished = token_id in params.stop_token_ids or len(self.response_ids) == params.max_new_tokens
        shared_tokens, self.shared_tokens = self.shared_tokens, 0
        return GeneratedToken(self.request.sample_id, token_id, logprob, finished, shared_tokens)

    def to_request(self) -> GenerationRequest:
        return replace(self.request, response_ids=tuple(self.response_ids), logprobs=tuple(self.logprobs))


class Rows:
    """Rows 0..len-1 are live; the columns hold what a step needs of them, so a step copies nothing to the device."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self._rows: list[Row] = []
        self._row_of: dict[int, int] = {}
        self._integers = torch.zeros(5, max_rows, dtype=torch.int64, device=device)
        self._temperatures = torch.zeros(max_rows, device=device)
        self._filters: Filters | None = None
        self._has_changed = False  # since the filters were made

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def __contains__(self, sample_id: int) -> bool:
        return sample_id in self._row_of

    def __getitem__(self, row: int) -> Row:
        return self._rows[row]

    def index(self, sample_id: int) -> int:
        return self._row_of[sample_id]

    @property
    def input_ids(self) -> Tensor:
        """int64 [rows]."""
        return self._integers[_INPUT, : len(self)]

    @property
    def lengths(self) -> Tensor:
        """Cached tokens, which is also the input's position, int64 [rows]."""
        return self._integers[_LENGTH, : len(self)]

    def extend(self, requests: Sequence[GenerationRequest], *, shared_tokens: int = 0) -> None:
        """Append rows whose tokens, but for the last, are in the cache; so many of each are copied from another row."""
        first = len(self)
        for request in requests:
            response_ids, logprobs = list(request.response_ids), list(request.logprobs)
            row = Row(request, response_ids, logprobs, request.num_tokens - 1, shared_tokens)
            self._row_of[request.sample_id] = len(self._rows)
            self._rows.append(row)
        new = self._rows[first:]
        columns = [
            (row.last_token_id, row.num_cached, len(row.response_ids), row.request.params.seed, row.request.sample_id)
            for row in new
        ]
        device = self._integers.device
        self._integers[:, first : len(self)] = torch.tensor(columns, dtype=torch.int64).T.to(device)
        self._temperatures[first : len(self)] = torch.tensor([row.request.params.temperature for row in new]).to(device)
        self._has_changed = True

    def sample(self, logits: Tensor) -> list[GeneratedToken]:
        """Draw every row's next token from its logits, [rows, vocab]; finished rows stay until removed.

        Raises: ValueError where logits are not numbers.
        """
        integers = self._integers[:, : len(self)]
        how = self._temperatures[: len(self)], integers[_SEED], integers[_SAMPLE], integers[_POSITION]
        if self._has_changed:
            self._filters, self._has_changed = self._make_filters(logits.shape[1]), False
        if self._filters is None:
            tokens, logprobs = sample_tokens(logits, *how)
        else:
            see(self._filters, self.input_ids)
            tokens, logprobs = sample_filtered_tokens(logits, *how, self._filters)
        integers[_INPUT] = tokens
        integers[_LENGTH : _POSITION + 1] += 1
        # One transfer to the host: float64 holds token ids and fp32 exactly.
        token_ids, token_logprobs = torch.stack((tokens.double(), logprobs.double())).tolist()
        for row, logprob in zip(self._rows, token_logprobs, strict=True):
            check_logprob(row.request.sample_id, len(row.response_ids), logprob)
        return [
            row.append(int(token_id), logprob)
            for row, token_id, logprob in zip(self._rows, token_ids, token_logprobs, strict=True)
        ]

    def remove(self, row: int) -> int:
        """Forget a row; the last one takes its place. Returns where the last one was: its slot moves as well."""
        last = len(self._rows) - 1
        del self._row_of[self._rows[row].request.sample_id]
        moved = self._rows.pop()
        if row != last:
            self._rows[row] = moved
            self._row_of[moved.request.sample_id] = row
            self._integers[:, row] = self._integers[:, last]
            self._temperatures[row] = self._temperatures[last]
        self._has_changed = True
        return last

    def _make_filters(self, num_tokens: int) -> Filters | None:
        params = [row.request.params for row in self._rows]
        token_ids = ((*row.request.prompt_ids, *row.response_ids) for row in self._rows)
        return row_filters(params, token_ids, num_tokens, self._integers.device)
