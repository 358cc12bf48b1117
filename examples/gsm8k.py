"""Teach SmolLM2 word problems by PPO: a real model, its chat template, and a reward by rule.

  python examples/gsm8k.py --questions train.jsonl --num-questions 1024

Without --questions, problems are made up. A file has one JSON object a line, with `question` and `answer`, as GSM8K has
them: the answer ends with `#### 18`.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from fuse import PPOConfig, PPOTrainer
from fuse.benchmarks.smollm2 import resolve
from fuse.benchmarks.word_problems import messages, word_problems
from fuse.commands.models import critic_from_policy
from fuse.commands.output import output_file, write_json
from fuse.commands.results import run_json
from fuse.trainers.data import read_rows

EXACT, WELL_FORMED = 1.0, 0.2
FINAL_NUMBER = re.compile(r"#### (-?\d[\d,]*(?:\.\d+)?)\s*$")
LARGEST_MICRO_BATCH = 8


def score(response: str, answer: str) -> float:
    """1.0 for a response that ends with `#### ` and the answer's number, 0.2 with another number, else 0.0."""
    stated, right = FINAL_NUMBER.search(response), FINAL_NUMBER.search(answer)
    if right is None:
        raise ValueError(f"the answer {answer!r} does not end with a number such as `#### 18`: correct the questions")
    if stated is None:
        return 0.0
    return EXACT if number(stated[1]) == number(right[1]) else WELL_FORMED


def number(text: str) -> float:
    """`1,200` -> 1200.0."""
    return float(text.replace(",", ""))


class Transcript(TrainerCallback):
    """The reward function, which remembers what it has scored, and a line of metrics per update."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.scored: list[tuple[str, str, float]] = []  # question, response, score

    def reward(self, prompts: list[str], responses: list[str], question: list[str], answer: list[str]) -> list[float]:
        scores = [score(*pair) for pair in zip(responses, answer, strict=True)]
        self.scored.extend(zip(question, responses, scores, strict=True))
        return scores

    def exact_share(self, start: int, end: int | None) -> float:
        """Of the responses start..end in the order of their scoring."""
        return mean(points == EXACT for _, _, points in self.scored[start:end])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.global_step == 1:
            print("update  score  exact      kl  tokens  seconds")  # means over responses
        responses = [response for _, response, _ in self.scored[-args.batch_size :]]
        tokens = mean(len(ids) for ids in self.tokenizer(responses)["input_ids"])
        exact = self.exact_share(-args.batch_size, None)
        print(
            f"{state.global_step:3}/{state.max_steps:<2} {logs['objective/scores']:6.3f} {exact:6.0%} "
            f"{logs['objective/kl']:7.3f} {tokens:7.1f} {logs['time/total']:8.1f}",
            flush=True,
        )


def main() -> None:
    arguments = parse_arguments()
    start_s = time.monotonic()
    disable_progress_bar()  # of loading
    model = resolve(arguments.model)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    policy: Any = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    transcript = Transcript(tokenizer)
    micro_batch = math.gcd(arguments.batch, LARGEST_MICRO_BATCH)
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=arguments.output_dir,
            num_devices=arguments.devices,
            total_episodes=arguments.updates * arguments.batch,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=arguments.batch // micro_batch,
            num_mini_batches=2,
            num_ppo_epochs=1,
            learning_rate=arguments.learning_rate,
            kl_coef=0.02,
            response_length=arguments.response_length,
            stop_token="eos",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,  # a copy of the policy
        reward_model=transcript.reward,
        train_dataset=dataset(arguments, tokenizer),
        value_model=critic_from_policy(policy, tokenizer.pad_token_id),
        callbacks=[transcript],
    )
    trainer.remove_callback(PrinterCallback)  # of every metric
    trainer.activity.listen(lambda text: print(f"  {text}", file=sys.stderr, flush=True))  # what is being done
    print(f"{arguments.updates} updates of {arguments.batch} problems each on {arguments.devices} devices", flush=True)
    trainer.train()
    trainer.save_model()
    show(transcript, arguments.batch)
    print(f"\npolicy written to {arguments.output_dir}")
    if arguments.json:
        write_json(arguments.json, run_json(trainer.state.log_history, time.monotonic() - start_s))


def dataset(arguments: argparse.Namespace, tokenizer: Any) -> list[dict[str, Any]]:
    """Rows of `input_ids`, by the chat template, and of what the reward function gets: question and answer."""
    num_questions = arguments.num_questions
    source = read_rows(arguments.questions) if arguments.questions else word_problems(num_questions)
    rows = list(islice(source, num_questions))
    for row in rows:
        score("", row["answer"])  # refuses answers without a number before anything is started
    return [
        {
            "input_ids": tokenizer.apply_chat_template(
                messages(row["question"]), add_generation_prompt=True, return_dict=False
            ),
            "question": row["question"],
            "answer": row["answer"],
        }
        for row in rows
    ]


def show(transcript: Transcript, batch: int) -> None:
    """A few responses of the last update; exact answers in the first, by the untrained model, and in the last."""
    for question, response, points in transcript.scored[-3:]:
        print(f"\n{question}\n{response.strip()}\n[score {points}]")
    before, after = transcript.exact_share(0, batch), transcript.exact_share(-batch, None)
    print(f"\nexact answers: {before:.0%} in the first update, {after:.0%} in the last")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", metavar="PATH", help="the policy (default: smollm2)")
    parser.add_argument("--questions", type=Path, metavar="FILE.jsonl", help="default: made-up word problems")
    parser.add_argument("--num-questions", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--updates", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="prompts per update (default: 32)")
    parser.add_argument("--response-length", type=int, default=96, metavar="N", help="most tokens (default: 96)")
    parser.add_argument("--learning-rate", type=float, default=1e-5, metavar="X", help="default: 1e-5")
    parser.add_argument("--devices", type=int, default=2, metavar="N", help="GPUs, or cores without one (default: 2)")
    parser.add_argument("--output-dir", default="out/gsm8k", metavar="DIR", help="default: out/gsm8k")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write rewards, seconds and phases to FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
