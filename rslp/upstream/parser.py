"""The parser of configs, jsonargparse, as we need it: rslearn's types, and no class that may not be named."""

from __future__ import annotations

from typing import Any

import torch
from jsonargparse import _common, _typehints, _util
from rslearn.utils.jsonargparse import init_jsonargparse

from rslp.runtime import class_paths

_hints: Any = _typehints
_adapt_any = _hints.adapt_classes_any


def prepare_parser() -> None:
    """Teach the parser rslearn's types, and have it ask ``class_paths`` before it imports what a value names.

    Datasets' own configs are parsed by it, too. Where an argument takes any value, or says nothing of its type, a class
    that stands there has to be a torch module: otherwise it would be made whatever it is.
    """
    init_jsonargparse()
    parts: tuple[Any, ...] = (_common, _util, _typehints)
    for part in parts:
        part.check_import_path = _refuse_untrusted
    _hints.adapt_classes_any = _module_alone


def _refuse_untrusted(path: str) -> None:
    if reason := class_paths.refusal_reason(path):
        raise class_paths.UntrustedClassError(reason)


def _module_alone(val: Any, typehint: Any, serialize: bool, make: bool, options: Any, logger: Any = None) -> Any:
    if not _hints.is_subclass_spec(val):
        return _adapt_any(val, typehint, serialize, make, options, logger)
    how = {"serialize": serialize, "instantiate_classes": make, "sub_add_kwargs": options, "logger": logger}
    return _hints.adapt_typehints(val, torch.nn.Module, **how)
