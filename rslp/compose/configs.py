"""Merge run configs that are given together, as ``--config_paths`` of stage 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rslp.compose.layers import Layer, Replaced, fold
from rslp.compose.placeholders import Filler, placeholder_names
from rslp.compose.replaced import on_replaced
from rslp.errors import ConfigError, Problem
from rslp.files import Document, anchor_paths, plain_scalar


def merge_configs(
    documents: Sequence[Document], constants: Mapping[str, Any], *, notes: list[str] | None = None
) -> dict[str, Any]:
    """Merge configs, later ones over earlier ones, and fill their placeholders.

    Args:
        documents: the configs, each a mapping.
        constants: value by name (``patch_size`` or ``PATCH_SIZE``); a text is read as unquoted YAML, so ``"8"`` is 8.
        notes: gets what a user should know: arguments that fell away with their class.

    Returns:
        The merged config. Relative paths, which refer to the file that names them, have become ``Anchored`` ones: give
        the config to ``files.relativise_paths`` before writing it.

    Raises:
        ConfigError: all that is wrong: a file that is no mapping, a placeholder without a constant, a relative path
            that does not exist, an override that can't be laid over what is below.
    """
    typed = {key: plain_scalar(value) if isinstance(value, str) else value for key, value in constants.items()}
    filler = Filler(placeholder_names(typed))
    problems: list[Problem] = []
    layers = [_layer(document, filler, problems) for document in documents]
    if problems:
        raise ConfigError(problems)
    replaced: list[Replaced] = []
    merged = fold(layers, replaced=replaced)
    told, problems = on_replaced(replaced)
    if problems:
        raise ConfigError(problems)
    if notes is not None:
        notes += told
    return merged


def _layer(document: Document, filler: Filler, problems: list[Problem]) -> Layer:
    bare = Layer({}, (), document, ())
    if not isinstance(document.data, Mapping):
        problems.append(Problem("is no config: a mapping is wanted", document.name))
        return bare
    tree = filler.fill(document.data, lambda what, at: problems.append(bare.problem(what, at)))
    try:
        tree = anchor_paths(tree, [document.folder], name=document.name, line=document.nearest_line)
    except ConfigError as error:
        problems += error.problems
    return Layer(tree, (), document, ())
