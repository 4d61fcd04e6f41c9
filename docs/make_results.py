"""Write docs/results.md from the comparisons of the studies in examples/real_study.

Run as ``python docs/make_results.py``; a test says when it is due.
"""

from __future__ import annotations

import json
from pathlib import Path

from rslp.study.table import comparison_table, finding

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
STUDIES = ROOT / "examples" / "real_study" / "studies" / "real_study"
HEAD = """# Results on real labels

Made by `docs/make_results.py` from the files of the studies in `examples/real_study/`, whose plan
([PLAN.md](../examples/real_study/PLAN.md)) was committed before the first run. Nothing is chosen by hand.

Labels: live fuel moisture (Globe-LFMC and Stanford LFMC, as published with Presto, MIT); crop types of points in
Uganda, Kenya and South Sudan (public extractions of WorldCereal, MIT); fields of AgriFieldNet (Radiant Earth Foundation
& IDinsight 2022, doi 10.34911/rdnt.wu92p1, CC-BY-4.0). Encoders: Galileo-nano and Presto (both MIT).
"""


def results() -> str:
    """The page."""
    parts = [HEAD]
    for path in sorted(STUDIES.glob("*/comparison.json")):
        comparison = json.loads(path.read_text(encoding="utf-8"))
        found = "\n".join(f"- {finding(task, comparison)}" for task in comparison["tasks"])
        table = comparison_table(comparison).rstrip()
        parts.append(f"\n## {path.parent.name}\n\n{found}\n\n```text\n{table}\n```\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(results(), encoding="utf-8")
