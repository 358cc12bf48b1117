"""Selective rehearsal's examples: of prompts and responses in clusters, the best of each (arXiv 2309.10202).

A policy that goes on training on them does not forget what it can do, and they stand for all that there is. The paper's
text was not at hand: that its clusters are those of SimCSE's embeddings, and that a cluster's examples are chosen by
score, is known from secondary sources, how many of each is not. Here an embedding is the policy's own, the mean of its
last hidden states over prompt and response, and clusters are of k-means by their Euclidean distance.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from fuse.recipe.preferences import BadRow, texts_of
from fuse.trainers.response_tokens import Text, with_responses
from fuse.training.reading import TokenSequence

_PIECE = 64
"""Sequences between two words of progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A prompt and a response, both text or both chat messages, and the policy's tokens of them.

    row: in its file, from 0. columns: others that it has there.
    """

    row: int
    prompt: Text
    response: Text
    tokens: TokenSequence
    columns: Mapping[str, Any]


def examples_of(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, num_positions: int | None
) -> tuple[list[Example], list[BadRow], int]:
    """Rows with a response, or with the chosen one of a preference; bad ones; how many say what one before says.

    num_positions: the most tokens that the policy can read, if there is such a number.
    """
    others = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in _TEXTS]
    found: dict[str, Example] = {}
    bad, num_repeated = [], 0
    for index, row in enumerate(rows):
        try:
            prompt, response = texts_of(row, "chosen" if "chosen" in row else "response")
            key = json.dumps((prompt, response))
            if key in found:
                num_repeated += 1
                continue
            tokens = tokens_of(prompt, response, tokenizer)
            if num_positions is not None and len(tokens) > num_positions:
                raise ValueError(f"longer than the model's {num_positions} positions")
        except ValueError as error:
            bad.append(BadRow(index, str(error)))
        else:
            columns = {name: row.get(name) for name in others}
            found[key] = Example(row=index, prompt=prompt, response=response, tokens=tokens, columns=columns)
    return list(found.values()), bad, num_repeated


_TEXTS = ("prompt", "response", "chosen", "rejected")


def tokens_of(prompt: Text, response: Text, tokenizer: PreTrainedTokenizerBase) -> TokenSequence:
    """As a run of reinforcement learning would have them.

    Raises: ValueError where there are none.
    """
    prompt_ids, response_ids = with_responses(prompt, (response,), tokenizer)
    return TokenSequence(prompt_ids, response_ids)


def in_pieces(examples: Sequence[Example], tell: Callable[[str], None], what: str) -> Iterator[Sequence[Example]]:
    """Some at a time, telling how many are done."""
    for start in range(0, len(examples), _PIECE):
        tell(f"{what}: {start} of {len(examples)} responses")
        yield examples[start : start + _PIECE]


def clusters_of(embeddings: NDArray[np.float32], num_clusters: int, seed: int) -> list[int]:
    """Which cluster each row [examples, hidden] is in; by scikit-learn's k-means, its starts drawn from the seed.

    Raises: ValueError for fewer rows than clusters, or without scikit-learn.
    """
    if len(embeddings) < num_clusters:
        raise ValueError(f"{num_clusters} clusters of {len(embeddings)} responses: ask for fewer, or give more")
    try:
        from sklearn.cluster import KMeans  # takes a second
    except ModuleNotFoundError as error:
        if error.name != "sklearn":
            raise
        raise ValueError("rehearsal needs scikit-learn: pip install 'fuse-rlhf[recipe]'") from error
    found = KMeans(num_clusters, n_init="auto", random_state=seed).fit_predict(embeddings)
    return [int(cluster) for cluster in found]


def best_of_each(clusters: Sequence[int], scores: Sequence[float], per_cluster: int) -> list[int]:
    """Indices of the highest scores of each cluster, by cluster and score; of equal scores the first."""
    order = sorted(range(len(clusters)), key=lambda index: (clusters[index], -scores[index]))
    return [index for _, own in groupby(order, key=clusters.__getitem__) for index in islice(own, per_cluster)]


def scores_by_cluster(clusters: Sequence[int], scores: Sequence[float]) -> list[list[float]]:
    """The scores of each cluster that is not empty, in the order of clusters."""
    found: dict[int, list[float]] = {}
    for cluster, score in zip(clusters, scores, strict=True):
        found.setdefault(cluster, []).append(score)
    return [found[cluster] for cluster in sorted(found)]
