"""The smallest PPO run: a tiny Llama, made up on the spot, learns to answer in even digits. A minute on two cores.

python examples/ppo.py
"""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from fuse import PPOConfig, PPOTrainer
from fuse.commands.models import critic_from_policy
from fuse.demo.tokenizer import arithmetic_tokenizer


def even_digits(prompts: list[str], responses: list[str]) -> list[float]:
    """The share of even digits among a response's characters: a reward function in the form that `fuse train` takes."""
    return [sum(character in "02468" for character in response) / max(1, len(response)) for response in responses]


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
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir="out",
            num_devices=2,
            total_episodes=20 * 32,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=4,
            response_length=8,
            learning_rate=3e-3,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=even_digits,
        train_dataset=[{"input_ids": tokenizer(f"{a}+{b}=").input_ids} for a in range(8) for b in range(8)],
        value_model=critic_from_policy(policy, tokenizer.pad_token_id),
    )
    trainer.train()
    rewards = [entry["objective/scores"] for entry in trainer.state.log_history]
    print(f"share of even digits: {rewards[0]:.2f} in the first update, {rewards[-1]:.2f} in the last")


if __name__ == "__main__":
    main()
