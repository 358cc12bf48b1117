"""Training inside a model worker: stages, their communication, the executor of schedules, the optimizer."""
