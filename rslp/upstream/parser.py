"""jsonargparse, the parser of configs, restricted to classes that may be imported."""

from __future__ import annotations

from typing import Any

import torch
from jsonargparse import _common, _typehints, _util
from rslearn.utils.jsonargparse import init_jsonargparse

from rslp.runtime import class_paths

_hints: Any = _typehints
_adapt_any = _hints.adapt_classes_any


def prepare_parser() -> None:
    """Register rslearn's types with the parser, and make it ask ``class_paths`` before it imports a class.

    A dataset's own config is parsed by it, too. Where an argument has no type or takes any value, a class has to be a
    torch module: the parser would instantiate any class there.
    """
    init_jsonargparse()
    parts: tuple[Any, ...] = (_common, _util, _typehints)
    for part in parts:
        part.check_import_path = _refuse_untrusted
    _hints.adapt_classes_any = _adapt_module


def _refuse_untrusted(path: str) -> None:
    if reason := class_paths.refusal_reason(path):
        raise class_paths.UntrustedClassError(reason)


def _adapt_module(
    val: Any, typehint: Any, serialize: bool, instantiate: bool, sub_add_kwargs: Any, logger: Any = None
) -> Any:
    if not _hints.is_subclass_spec(val):
        return _adapt_any(val, typehint, serialize, instantiate, sub_add_kwargs, logger)
    options = {"serialize": serialize, "instantiate_classes": instantiate, "sub_add_kwargs": sub_add_kwargs}
    return _hints.adapt_typehints(val, torch.nn.Module, logger=logger, **options)
