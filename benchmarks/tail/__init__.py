"""The long tail of rollouts, simulated: what policies, drafts and training in it save of whole updates."""
