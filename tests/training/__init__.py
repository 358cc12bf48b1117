"""What model workers do with models."""
