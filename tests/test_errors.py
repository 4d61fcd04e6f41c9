"""Chains of exceptions."""

from __future__ import annotations

from rslp.errors import chain


def test_a_chain_that_leads_back_to_itself_has_an_end() -> None:
    inner, outer = ValueError("inner"), KeyError("outer")
    outer.__context__, inner.__cause__ = inner, outer
    assert list(chain(outer)) == [outer, inner]
    assert list(chain(None)) == []
