"""Options against going too far: what they do to a recipe's policy."""
