"""Benchmarks, installed as `fuse.benchmarks` and run as `fuse bench NAME`: a package each.

Its module `command` has `add_arguments(parser)` and `run(arguments) -> exit status`, as commands of `fuse.commands` do.
"""
