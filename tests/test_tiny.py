"""What tests build on: a config is a test's own, however it changes it."""

from __future__ import annotations

from typing import Any

from tests.tiny import KINDS, run_config


def test_no_two_configs_share_a_part() -> None:
    def lists_and_mappings(value: Any) -> set[int]:
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        own = {id(value)} if isinstance(value, dict | list) else set()
        return own.union(*(lists_and_mappings(item) for item in inside))

    one, other = (run_config({kind: ("data", kind) for kind in KINDS}) for _ in range(2))
    assert one == other
    assert not lists_and_mappings(one) & lists_and_mappings(other)
