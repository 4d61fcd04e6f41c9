"""Threads that read array files at once do not end in Python's error about the depth of syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rslp.check import check as checking
from rslp.upstream import literals
from tests.check.small import Case, checked, nothing, run_config_of

ROOT = Path(__file__).parents[2]
HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4, 5, 2), 'more': [1, (2, (3, (4, 5)))]}"


# Garbage with a finaliser, collected while a tree is built, lets the other threads in.
THREADS = f"""
import ast, gc, sys
from concurrent.futures import ThreadPoolExecutor
from rslp.upstream.literals import literals_in_turns

class Slow:
    def __del__(self):
        sum(range(100))

def parse_often(_):
    for _ in range(1000):
        garbage = Slow()
        garbage.itself = garbage
        del garbage
        ast.literal_eval({HEADER!r})

gc.set_threshold(1)
sys.setswitchinterval(1e-6)
parse = ast.literal_eval
with literals_in_turns(), ThreadPoolExecutor(8) as pool:
    list(pool.map(parse_often, range(8)))
assert ast.literal_eval is parse
"""


def test_threads_parse_literals():
    # An interpreter without torch, which has little to collect.
    command = [sys.executable, "-c", THREADS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_check_parses_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    inside, together = threading.Lock(), []

    def parse(text: Any) -> Any:
        alone = inside.acquire(blocking=False)
        together.append(not alone)
        time.sleep(0.002)
        if alone:
            inside.release()

    def read(*values: Any, **options: Any) -> Any:
        ast.literal_eval(HEADER)
        return read_window(*values, **options)

    read_window = checking.read_window
    monkeypatch.setattr(ast, "literal_eval", parse)
    monkeypatch.setattr(literals, "RACES", True)
    monkeypatch.setattr(checking, "read_window", read)
    checked(run_config_of([Case(f"d{index}", "regress", nothing) for index in range(3)], tmp_path))
    assert len(together) > 10 and not any(together)
