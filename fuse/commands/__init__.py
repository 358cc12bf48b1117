"""One module per subcommand of `fuse`, each with `add_arguments(parser)` and `run(arguments) -> exit status`."""
