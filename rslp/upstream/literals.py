"""Python's parser of literals, made safe for threads."""

from __future__ import annotations

import ast
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# CPython issue 106905: two threads that build syntax trees at once count their depth together.
RACES = sys.version_info < (3, 11, 9) or (3, 12) <= sys.version_info < (3, 12, 3)


@contextmanager
def literals_in_turns() -> Iterator[None]:
    """Let threads call ``ast.literal_eval`` one after the other while the context lasts.

    ``numpy.load`` reads the header of each file with it. On the versions of Python in ``RACES``, threads that do so at
    once fail now and then with "SystemError: AST constructor recursion depth mismatch".
    """
    if not RACES:
        yield
        return
    parse, lock = ast.literal_eval, threading.Lock()

    def parse_alone(node_or_string: Any) -> Any:
        with lock:
            return parse(node_or_string)

    ast.literal_eval = parse_alone
    try:
        yield
    finally:
        ast.literal_eval = parse
