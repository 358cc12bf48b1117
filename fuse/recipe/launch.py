"""`accelerate launch` that ends with the status of what it has launched: `python -m fuse.recipe.launch OPTIONS`."""

from __future__ import annotations

import logging
import sys
from subprocess import CalledProcessError

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> int:
    """Launch what the command line names; processes say themselves why they fail."""
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").disabled = True
    try:
        launch_command(launch_command_parser().parse_args())
    except ChildFailedError as error:
        return int(error.get_first_failure()[1].exitcode)
    except CalledProcessError as error:  # of a single process
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
