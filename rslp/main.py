"""The module that people start: ``python -m rslp.main PROJECT WORKFLOW …`` runs the command line of ``rslp.cli``."""

import sys

from rslp.cli.main import libraries_first, main

__all__ = ["main"]

if __name__ == "__main__":
    libraries_first()
    sys.exit(main())
