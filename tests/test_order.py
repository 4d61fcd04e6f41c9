"""Nothing in the product depends on the order of a set, of a directory, or of finished work; see ``tests/order.py``."""

from __future__ import annotations

from pathlib import Path

import olmoearth_pretrain_minimal
import pytest
import rslearn

from tests.order import Finder, faults

ROOT = Path(__file__).parents[1]

# What rslearn 0.1.19 and olmoearth-pretrain-minimal 0.1.5 do in what we call of them, and why it does no harm.
UPSTREAM = {
    "rslearn/config/dataset.py: hash() of a string is another one in each process": "a key of a cache in memory",
    "rslearn/models/galileo/single_file_galileo.py: a comprehension over a directory listing": "for a message",
    "rslearn/train/all_crops_dataset.py: a loop over a set": "pads each input by itself; ours does not call it",
    "rslearn/train/callbacks/freeze_unfreeze.py: a comprehension over a set": "freezes each module by itself; the "
    "optimiser has all parameters already, in the model's order",
    "rslearn/train/callbacks/freeze_unfreeze.py: list() of a set": "sorted, for a message",
    "rslearn/main.py: imap_unordered() gives what is finished first": "its own command line",
    "rslearn/utils/fsspec.py: a loop over a directory listing": "lists windows, which upstream.list_windows sorts",
    "rslearn/utils/mp.py: imap_unordered() gives what is finished first": "lists windows, as above",
    "rslearn/utils/geometry.py: hash() of a string is another one in each process": "__hash__",
    "rslearn/utils/grid_index.py: a comprehension over a set": "of data sources alone",
    "rslearn/utils/rtree_index.py: a comprehension over a set": "of data sources alone",
    "olmoearth_pretrain_minimal/olmoearth_pretrain_v1/nn/flexi_vit.py: list() of a set": "see fix_token_order",
    "olmoearth_pretrain_minimal/olmoearth_pretrain_v1/utils/constants.py: hash() of a string is another one in each "
    "process": "__hash__",
}
WRONG = """
for x in {a, b}: pass
[f(x) for x in set(names)]
names = set(given); y = list(names)
text = ", ".join({str(x) for x in y})
for x in a.keys() & b: pass
y = dict.fromkeys(set(a) - set(b))
sorted({a, b}, key=len)
max(set(a), key=len)
z = [*frozenset(a)]
first = next(iter(a.intersection(b)))
any_one = set(a).pop()
total = sum(x for x in set(a))
for path in folder.glob("*.ckpt"): pass
[one.name for one in folder.iterdir()]
for entry in os.scandir(folder): pass
found = folder.iterdir(); first = [one for one in found]
names = os.listdir(folder); [*os.listdir(folder)]
for done in as_completed(tasks): pass
for x in pool.imap_unordered(f, y): pass
number = hash(text) % 7
sorted(y, key=id)
"""
RIGHT = """
for x in sorted({a, b}): pass
found = {f(x) for x in set(names)}
len(set(a)); any(x > 1 for x in set(a)); a in set(b); set(a) <= set(b); max(set(a))
y = [x for x in a if x in set(b)]
for path in sorted(folder.glob("*.ckpt"), key=lambda path: path.name): pass
size = sum(path.stat().st_size for path in folder.glob("*"))
for x in dict.fromkeys(a): pass
groups = [group for group in groups if set(group) & set(names)]
for path in folder.glob("*.tmp"):  # any order: all of them go
    path.unlink()
"""


@pytest.mark.parametrize("line", WRONG.strip().splitlines())
def test_what_depends_on_an_order_is_noticed(line: str) -> None:
    assert list(Finder(line).found())


def test_sets_are_known_by_annotations() -> None:
    source = (
        "class A:\n"
        "    seen: frozenset[str]\n"
        "    def names(self) -> set[str]: return list(self.seen)\n"
        "    def all(self, some: AbstractSet[str]): return list(some), list(self.names())\n"
    )
    assert [line for line, _ in Finder(source).found()] == [3, 4, 4]


@pytest.mark.parametrize("line", RIGHT.strip().splitlines())
def test_what_has_no_order_is_left_alone(line: str) -> None:
    source = RIGHT if line.startswith((" ", "for path in folder")) else line
    assert list(Finder(source).found()) == []


def test_nothing_depends_on_an_order() -> None:
    assert faults(ROOT / "rslp") == []


def test_what_is_called_of_others_is_known() -> None:
    # Data sources fetch data before there is a dataset; no run calls them.
    found = [*faults(Path(rslearn.__path__[0]), without="data_sources")]
    found += faults(Path(olmoearth_pretrain_minimal.__path__[0]))
    assert {f"{one.split(':')[0]}: {one.split(': ', 1)[1]}" for one in found} == set(UPSTREAM)
