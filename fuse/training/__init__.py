"""What one device trains and scores, in whatever process: a rank, its micro-batches, its models."""
