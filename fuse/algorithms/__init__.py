"""Algorithms as pure functions: from scored samples to advantages, from hidden states to losses."""
