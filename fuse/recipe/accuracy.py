"""How right a reward model is on pairs that it has not seen, and how right it thinks it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_NUM_BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Pairs whose responses differ by so many tokens, and the share of them that is scored right."""

    least_tokens: int
    most_tokens: int
    num_pairs: int
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Pairs of which the model is about as sure: how sure on average, and the share that is right."""

    num_pairs: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """longer_wins, shorter_wins: accuracy where the chosen response is the longer or the shorter one; None without any.

    bins: from the least sure to the surest. calibration_error: the mean of |confidence - accuracy| over pairs, by bins
    (ECE).
    """

    num_pairs: int
    accuracy: float
    longer_wins: float | None
    shorter_wins: float | None
    by_length: list[Bucket]
    bins: list[Bin]
    calibration_error: float


def accuracy_of(margins: Sequence[float], differences: Sequence[int], buckets: Sequence[int]) -> Accuracy:
    """margins: the chosen response's score less the rejected one's. differences: of their lengths, in tokens. buckets:
    of each pair, by |difference|. An equal score is half right."""
    margin, difference, bucket = np.asarray(margins, float), np.asarray(differences), np.asarray(buckets)
    right = np.where(margin == 0, 0.5, margin > 0)
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    edges = np.linspace(0.5, 1, _NUM_BINS + 1)[1:-1]
    bin_of = np.searchsorted(edges, confidence, side="right")
    bins = [
        Bin(
            num_pairs=int((bin_of == index).sum()),
            confidence=float(confidence[bin_of == index].mean()),
            accuracy=float(right[bin_of == index].mean()),
        )
        for index in np.unique(bin_of)
    ]
    return Accuracy(
        num_pairs=len(margin),
        accuracy=float(right.mean()),
        longer_wins=float(right[difference > 0].mean()) if (difference > 0).any() else None,
        shorter_wins=float(right[difference < 0].mean()) if (difference < 0).any() else None,
        by_length=[
            Bucket(
                least_tokens=int(np.abs(difference[bucket == index]).min()),
                most_tokens=int(np.abs(difference[bucket == index]).max()),
                num_pairs=int((bucket == index).sum()),
                accuracy=float(right[bucket == index].mean()),
            )
            for index in np.unique(bucket)
        ],
        bins=bins,
        calibration_error=sum(one.num_pairs * abs(one.confidence - one.accuracy) for one in bins) / len(margin),
    )


def save_calibration(accuracy: Accuracy, path: Path) -> None:
    """Draw accuracy over confidence, with the number of pairs behind each point, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], color="grey", linestyle="--", label="as sure as it is right")
    axes.plot([one.confidence for one in accuracy.bins], [one.accuracy for one in accuracy.bins], marker="o")
    for one in accuracy.bins:
        axes.annotate(str(one.num_pairs), (one.confidence, one.accuracy), xytext=(4, -10), textcoords="offset points")
    axes.set_title(
        f"{accuracy.accuracy:.0%} of {accuracy.num_pairs} held-out pairs right, "
        f"calibration error {accuracy.calibration_error:.3f}"
    )
    axes.set_xlabel("confidence, sigmoid(|difference of scores|)")
    axes.set_ylabel("share of pairs right")
    axes.set_xlim(0.48, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
