"""The smallest GRPO run: a tiny Llama, made up on the spot, learns to answer in even digits. A minute on two cores.

python examples/grpo.py
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from fuse import GRPOConfig, GRPOTrainer
from fuse.demo.tokenizer import arithmetic_tokenizer


def even_digits(completions: list[str], **kwargs: Any) -> list[float]:
    """The share of even digits among a completion's characters: a reward function as TRL's trainers call it."""
    return [sum(character in "02468" for character in text) / max(1, len(text)) for text in completions]


def main() -> None:
    set_seed(0)
    tokenizer = arithmetic_tokenizer()
    policy = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=even_digits,
        args=GRPOConfig(
            output_dir="out",
            num_devices=2,
            max_steps=20,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=4,
            num_generations=8,
            max_completion_length=8,
            learning_rate=3e-3,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=[{"prompt": f"{a}+{b}="} for a in range(8) for b in range(8)],
        processing_class=tokenizer,
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history]
    print(f"share of even digits: {rewards[0]:.2f} in the first update, {rewards[-1]:.2f} in the last")


if __name__ == "__main__":
    main()
