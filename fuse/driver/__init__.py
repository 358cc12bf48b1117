"""What decides: which workers a run has, how a rollout goes through them, and when they start."""
