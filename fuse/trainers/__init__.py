"""The loop of a run, and the trainers that users know: generate, infer, train, over and over."""
