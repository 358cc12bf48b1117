"""From preference data to an aligned model: supervised fine-tuning, a reward model, reinforcement learning."""
