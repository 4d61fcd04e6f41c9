"""The name by which people start the command line: ``python -m rslp.main PROJECT WORKFLOW …``."""

import sys

from rslp.cli.main import libraries_first, main

__all__ = ["main"]

if __name__ == "__main__":
    libraries_first()
    sys.exit(main())
