"""Several processes train as one does."""
