"""Every metric that a run logs: what it is called, what it means, its unit, what is healthy.

`docs/metrics.md` is this table, and pages take their words from it. TRL's names keep TRL's meaning.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from fuse.idle_causes import CAUSES


@dataclass(frozen=True, kw_only=True)
class MetricEntry:
    """A metric, or several alike.

    name: with what varies in braces. unit: "" for plain numbers. healthy: "" where there is nothing to watch.
    is_timed: whether two equal runs differ in it.
    """

    name: str
    unit: str
    meaning: str
    healthy: str = ""
    is_timed: bool = False

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        parts = re.split(r"\{[^}]*\}", self.name)
        return re.compile(".+".join(map(re.escape, parts)))


@dataclass(frozen=True, kw_only=True)
class MetricGroup:
    """Metrics under one heading."""

    title: str
    entries: Sequence[MetricEntry]


def _entry(name: str, unit: str, meaning: str, healthy: str = "") -> MetricEntry:
    return MetricEntry(name=name, unit=unit, meaning=meaning, healthy=healthy)


def _timed(name: str, unit: str, meaning: str, healthy: str = "") -> MetricEntry:
    return MetricEntry(name=name, unit=unit, meaning=meaning, healthy=healthy, is_timed=True)


_SPREAD = "Above 0; at 0 all responses score the same, and nothing is learnt"

GROUPS = (
    MetricGroup(
        title="Rewards",
        entries=(
            _entry("objective/scores", "", "PPO: mean score of the responses", "Rises"),
            _entry("objective/scores_std", "", "PPO: standard deviation of the scores", _SPREAD),
            _entry(
                "objective/rlhf_reward",
                "",
                "PPO: mean score, over its baseline and clipped, less the KL penalty",
                "Rises",
            ),
            _entry(
                "objective/scores_over_reference",
                "",
                "PPO: mean score over the reference's",
                "Rises from 0",
            ),
            _entry("objective/scores_clipped", "share", "PPO: scores that `reward_clip_range` changes", "Below 0.5"),
            _entry("objective/non_score_reward", "", "PPO: mean KL penalty of a response, negative where it costs"),
            _entry("reward", "", "Without a critic: mean weighted reward", "Rises"),
            _entry("reward_std", "", "Without a critic: standard deviation of the rewards", _SPREAD),
            _entry(
                "frac_reward_zero_std",
                "share",
                "Groups whose rewards are all equal, or below `min_reward_variance`, and teach nothing",
                "Below 0.5",
            ),
            _entry("spread_filter/groups", "", "Groups below `min_reward_variance`, which teach nothing", "Few"),
            _entry("spread_filter/prompts", "", "PPO: prompts of the dataset that `min_reward_variance` leaves out"),
            _entry("rewards/{function}/mean", "", "Mean reward of one function"),
            _entry("rewards/{function}/std", "", "Its standard deviation"),
            _entry("rewards/errors", "samples", "Samples scored `reward_error_score`", "0"),
            _entry("rewards/accuracies", "share", "Online DPO: pairs whose chosen response gained more", "Above 0.5"),
            _entry("rewards/chosen", "", "Online DPO: beta times the log-ratio to the reference, of chosen responses"),
            _entry("rewards/rejected", "", "The same of rejected ones"),
            _entry("rewards/margins", "", "Chosen less rejected", "Rises"),
            _entry("objective/scores_margin", "", "Online DPO: reward of the chosen response less the rejected one's"),
            _entry("dynamic_sampling/{count}", "", "Groups replaced, rounds taken, and groups left without spread"),
        ),
    ),
    MetricGroup(
        title="Responses",
        entries=(
            _entry("completions/mean_length", "tokens", "Mean length of a response", "No sudden growth or collapse"),
            _entry("completions/min_length", "tokens", "The shortest one's"),
            _entry("completions/max_length", "tokens", "The longest one's"),
            _entry(
                "completions/clipped_ratio",
                "share",
                "Responses cut off: they have no end-of-sequence token",
                "Below 0.3, or raise the greatest length",
            ),
            _entry(
                "completions/{of}_terminated_length",
                "tokens",
                "Mean, min and max length of those that ended by themselves",
            ),
            _entry("val/num_eos_tokens", "tokens", "PPO: end-of-sequence tokens in the padded batch, as TRL counts"),
            _entry("objective/entropy", "nats", "PPO: mean negative log-probability of a whole response"),
            _entry("policy/entropy_avg", "nats", "PPO: mean entropy of a token", "Falls slowly; near 0 is a collapse"),
            _entry("entropy", "nats", "Without a critic: the same", "Falls slowly; near 0 is a collapse"),
            _entry("entropy_coef", "", "Weight of the entropy bonus, where there is one"),
        ),
    ),
    MetricGroup(
        title="Distance from the reference and from the sampler",
        entries=(
            _entry(
                "objective/kl",
                "nats",
                "PPO: mean log-ratio of policy and reference, over whole responses",
                "Grows slowly",
            ),
            _entry("objective/kl_coef", "", "Weight of the KL penalty, where it follows a target"),
            _entry("kl", "nats", "Without a critic: the same per token", "Grows slowly"),
            _entry(
                "objective/kl_quartile_{1 to 4}",
                "nats",
                "The same per token, in each quarter of the responses",
                "Alike; the last alone high: responses drift at their ends",
            ),
            _entry(
                "val/sampler_logprob_diff",
                "nats",
                "Mean distance of the sampler's log-probabilities from the trainer's, before the update",
                "Below 1e-3, in float32 1e-5: more means other weights or another computation",
            ),
            _entry("val/sampler_logprob_diff_max", "nats", "The largest one"),
            _entry(
                "sampling/importance_sampling_ratio/{of}",
                "",
                "Min, mean and max ratio of trainer and sampler",
                "Near 1",
            ),
        ),
    ),
    MetricGroup(
        title="Training",
        entries=(
            _entry("loss", "", "Without a critic: the loss"),
            _entry("loss/policy_avg", "", "PPO: the policy's loss"),
            _entry("policy_loss", "", "Without a critic: the loss without its entropy bonus"),
            _entry("loss/value_avg", "", "PPO: the critic's loss", "Falls"),
            _entry("auxiliary/loss", "nats", "Mean loss of a learnt token of `auxiliary_dataset`", "Does not rise"),
            _entry(
                "critic/explained_variance",
                "",
                "Part of the returns' variance that the critic knew before the update: 1 all of it, 0 none",
                "Above 0, and rises",
            ),
            _entry(
                "policy/approxkl_avg", "nats", "PPO: half the mean squared log-ratio to the policy before", "Below 0.1"
            ),
            _entry("policy/clipfrac_avg", "share", "PPO: tokens whose ratio was clipped", "Below 0.3"),
            _entry("val/clipfrac_avg", "share", "PPO: values that were clipped"),
            _entry("val/ratio", "", "PPO: mean ratio to the policy before", "Near 1"),
            _entry("val/ratio_var", "", "PPO: its variance over micro-batches", "Near 0"),
            _entry(
                "clip_ratio/{side}_{of}",
                "share",
                "Without a critic: what was clipped below, above and in all",
                "Below 0.3",
            ),
            _entry("cispo_clip_ratio", "share", "CISPO: tokens whose weight was clipped"),
            _entry("vespo/phi_seq_mean", "", "VESPO: mean weight of a response"),
            _entry("grad_norm", "", "Without a critic: the policy's gradient norm before clipping", "No jumps"),
            _entry(
                "grad_norm/{role}",
                "",
                "With a critic: each model's gradient norm before clipping, mean over steps",
                "No jumps",
            ),
            _entry("lr", "", "PPO: learning rate"),
            _entry("lr/{role}", "", "A model's own, where it has one"),
            _entry("learning_rate", "", "Without a critic: learning rate"),
            _entry("learning_rate/{role}", "", "A model's own, where it has one"),
        ),
    ),
    MetricGroup(
        title="Speed",
        entries=(
            _timed("tokens_per_s/generation", "tokens/s", "Response tokens by the time in which some engine decoded"),
            _timed(
                "tokens_per_s/training",
                "tokens/s",
                "Tokens of prompts, responses and text that passed through the policy's training, by that phase's time",
            ),
            _timed(
                "tokens_per_s/total",
                "tokens/s",
                "Tokens of prompts and responses, once, by the time of the whole update: what to compare runs by",
            ),
            _timed("time/total", "s", "The update"),
            _timed(
                "time/{phase}", "s", "A phase of it: rollout, or generation and inference; reward, training, weights"
            ),
            _timed("step_time", "s", "The same as `time/total`, by TRL's name"),
            _timed("eps", "samples/s", "Samples a second since the run began or was resumed, rounded down"),
            _timed("speculation/accepted", "share", "Tokens that drafts proposed, and that the policy drew, too"),
            _timed(
                "speculation/tokens_per_step",
                "tokens",
                "Of a sample in a decode step, with drafts or without",
                "Above 1: where drafts do not pay, there are none",
            ),
            _timed("migration/samples", "samples", "Samples that left an engine for another"),
            _timed("migration/bytes", "bytes", "KV that they took along"),
            _timed(
                "memory/{device}", "bytes", "What the workers of a device hold: on GPUs reserved at most, on CPUs now"
            ),
        ),
    ),
    MetricGroup(
        title="Idle time",
        entries=(
            _timed(
                "idle/{device}",
                "share",
                "Time in which no worker of the device computed; of more than 8 devices min, mean and max",
            ),
            *(_timed(f"idle_cause/{cause}", "share", f"Idle: {meaning}", "") for cause, meaning in CAUSES.items()),
            _timed(
                "tail/share", "share", "Of the update's training, in tokens: done before the last sample was generated"
            ),
            _timed(
                "tail/first_step_share", "share", "Of the first optimizer step of what may be trained so, in tokens"
            ),
            _timed("bubble/planned", "share", "Idle share of training in the plan"),
            _timed("bubble/executed", "share", "In fact", "Near the plan"),
            _timed("bubble/serial", "share", "As it would be without fusion", "Above the plan's"),
            _timed("gain/{schedule}", "", "How much faster than by plain 1F1B training was planned, a ratio less one"),
        ),
    ),
    MetricGroup(
        title="Position",
        entries=(
            _entry("episode", "samples", "Samples so far"),
            _entry("num_tokens", "tokens", "Tokens of prompts and responses so far"),
            _entry("epoch", "", "Passes over the dataset so far"),
            _entry("step", "", "Update, or optimizer step where the trainer counts these"),
        ),
    ),
)
"""All metrics, by heading."""


@cache
def entry_of(name: str) -> MetricEntry | None:
    """Of a logged name; None for what only a user's function or callback logs. Plain names go before patterns."""
    entries = [entry for group in GROUPS for entry in group.entries]
    plain = next((entry for entry in entries if entry.name == name), None)
    return plain or next((entry for entry in entries if entry.pattern.fullmatch(name)), None)


def is_timed(name: str) -> bool:
    """Whether two equal runs differ in it."""
    entry = entry_of(name)
    return entry is not None and entry.is_timed


def document() -> str:
    """`docs/metrics.md`."""
    lines = [
        "# Metrics of an update",
        "",
        "What every update logs, to `trainer.state.log_history`, `report_to` and the page of a run. Names that TRL has",
        "keep its meaning. Shares are parts of 1. Where no device is named, figures are of all of them together.",
        "Evaluations log the same as `eval_...`.",
    ]
    for group in GROUPS:
        lines += ["", f"## {group.title}", "", "| name | unit | meaning | healthy |", "|---|---|---|---|"]
        lines += [f"| `{one.name}` | {one.unit} | {one.meaning} | {one.healthy} |" for one in group.entries]
    return "\n".join([*lines, ""])
