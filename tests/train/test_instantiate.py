"""What the plan of a config makes is what jsonargparse makes of it, and all its problems are reported at once."""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from lightning.pytorch import Callback
from rslearn.train.dataset import DataInput
from rslearn.utils.geometry import ResolutionFactor

from rslp import upstream
from rslp.errors import ConfigError, DataError, MachineError
from rslp.train.build import build
from rslp.train.instantiate import Construction, Invalid, plan, plan_call, problems, type_text
from tests.tiny import KINDS, run_config, write_run
from tests.train.directly import assert_alike, both
from tests.train.structures import structure

VARIANTS: dict[str, dict[tuple[str | int, ...], Any]] = {
    "plain": {},
    "limits": {("trainer", "limit_val_batches"): 1, ("trainer", "limit_train_batches"): 0.5},
    "clipping": {("trainer", "gradient_clip_val"): 1, ("trainer", "precision"): "bf16-mixed"},
    "callbacks": {
        ("trainer", "callbacks"): [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"monitor": "val_loss", "save_top_k": 1},
            },
            {
                "class_path": "rslearn.train.callbacks.freeze_unfreeze.FreezeUnfreeze",
                "init_args": {"module_selector": ["model", "encoder", 0], "unfreeze_at_epoch": 1},
            },
        ]
    },
    "data": {
        ("data", "init_args", "sample_mode"): "weights",
        ("data", "init_args", "weights"): {"classify": 1, "segment": 0.5},
        ("data", "init_args", "batch_sizes"): {"classify": 2},
        ("data", "init_args", "num_workers"): None,
    },
    "loss weights": {("model", "init_args", "model", "init_args", "loss_weights"): {"classify": 2}},
    "scheduler": {
        ("model", "init_args", "scheduler"): {
            "class_path": "rslearn.train.scheduler.PlateauScheduler",
            "init_args": {"factor": 0.5, "patience": 2},
        }
    },
    "own keys": {("seed",): 5, ("rslp_description",): "what it is for: a test"},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_run_is_made_as_the_parser_makes_it(changes: dict[tuple[str | int, ...], Any], tmp_path: Path) -> None:
    # The parser takes seconds for each dataset.
    kinds = KINDS[: 2 if any(place[0] == "data" for place in changes) else 1] if changes else KINDS
    config = run_config({kind: (str(tmp_path / kind), kind) for kind in kinds})
    for place, value in changes.items():
        at: Any = config
        for key in place[:-1]:
            at = at[key]
        at[place[-1]] = value
    assert_alike(*both(write_run(tmp_path, config)))


def test_an_evaluation_is_made_as_the_parser_makes_it(tmp_path: Path) -> None:
    config = run_config({"classify": (str(tmp_path / "classify"), "classify")})
    assert_alike(*both(write_run(tmp_path, config), training=False))


_FLOAT_FIRST = """
import sys, typing
typing.Optional[typing.Union[float, int]]  # from here on, Optional[Union[int, float]] has this order, too
import rslp.check.check  # and what this imports turns others round
from pathlib import Path
from tests.tiny import run_config, write_run
from tests.train.directly import both
folder = Path(sys.argv[1])
config = run_config({"classify": (str(folder), "classify")})
config["trainer"]["limit_val_batches"] = 1
values = [made.trainer.limit_val_batches for made in both(write_run(folder, config))]
assert [type(value) for value in values] == [int, int], values
"""


def test_one_batch_stays_one_batch_whatever_was_imported_before(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", _FLOAT_FIRST, str(tmp_path)], check=True)


class Colour(Enum):
    """Names that are not their values."""

    RED = "r"
    BLUE = 2


class Part:
    """Something with arguments, whose defaults are not always what their types say."""

    def __init__(
        self,
        size: int = 1,
        ratio: float = 2,
        words: list[str] | None = None,
        pair: tuple[float, float] = (1, 2),
        many: list[float] = [1, 2],  # noqa: B006
        pairs: list[tuple[int, ...]] | None = [(1, 2)],  # noqa: B006
        loose: Any = (1, 2),
        named: dict[str, float] = {"a": 1},  # noqa: B006
        either: int | float | str = 1,
        colour: Colour = Colour.RED,
        wrong: int = None,  # type: ignore[assignment]  # noqa: RUF013
        text: str = "1",
        note: str | None = "a: b",
        fraction: ResolutionFactor = ResolutionFactor(),  # noqa: B008
    ) -> None:
        values = (size, ratio, words, pair, many, pairs, loose, named, either, colour, wrong, text, note, fraction)
        self.given = copy.deepcopy(values)


class Other(Part):
    """A part that another class makes."""

    def __init__(self, inner: Part | None = None, more: dict[str, Part] = {}) -> None:  # noqa: B006
        super().__init__()
        self.inner, self.more = inner, dict(more)


HINTS: dict[str, Any] = {
    str(hint): hint
    for hint in (
        bool, int, float, str, Any, int | None, float | None, str | None, bool | str, bool | int, int | float,
        int | float | str | None, str | int | bool, list[int], list[str] | str, list[float] | None,
        list, dict, Sequence[float], Iterable[str] | bool, Mapping[str, int], tuple[int, int], tuple[float, ...] | None,
        tuple[int, str], set[int], dict[str, Any], dict[int, float], dict[str, list[int]] | int, dict[str, int] | int,
        Literal["a", "b", 1], Literal[1, 2] | Literal["1", "x"] | None, Literal[True, "auto"], Colour, Colour | None,
        Colour | str, Part, Part | None, list[Part], dict[str, Part], Part | dict[str, int], Part | list[Part] | None,
        Any | None, ResolutionFactor, int | ResolutionFactor, DataInput,
    )
}  # fmt: skip

WORDS = st.sampled_from(
    [
        "a",
        "b",
        "x",
        "# a",
        "a #",
        "'a",
        "{a",
        " ",
        "1:30",
        "2024-01-01",
        "RED",
        "r",
        "auto",
        "true",
        "null",
        "1",
        "1.5",
        "1e-3",
        "a: b",
        "~",
        "",
        "no",
        "1/4",
        "a.b",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.5, -1.0, 1e-9, 2.0]) | WORDS
HERE = __name__
CLASSES = st.recursive(
    st.fixed_dictionaries(
        {"class_path": st.sampled_from([f"{HERE}.Part", f"{HERE}.Other", "builtins.dict", f"{HERE}.Gone"])},
        optional={
            "init_args": st.dictionaries(st.sampled_from(["size", "ratio", "words", "wrong"]), SCALARS, max_size=2)
        },
    ),
    lambda inner: st.fixed_dictionaries(
        {
            "class_path": st.just(f"{HERE}.Other"),
            "init_args": st.fixed_dictionaries(
                {}, optional={"inner": inner, "more": st.dictionaries(WORDS, inner, max_size=2)}
            ),
        }
    ),
    max_leaves=3,
)
BARE = st.fixed_dictionaries(
    {}, optional={"size": SCALARS, "data_type": WORDS, "layers": st.lists(WORDS, max_size=2), "dtype": WORDS}
)
VALUES = st.recursive(
    SCALARS | CLASSES | BARE,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(WORDS, inner, max_size=2)
        | st.dictionaries(st.integers(0, 3), inner, max_size=2)
    ),
    max_leaves=4,
)


def parsed_value(value: Any, hint: Any) -> Any:
    """What the run's parser makes of a value.

    Raises:
        ArgumentError: it refuses it.
    """
    upstream.prepare_parser()
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser.instantiate_classes(parser.parse_object({"value": copy.deepcopy(value)}))["value"]


class Refused:
    """In place of a value that does not fit."""


def made_value(value: Any, hint: Any) -> Any:
    """What the plan makes of a value.

    Raises:
        ValueError: it does not fit, or a constructor refuses it.
    """
    planned, construction = plan(value, hint), Construction()
    if invalid := list(problems(planned)):
        raise ValueError(invalid[0].what)
    made = construction.make(planned)
    if construction.problems:
        raise ValueError(construction.problems[0].what)
    return made


@given(name=st.sampled_from(sorted(HINTS)), value=VALUES)
@example(name="<class 'dict'>", value={"a": {"class_path": f"{HERE}.Part"}, "b": "1"})
@example(name="dict[str, typing.Any]", value={"a": "1", "b": ["1"]})
def test_a_value_is_read_as_the_parser_reads_it(name: str, value: Any) -> None:
    hint = HINTS[name]
    assume(not _is_read_otherwise(value, hint))
    try:
        expected = parsed_value(value, hint)
    except argparse.ArgumentError:
        expected = Refused
    try:
        made = made_value(value, hint)
    except ValueError:
        made = Refused
    assert type(made) is type(expected)
    assert structure(made) == structure(expected)


def _is_read_otherwise(value: Any, hint: Any) -> bool:
    """Whether a value is one of those of the table below."""
    texts = str(value)
    return value is None or "{}" in texts or "None" in texts or (value is True and 1 in typing.get_args(hint))


class Nested:
    def __init__(self, parts: dict[str, Part], note: str | None = None, wrong: int = None) -> None:  # type: ignore[assignment]  # noqa: RUF013
        self.parts, self.note, self.wrong = parts, note, wrong


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        # The parser takes null where the type does not, and unknown arguments whose value is an empty mapping.
        ({"parts": {"a": {"size": None}}}, "expected int; got None"),
        ({"parts": {"a": {"sise": {}}}}, "Part has no argument 'sise'; did you mean size?"),
        ({"parts": {"a": {"colour": "GREEN"}}}, "expected one of RED, BLUE; got 'GREEN'"),
        ({"parts": {}, "wrong": None}, None),
        ({"parts": {}, "note": "null"}, None),
    ],
)
def test_what_the_parser_reads_otherwise(arguments: dict[str, Any], problem: str | None) -> None:
    planned = plan_call(Nested, arguments)
    assert [found.what for found in problems(planned)] == ([problem] if problem else [])
    if problem is None:
        made = Construction().make(planned)
        assert (made.note, made.wrong) == (arguments.get("note"), None)  # the text "null" stays a text


def test_all_problems_are_reported_with_their_keys() -> None:
    config = {
        "class_path": f"{HERE}.Nested",
        "init_args": {
            "parts": {
                "a": {"class_path": f"{HERE}.Part", "init_args": {"sise": 1, "ratio": "wide", "words": [1, 2]}},
                "b": {"class_path": f"{HERE}.Gone"},
                "c": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "x"]}},
                "d": {"class_path": "torch.nn.Identity"},
                "e": {"class_path": f"{HERE}.Part", "arguments": {}},
                "f": {"class_path": f"{HERE}.Part", "init_args": [1]},
                "g": 3,
            },
            "notes": "x",
        },
    }
    inside = ("init_args", "parts")
    assert {problem.at: problem.what for problem in problems(plan(config, Nested))} == {
        ("init_args", "notes"): "Nested has no argument 'notes'; did you mean note?",
        (*inside, "a", "init_args", "sise"): "Part has no argument 'sise'; did you mean size?",
        (*inside, "a", "init_args", "ratio"): "expected float; got 'wide'",
        (*inside, "a", "init_args", "words", 0): "expected str; got 1; write it in quotes (and 1 more here)",
        (*inside, "b", "class_path"): f"module {HERE} has no 'Gone'",
        (*inside, "c", "class_path"): "'subprocess.Popen' can't be imported: names what belongs to Python itself "
        "(subprocess); a config names classes of installed libraries",
        (*inside, "d"): "expected Part; got the class Identity",
        (*inside, "e", "arguments"): "unknown key beside class_path; arguments belong under init_args",
        (*inside, "f", "init_args"): "expected arguments by name; got [1]",
        (*inside, "g"): "expected Part; got 3",
    }
    (missing,) = problems(plan({"class_path": f"{HERE}.Nested"}, Nested, ("here",)))
    assert (missing.at, missing.what) == (("here",), "Nested needs the argument parts")


def test_a_class_is_found_by_its_name_alone_and_in_a_text() -> None:
    for text in ("Other", f"{HERE}.Other", {"class_path": "Other"}):
        assert type(made_value(text, Part)) is Other
    (problem,) = problems(plan("Another", Part))
    assert problem.what.startswith("'Another' can't be imported")


class Refusing:
    def __init__(self, path: str, error: Literal["data", "value", "disk"]) -> None:
        raise {"data": DataError, "value": ValueError, "disk": MachineError}[error](f"{path} is gone")


class Pair:
    def __init__(self, one: Refusing, other: Part) -> None:
        raise AssertionError("never made")


@pytest.mark.parametrize(
    ("error", "key", "message"),
    [("data", ("path",), "a/b.tif is gone"), ("value", (), "Refusing refuses its arguments: a/b.tif is gone")],
)
def test_a_constructor_that_refuses_is_reported_and_the_others_are_made(
    error: str, key: tuple[str, ...], message: str
) -> None:
    parts = {"one": {"path": "a/b.tif", "error": error}, "other": {"size": 3}}
    construction = Construction()
    assert isinstance(construction.make(plan(parts, Pair)), Invalid)
    assert construction.problems == [Invalid(message, ("one", *key))]
    assert [type(made) for made in construction.objects.values()] == [Part]
    parts["one"]["error"] = "disk"
    with pytest.raises(MachineError):
        construction.make(plan(parts, Pair))


def test_lightnings_own_key_seeds_the_initial_weights(tmp_path: Path) -> None:
    weights = []
    for number, seed in enumerate((1, 1, 2)):
        config = run_config({"classify": (str(tmp_path / "classify"), "classify")}) | {"seed_everything": seed}
        made = build(write_run(tmp_path / str(number), config), training=True)
        weights.append(next(made.model.parameters()).sum().item())
    assert weights[0] == weights[1] != weights[2]


def test_one_start_reports_all_problems_of_a_run_config_at_its_lines(tmp_path: Path) -> None:
    config = run_config({"classify": (str(tmp_path / "classify"), "classify")}) | {"sed": 1, "seed": "x"}
    config["trainer"] |= {"max_epoch": 3, "callbacks": {"class_path": "lightning.pytorch.callbacks.Gone"}}
    config["model"]["init_args"]["optimizer"]["init_args"] = {"lr": "fast"}
    run = write_run(tmp_path, config)
    with pytest.raises(ConfigError) as caught:
        build(run, training=True)
    lines = run.config.read_text().splitlines()
    assert {
        (problem.key, lines[(problem.line or 0) - 1].split(":")[0].strip(" -")) for problem in caught.value.problems
    } == {
        ("sed", "sed"),
        ("seed", "seed"),
        ("trainer.max_epoch", "max_epoch"),
        ("trainer.callbacks.0.class_path", "callbacks"),
        ("model.init_args.optimizer.init_args.lr", "lr"),
    }


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (list[Callback] | Callback | None, "list[Callback] or Callback or null"),
        (dict[str, torch.Tensor | int], "dict[str, Tensor | int]"),
        (typing.Literal["a", "b.c"] | None, "one of a, b.c or null"),
    ],
)
def test_types_are_named_without_their_modules(hint: Any, text: str) -> None:
    assert type_text(hint) == text
