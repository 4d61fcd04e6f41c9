"""Three sets of real labels as datasets: fuel moisture, crop type at points, crop type of fields.

    python examples/real_study/make_data.py

The first two are those of examples/real_points; the third is made by ``make_dataset`` from ``fields.yaml``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# An optional folder of test data beside the checkout.
DATA = ROOT / "../shared/data"


def main() -> int:
    """Make what is missing; a missing folder is one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder with the three published sets")
    options = parser.parse_args()
    data = options.data.resolve()
    for name in ("fuel-moisture", "worldcereal-points", "agrifieldnet"):
        if not (data / name).is_dir():
            print(f"error: {data / name}: no such folder", file=sys.stderr)
            return 2
    link = HERE / "agrifieldnet"
    if not link.exists():
        # fields.yaml names the files below this folder.
        link.symlink_to(data / "agrifieldnet")
    points = ("--fuel_moisture", str(data / "fuel-moisture"), "--crop_type", str(data / "worldcereal-points"))
    commands = [
        [str(ROOT / "examples" / "real_points" / "convert.py"), *points],
        ["-m", "rslp.main", "helios", "make_dataset", "--cfg", str(HERE / "fields.yaml")],
    ]
    for command in commands:
        if code := subprocess.run([sys.executable, *command], check=False, cwd=ROOT).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
