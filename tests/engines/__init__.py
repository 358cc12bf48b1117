"""Generation engines: one contract for all, and what each promises beside."""
