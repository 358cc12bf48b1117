"""Generation and inference at the granularity of samples: who generates, who scores, and when."""
