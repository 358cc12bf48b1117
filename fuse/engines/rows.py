"""The running batch: one row per sample, on the host as objects and on the device as columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fuse.engines.engine import GeneratedToken, GenerationRequest
from fuse.engines.filters import row_filters, see
from fuse.engines.inputs import Inputs
from fuse.engines.limits import check_logprob
from fuse.ops.logit_filters import Filters, sample_filtered_tokens
from fuse.ops.sampling import sample_tokens

# Lines of the integer columns. The first three are what steps change.
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

    @property
    def num_left(self) -> int:
        """Tokens that the response may still get."""
        return self.request.params.max_new_tokens - len(self.response_ids)

    def append(self, token_id: int, logprob: float, drafted_tokens: int = 0) -> GeneratedToken:
        """Raises: ValueError where the log-probability is not a number."""
        check_logprob(self.request.sample_id, len(self.response_ids), logprob)
        self.response_ids.append(token_id)
        self.logprobs.append(logprob)
        self.num_cached += 1
        params = self.request.params
        finished = token_id in params.stop_token_ids or len(self.response_ids) == params.max_new_tokens
        shared_tokens, self.shared_tokens = self.shared_tokens, 0
        return GeneratedToken(self.request.sample_id, token_id, logprob, finished, shared_tokens, drafted_tokens)

    def to_request(self) -> GenerationRequest:
        return replace(self.request, response_ids=tuple(self.response_ids), logprobs=tuple(self.logprobs))


@dataclass(frozen=True, slots=True, eq=False)
class Verification:
    """A step in which rows take, beside their last tokens, what a draft proposed to follow them: row after row.

    drafts: of each row. inputs: each row's last token and its draft. ahead: how far each is from its row's last token,
    int64 [tokens]. seen: for each input its row's inputs up to itself, repeated to one width, int64 [tokens, width].
    """

    drafts: Sequence[Sequence[int]]
    inputs: Inputs
    ahead: Tensor
    seen: Tensor


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
    def inputs(self) -> Inputs:
        """Every row's last token, whose position is the number of its cached tokens."""
        return Inputs(self._integers[_INPUT, : len(self)], self._integers[_LENGTH, : len(self)])

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
        filters = self._current_filters(logits.shape[1])
        if filters is None:
            tokens, logprobs = sample_tokens(logits, *how)
        else:
            tokens, logprobs = sample_filtered_tokens(logits, *how, filters)
        integers[_INPUT] = tokens
        integers[_LENGTH : _POSITION + 1] += 1
        drawn = zip(self._rows, *_to_host(tokens, logprobs), strict=True)
        return [row.append(token_id, logprob) for row, token_id, logprob in drawn]

    def draw(self, logits: Tensor, slots: Tensor, ahead: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """What rows would draw from logits [tokens, vocab] some tokens ahead of their next one.

        slots, ahead: the row of each and how far ahead, int64 [tokens]. seen: what the penalty knows beside the row's
        own, int64 [tokens, any number]. Returns tokens and log-probabilities [tokens]; rows stay as they are.
        """
        integers = self._integers[:, slots]
        how = self._temperatures[slots], integers[_SEED], integers[_SAMPLE], integers[_POSITION] + ahead
        filters = self._current_filters(logits.shape[1])
        if filters is None:
            return sample_tokens(logits, *how)
        filters = filters.at(slots)
        see(filters, seen)
        return sample_filtered_tokens(logits, *how, filters)

    def verification(self, drafts: Sequence[Sequence[int]]) -> Verification:
        """Of what a draft proposed for each row, of tokens that the model knows."""
        ids = [[row.last_token_id, *draft] for row, draft in zip(self._rows, drafts, strict=True)]
        width = max(map(len, ids))
        columns = [
            (slot, ahead, *(own[min(ahead, before)] for before in range(width)))
            for slot, own in enumerate(ids)
            for ahead in range(len(own))
        ]
        table = torch.tensor(columns, device=self._integers.device)
        slots, ahead, seen = table[:, 0].contiguous(), table[:, 1].contiguous(), table[:, 2:]
        token_ids = seen.gather(1, ahead.unsqueeze(1)).squeeze(1)
        inputs = Inputs(token_ids, self._integers[_LENGTH, slots] + ahead, slots)
        return Verification(drafts, inputs, ahead, seen)

    def verify(self, logits: Tensor, verification: Verification) -> list[GeneratedToken]:
        """Draw from the logits of a verification, [tokens, vocab], as far as rows draw what was proposed for them.

        Each row gets the tokens on which it and its draft agree, and one more; those of a row follow one another.

        Raises: ValueError where logits are not numbers.
        """
        slots = verification.inputs.slots
        assert slots is not None
        token_ids, logprobs = _to_host(*self.draw(logits, slots, verification.ahead, verification.seen))
        generated: list[GeneratedToken] = []
        first = 0
        for row, draft in zip(self._rows, verification.drafts, strict=True):
            for number, proposed in enumerate((*draft, None)):
                token_id = token_ids[first + number]
                generated.append(row.append(token_id, logprobs[first + number], 0 if number else len(draft)))
                if generated[-1].finished or token_id != proposed:
                    break
            first += len(draft) + 1
        columns = [(row.last_token_id, row.num_cached, len(row.response_ids)) for row in self._rows]
        device = self._integers.device
        self._integers[: _POSITION + 1, : len(self)] = torch.tensor(columns, dtype=torch.int64).T.to(device)
        if self._filters is not None and self._filters.seen is not None:
            emitted = [(self._row_of[token.sample_id], token.token_id) for token in generated]
            rows, ids = torch.tensor(emitted, device=device).T
            self._filters.seen[rows, ids] = True
        return generated

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

    def _current_filters(self, num_tokens: int) -> Filters | None:
        """They know every row's tokens, its last one included."""
        if self._has_changed:
            params = [row.request.params for row in self._rows]
            token_ids = ((*row.request.prompt_ids, *row.response_ids) for row in self._rows)
            self._filters = row_filters(params, token_ids, num_tokens, self._integers.device)
            self._has_changed = False
        elif self._filters is not None:
            see(self._filters, self.inputs.token_ids.unsqueeze(1))
        return self._filters


def _to_host(tokens: Tensor, logprobs: Tensor) -> tuple[list[int], list[float]]:
    """In one transfer: float64 holds token ids and fp32 exactly."""
    token_ids, token_logprobs = torch.stack((tokens.double(), logprobs.double())).tolist()
    return [int(token_id) for token_id in token_ids], token_logprobs
