"""What a value must be, and what kind of config a file is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from rslp.compose.merge import pick, short
from rslp.errors import ConfigError, Problem
from rslp.files import Template, Unquoted

# A dataset's name becomes part of a file's, which may have 255 letters.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,99}\Z")
_MODEL_ARGS = ("model", "init_args", "model", "init_args")
_CONSTANT_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*\Z")


def wrong_value(kind: str, value: Any) -> str | None:
    """Say what is wrong with a value of a key, or None when it is right."""
    holds, wanted = _KINDS[kind]
    if holds(value):
        return None
    hint = ""
    if kind in ("text", "path") and isinstance(value, Template):
        hint = (
            "; a constant can't hold the placeholder of another" if kind == "text" else "; it can't hold a placeholder"
        )
    if kind == "constants" and isinstance(value, Mapping):
        return _wrong_constant(value)
    if kind == "check" and isinstance(value, Mapping) and (other := [str(key) for key in value if key != "allow"]):
        hint = f"; unknown: {', '.join(other)}"
    if kind in ("positive", "count") and isinstance(value, str) and (value.strip().isdigit() or "${" in value):
        hint = f"; write {value.strip()} without quotes"
    if kind in ("name", "names") and not isinstance(value, str | Mapping | list):
        hint = "; write it in quotes"
    return f"must be {wanted}; got {short(value)}{hint}"


def config_kind(data: Any) -> str | None:
    """Name the kind of a config by its content: multi-dataset, run, base or dataset config; None when unclear."""
    if not isinstance(data, Mapping):
        return None
    if {"dataset_cfgs", "task_cfgs", "output_path", "base_cfg", "substitutions"} & set(data):
        return "multi-dataset config"
    if not {"model", "data", "trainer"} & set(data):
        return None
    arguments = pick(data, ("data", "init_args"))
    if isinstance(arguments, Mapping) and "data_modules" in arguments:
        return "run config" if arguments["data_modules"] else "base config"
    if isinstance(arguments, Mapping) and {"inputs", "task", "path", "default_config"} & set(arguments):
        return "dataset config"
    return "dataset config" if pick(data, (*_MODEL_ARGS, "decoders")) else None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not isinstance(value, Template) and bool(value.strip())


def _are_paths(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, list) and bool(value) and all(map(_is_text, value)))


def _are_constants(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return value is None
    return all(isinstance(k, str) and _CONSTANT_NAME.match(k) and not _has_template(v) for k, v in value.items())


def _wrong_constant(constants: Mapping[Any, Any]) -> str:
    wrong = [str(name) for name in constants if not (isinstance(name, str) and _CONSTANT_NAME.match(name))]
    if wrong:
        return f"the name of a constant has letters, digits and _, and starts with a letter; got {', '.join(wrong)}"
    held = [str(name) for name, value in constants.items() if _has_template(value)]
    return f"a constant is a value without the placeholder of another, and no mapping; see {', '.join(held)}"


def _has_template(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_has_template, value))
    return isinstance(value, Template | Mapping)


def _are_names(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return value is None
    return all(isinstance(new, str) and _NAME.match(new) for new in value.values())


def _are_groups(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, list) and all(isinstance(g, list) and g and all(map(_is_text, g)) for g in value)


def _is_check(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return value is None
    allow = value.get("allow")
    return set(value) <= {"allow"} and (allow is None or (isinstance(allow, list) and all(map(_is_text, allow))))


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "path": (lambda v: v is None or _is_text(v), "a path"),
    "output": (lambda v: v is None or _is_text(v), "a path, or null to derive it"),
    "text": (lambda v: v is None or _is_text(v), "a text"),
    "name": (
        lambda v: v is None or (isinstance(v, str) and bool(_NAME.match(v))),
        "a name of at most 100 letters, digits, _ and - that starts with a letter",
    ),
    "names": (_are_names, "a mapping of task names to new ones"),
    "positive": (lambda v: v is None or isinstance(v, Unquoted) or (_is_whole(v) and v > 0), "a whole number above 0"),
    "count": (lambda v: v is None or isinstance(v, Unquoted) or (_is_whole(v) and v >= 0), "a whole number from 0"),
    "flag": (lambda v: v is None or isinstance(v, bool), "true or false"),
    "mapping": (lambda v: v is None or isinstance(v, Mapping), "a mapping"),
    "options": (lambda v: v is None or isinstance(v, Mapping), "a mapping with merge_heads and the like"),
    "constants": (_are_constants, "a mapping of constants, such as patch_size: 8, without placeholders in them"),
    "paths": (_are_paths, "a path or a list of paths"),
    "entries": (lambda v: isinstance(v, list) and bool(v), "a list of datasets, at least one"),
    "check": (_is_check, "{allow: [ID, ...]}, ids of the check's findings"),
    "groups": (_are_groups, "a list of lists of task names"),
}


def refuse_unrunnable(config: Mapping[str, Any], *, name: str) -> None:
    """Recognise a config of another kind where a run config is wanted.

    Args:
        config: the config.
        name: its file, for the message.

    Raises:
        ConfigError: it is none that a run can be started with.
    """
    kind = config_kind(config)
    if kind == "multi-dataset config":
        what = f"is a multi-dataset config; first run: python make_multidataset_config.py --cfg {name}"
    elif kind not in ("run config", None):
        what = f"is a {kind}, no run config; make_multidataset_config makes one from it"
    elif missing := [key for key in ("model", "data", "trainer") if not isinstance(config.get(key), Mapping)]:
        what = f"is no run config: `{missing[0]}` is missing"
    else:
        return
    raise ConfigError(Problem(what, file=name))
