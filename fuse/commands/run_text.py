"""A run in lines: what it is going to do, what an update came to, how an interrupted one goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fuse.commands.results import mean_reward

if TYPE_CHECKING:  # takes seconds to import, of which there is something to tell
    from fuse.trainers.trainer import Trainer


def plan_text(trainer: Trainer) -> str:
    """Batch, updates, devices and tokens."""
    from fuse.config.settings import num_devices

    args, length = trainer.args, trainer.length
    samples = f"{length.samples_per_update} samples an update"
    if length.samples_per_prompt > 1:
        samples += f" ({length.prompts_per_update} prompts x {length.samples_per_prompt} responses)"
    devices = num_devices(args)
    kind = "GPU" if args.accelerator == "cuda" else "CPU core"
    most = length.samples_per_update * args.max_response_tokens
    return (
        f"plan: {samples} of {len(trainer.train_dataset):,} prompts; "
        f"{_count(length.num_updates, 'update')} of {_count(length.optimizer_steps_per_update, 'optimizer step')}; "
        f"{_count(devices, kind)}; responses of up to {args.max_response_tokens:,} tokens, {most:,} an update"
        f"{trained_text(trainer)}"
    )


def trained_text(trainer: Trainer) -> str:
    """How much of the models trains, where something is frozen."""
    parts = []
    for name, model in trainer.trained_models.items():
        total = sum(one.numel() for one in model.parameters())
        trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
        if trained < total:
            parts.append(f"{trained:,} of {name}'s {total:,} weights ({trained / total:.2%})")
    return f"; trains {', '.join(parts)}" if parts else ""


def update_text(logs: Mapping[str, Any]) -> str:
    """An update in a line: what is logged of reward, KL, ends, length, speed, idle time and seconds."""
    parts = [f"reward {mean_reward(logs):.3f}"]
    kl = next((logs[name] for name in ("objective/kl", "kl") if name in logs), None)
    if kl is not None:
        parts.append(f"KL {kl:.3g}")
    if "completions/clipped_ratio" in logs:
        parts.append(f"{1 - logs['completions/clipped_ratio']:.0%} ended by EOS")
    if "completions/mean_length" in logs:
        parts.append(f"{logs['completions/mean_length']:.0f} tokens long")
    if "tokens_per_s/total" in logs:
        parts.append(f"{logs['tokens_per_s/total']:,.0f} tokens/s")
    idle = idle_share(logs)
    if idle is not None:
        parts.append(f"{idle:.0%} idle")
    return ", ".join([*parts, f"{logs['time/total']:.1f} s per update"])


def idle_share(logs: Mapping[str, Any]) -> float | None:
    """Of all devices, on average; None where it is not logged."""
    shares = [value for name, value in logs.items() if name.startswith("idle/")]
    mean = logs.get("idle/mean", sum(shares) / len(shares) if shares else None)
    return None if mean is None else float(mean)


def how_to_go_on(trainer: Trainer) -> str:
    """For who has interrupted `fuse train`."""
    return trainer.how_to_resume.replace(
        "by resume_from_checkpoint=True", "by the same command with --resume-from-checkpoint true"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
