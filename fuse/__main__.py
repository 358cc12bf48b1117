"""`python -m fuse` is the `fuse` command."""

import sys

from fuse.cli import main

if __name__ == "__main__":
    sys.exit(main())
