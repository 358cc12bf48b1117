"""Teach a small model to add, from nothing: no download, a few minutes on two cores.

A small Llama first imitates worked sums by a careful teacher, then by one who slips in two steps of three: it is
able to add, and mostly wrong. PPO or GRPO rewards exact answers, on as many devices (CPU cores) as you say. At the end:
the learning curve, where the time went, and a trace.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from fuse.commands.lora import add_lora_arguments, lora_config
from fuse.commands.models import critic_from_policy
from fuse.commands.options import check_counts
from fuse.commands.output import output_file, write_json
from fuse.commands.progress import run_progress
from fuse.commands.results import RunResults
from fuse.commands.run_text import trained_text
from fuse.config.grpo import GRPOConfig
from fuse.config.ppo import PPOConfig
from fuse.demo.plot import save_curve, tenth_means, terminal_curve
from fuse.demo.task import SumTask, exact_completion, exact_match, prompt_text
from fuse.demo.tokenizer import arithmetic_tokenizer
from fuse.demo.warmup import WarmupProgress, small_llama, warm_up
from fuse.printable import printable
from fuse.threads import torch_threads
from fuse.trainers.grpo import GRPOTrainer
from fuse.trainers.ppo import PPOTrainer
from fuse.trainers.trainer import Trainer

BATCH_SIZE = 64
MICRO_BATCH_SIZE = 8
NUM_GENERATIONS = 8
SLIP_PROBABILITY = 0.65


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fuse demo`."""
    parser.usage = "%(prog)s [OPTIONS]"
    parser.add_argument("--devices", type=int, default=2, metavar="N", help="CPU cores to run on (default: 2)")
    parser.add_argument("--algorithm", choices=("ppo", "grpo"), default="ppo", help="what to train by (default: ppo)")
    parser.add_argument("--updates", type=int, default=60, metavar="N", help="updates of 64 answers (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, problems and sampling (default: 0)")
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("out/demo"),
        metavar="DIR",
        help="for curve, traces, policy (default: out/demo)",
    )
    add_lora_arguments(parser)
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write rewards, seconds and phases to FILE")


def run(arguments: argparse.Namespace) -> int:
    """Warm up, train, and show what came of it."""
    check_counts(arguments, "devices", "updates")
    lora_config(arguments)  # what it refuses, it refuses now
    console, start_s = Console(highlight=False), time.monotonic()
    disable_progress_bar()  # of saving
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    task, tokenizer = SumTask(), arithmetic_tokenizer()
    policy = small_llama(tokenizer, seed=arguments.seed)
    console.print(f"A Llama of {policy.num_parameters():,} weights learns sums such as {prompt_text((7, 2, 5))}")
    warmup_s = supervised_warm_up(policy, tokenizer, task, arguments.seed, console)

    trainer = MAKERS[arguments.algorithm](policy, tokenizer, task, arguments)
    if arguments.lora_r is not None:
        console.print(trained_text(trainer).removeprefix("; "))
    with run_progress(console, f"{trainer.NAME} on {arguments.devices} devices") as progress:
        progress.watch(trainer)
        trainer.train()
    trainer.save_model(str(arguments.output_dir / "policy"))

    results = RunResults.from_log(trainer.state.log_history)
    seconds = time.monotonic() - start_s
    phases_s = {"warm-up": warmup_s, **results.phases_s}
    phases_s["start and stop"] = seconds - sum(phases_s.values())
    show(console, results, seconds, phases_s, arguments.output_dir, trainer)
    if arguments.json:
        write_json(
            arguments.json, {"rewards": results.rewards, "seconds": seconds, "phases": phases_s, "idle": results.idle}
        )
    return 0


def supervised_warm_up(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: SumTask, seed: int, console: Console
) -> float:
    """Imitate the two teachers; returns seconds."""
    start_s, last = time.monotonic(), ""
    # So small a model gains nothing by more threads, which collapse on busy cores.
    with console.status("supervised warm-up") as status, torch_threads(1):

        def report(teacher: str, progress: WarmupProgress) -> None:
            nonlocal last
            last = f"loss {progress.loss:.2f}, {progress.exact:.0%} of answers right"
            elapsed_s = time.monotonic() - start_s
            status.update(f"supervised warm-up, {teacher}: step {progress.step}, {last}, {elapsed_s:.0f} s")

        warm_up(policy, tokenizer, task, seed=seed, slip_probability=SLIP_PROBABILITY, report=report)
    elapsed_s = time.monotonic() - start_s
    console.print(f"supervised warm-up: {elapsed_s:.0f} s, {last}")
    return elapsed_s


def make_ppo_trainer(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: SumTask, arguments: argparse.Namespace
) -> PPOTrainer:
    """The trainer, as a script would make it."""
    num_prompts = arguments.updates * BATCH_SIZE
    config = PPOConfig(
        output_dir=str(arguments.output_dir),
        num_devices=arguments.devices,
        use_cpu=True,
        seed=arguments.seed,
        total_episodes=num_prompts,
        per_device_train_batch_size=MICRO_BATCH_SIZE,
        gradient_accumulation_steps=BATCH_SIZE // MICRO_BATCH_SIZE,
        num_mini_batches=2,
        num_ppo_epochs=2,
        learning_rate=learning_rate(arguments),
        warmup_steps=0.25,
        kl_coef=0.01,
        lam=0.95,
        temperature=1.0,
        stop_token="eos",
        response_length=task.max_response_tokens,
        report_to="none",
        save_strategy="no",
        trace_steps=max(1, arguments.updates // 10),
    )
    problems = islice(task.problems(3 * arguments.seed + 2), num_prompts)
    return PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=exact_match,
        train_dataset=[{"input_ids": tokenizer(prompt_text(terms))["input_ids"]} for terms in problems],
        value_model=critic_from_policy(policy, tokenizer.pad_token_id),
        peft_config=lora_config(arguments),
        value_peft_config=lora_config(arguments),
    )


def make_grpo_trainer(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: SumTask, arguments: argparse.Namespace
) -> GRPOTrainer:
    """The same for GRPO: as many answers, eight to a problem."""
    steps_per_update = 4
    config = GRPOConfig(
        output_dir=str(arguments.output_dir),
        num_devices=arguments.devices,
        use_cpu=True,
        seed=arguments.seed,
        max_steps=arguments.updates * steps_per_update,
        per_device_train_batch_size=MICRO_BATCH_SIZE,
        steps_per_generation=BATCH_SIZE // MICRO_BATCH_SIZE,
        num_iterations=2,
        gradient_accumulation_steps=BATCH_SIZE // MICRO_BATCH_SIZE * 2 // steps_per_update,
        num_generations=NUM_GENERATIONS,
        epsilon_high=0.28,
        learning_rate=learning_rate(arguments),
        warmup_steps=0.25,
        max_completion_length=task.max_response_tokens,
        report_to="none",
        save_strategy="no",
        trace_steps=max(1, arguments.updates // 10) * steps_per_update,
    )
    problems = islice(task.problems(3 * arguments.seed + 2), arguments.updates * BATCH_SIZE // NUM_GENERATIONS)
    return GRPOTrainer(
        model=policy,
        reward_funcs=exact_completion,
        args=config,
        train_dataset=[{"prompt": prompt_text(terms)} for terms in problems],
        processing_class=tokenizer,
        peft_config=lora_config(arguments),
    )


def learning_rate(arguments: argparse.Namespace) -> float:
    """Adapters start from no update at all, and take larger steps than weights do."""
    return 2e-4 if arguments.lora_r is None else 1e-3


MAKERS: Mapping[str, Callable[..., Trainer]] = {"ppo": make_ppo_trainer, "grpo": make_grpo_trainer}


def show(
    console: Console,
    results: RunResults,
    seconds: float,
    phases_s: Mapping[str, float],
    output_dir: Path,
    trainer: Trainer,
) -> None:
    """Print curve, times and paths; write the curve's picture."""
    first, last = tenth_means(results.rewards)
    console.print("\nmean reward (share of exact answers) of each update")
    console.print(terminal_curve(results.rewards))
    console.print(
        f"first tenth {first:.3f}, last tenth {last:.3f}: {last / first:.2f} times as many\n" if first else ""
    )
    table = Table(title=f"where {seconds:.0f} s went", title_justify="left", box=None)
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for phase, phase_s in phases_s.items():
        table.add_row(phase, f"{phase_s:.1f}", f"{phase_s / seconds:.0%}")
    console.print(table)
    console.print(
        f"idle during {trainer.NAME}: " + ", ".join(f"{device} {share:.0%}" for device, share in results.idle.items())
    )
    curve = output_dir / "learning_curve.png"
    save_curve(results.rewards, curve)
    last_trace = trainer.state.global_step // trainer.args.trace_steps * trainer.args.trace_steps
    trace = output_dir / "traces" / f"iteration-{last_trace:05d}.json"
    written = {"learning curve": curve, "trace": f"{trace} (open in ui.perfetto.dev)", "policy": output_dir / "policy"}
    console.print()
    for name, path in written.items():
        console.print(printable(f"{name:16}{path}"), soft_wrap=True, markup=False)
