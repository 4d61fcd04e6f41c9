"""Stage 1: several dataset configs become one run config. Pure, and free of torch."""

from rslp.compose.compose import RunConfig, Sources, compose
from rslp.compose.configs import merge_configs
from rslp.compose.diff import differences
from rslp.compose.head_classes import class_faults
from rslp.compose.heads import head_faults
from rslp.compose.kinds import config_kind, refuse_unrunnable
from rslp.compose.kitchen import Anchor
from rslp.compose.merge import merge, pick
from rslp.compose.no_effect import without_effect
from rslp.compose.placeholders import names_in, placeholder_names
from rslp.compose.provenance import explain, header, provenance_text
from rslp.compose.recipe import Entry, Recipe, read_recipe

__all__ = [
    "Anchor",
    "Entry",
    "Recipe",
    "RunConfig",
    "Sources",
    "class_faults",
    "compose",
    "config_kind",
    "differences",
    "explain",
    "head_faults",
    "header",
    "merge",
    "merge_configs",
    "names_in",
    "pick",
    "placeholder_names",
    "provenance_text",
    "read_recipe",
    "refuse_unrunnable",
    "without_effect",
]
