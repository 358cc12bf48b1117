"""Benchmarks, installed as `fuse.benchmarks` and run as `fuse bench NAME`.

Each module NAME has `add_arguments(parser)` and `run(arguments) -> exit status`.
"""
