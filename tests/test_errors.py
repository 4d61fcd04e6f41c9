"""Chains of exceptions."""

from __future__ import annotations

from rslp.errors import UserError, chain
from rslp.train.build import as_user_error


def test_a_chain_that_leads_back_to_itself_has_an_end() -> None:
    inner, outer = ValueError("inner"), KeyError("outer")
    outer.__context__, inner.__cause__ = inner, outer
    assert list(chain(outer)) == [outer, inner]
    assert list(chain(None)) == []
    assert as_user_error(outer) is None
    inner.__cause__ = mistake = UserError("a mistake")
    assert as_user_error(outer) is mistake
