"""The trainer end to end, on tiny models and real workers."""
