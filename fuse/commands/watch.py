"""Serve the page of a run while it goes on, to this machine alone.

  fuse watch ppo_run

It reads what the run writes into its output directory, and touches nothing of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from fuse.printable import printable
from fuse.run_page.serve import server_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fuse watch`."""
    parser.add_argument("directory", type=Path, metavar="OUTPUT_DIR", help="the output directory of a run")
    parser.add_argument("--port", type=_port, default=8008, help="of 127.0.0.1; 0 for any that is free (default: 8008)")


def run(arguments: argparse.Namespace) -> int:
    """Serve until interrupted."""
    if not arguments.directory.is_dir():
        raise ValueError(f"{arguments.directory} is no directory: give the output directory of a run")
    try:
        server = server_of(arguments.directory, arguments.port)
    except OSError as error:
        raise ValueError(f"cannot serve on port {arguments.port} ({error.strerror}): give another --port") from error
    with server:
        address = f"http://127.0.0.1:{server.server_port}/"
        console = Console(highlight=False)
        console.print(printable(f"{arguments.directory} is at {address} until Ctrl-C"), soft_wrap=True, markup=False)
        server.serve_forever()
    return 0


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give a number from 0 to 65535")
    return int(text)
