"""Stage 1: make one run config from a multi-dataset config; the twin of ``rslp helios make_multidataset_config``."""

import importlib.util
import sys
from pathlib import Path

if __name__ == "__main__":
    if importlib.util.find_spec("rslp") is None:
        sys.path.insert(0, str(Path(__file__).resolve().parent))
    from rslp.cli.main import main

    sys.exit(main(["helios", "make_multidataset_config", *sys.argv[1:]]))
