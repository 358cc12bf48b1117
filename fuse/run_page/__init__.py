"""One page for a whole run, offline and in one file: curves, where time went, devices, rollouts and training."""
