"""Write the tree of the README: each file of rslp with the first sentence of its docstring.

Run as ``python docs/make_tree.py``; a test says when it is due.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- tree: made by docs/make_tree.py -->", "<!-- end of the tree -->"
WIDTH = 118
OTHERS = {
    "make_multidataset_config.py": "the original command of stage 1",
    "data/helios/v3_multitask/": "base.yaml and multi-dataset configs, with the run configs they make",
    "examples/real_study/": "a study on three sets of real labels and two encoders: its plan and its data",
    "examples/real_points/": "own arrays of pixel time series as datasets; a real pretrained encoder on real labels",
    "Dockerfile, .ci/install": "the image of cluster jobs, and the one install step that it shares with make and CI",
    "benchmarks/": "reproducible measurements",
    "docs/": "a page per noun",
    "tests/": "mirrors rslp/; functional/ types the real commands, properties/ holds laws",
}


def first_sentence(path: Path) -> str:
    """The first line of a module's docstring, without its full stop."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0].rstrip(".")


def lines(folder: Path, depth: int = 0) -> list[str]:
    """A line for each module below a folder, packages before what is in them."""
    found = [_line(folder.name + "/", first_sentence(folder / "__init__.py"), depth)]
    for path in sorted(folder.iterdir(), key=lambda p: (p.is_dir(), p.name)):
        if path.suffix == ".py" and path.name != "__init__.py":
            found.append(_line(path.name, first_sentence(path), depth + 1))
        elif (path / "__init__.py").exists():
            found += lines(path, depth + 1)
    return found


def _line(name: str, what: str, depth: int) -> str:
    line = f"{'  ' * depth}{name}".ljust(34) + what.replace("``", "").partition(". ")[0]
    # A long sentence is cut where its first parts end.
    while len(line) > WIDTH:
        line = line[: max(line.rfind(mark) for mark in (": ", "; ", ", ", " "))]
    return line


def tree() -> str:
    """The README's section between its two marks."""
    body = [*lines(ROOT / "rslp"), *(_line(name, what, 0) for name, what in OTHERS.items())]
    return "\n".join([BEGIN, "```", *body, "```", END])


def refreshed(readme: str) -> str:
    """The README with today's tree."""
    head, _, rest = readme.partition(BEGIN)
    return head + tree() + rest.partition(END)[2]


if __name__ == "__main__":
    target = ROOT / "README.md"
    target.write_text(refreshed(target.read_text(encoding="utf-8")), encoding="utf-8")
