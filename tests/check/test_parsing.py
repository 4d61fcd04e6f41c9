"""What the parser and the constructors refuse, at the keys that a person wrote."""

from __future__ import annotations

from typing import Any

import pytest

from rslp.check.config import parse
from rslp.train.instantiate import argument_of
from tests.tiny import run_config

DATA = ("data", "init_args")
# The parser takes a second for each dataset.
TWO = {"classify": ("nowhere", "classify"), "segment": ("nowhere", "segment")}
ONE, OTHER = ({name: TWO[name]} for name in TWO)


@pytest.mark.parametrize(
    ("datasets", "given", "wanted"),
    [
        (
            ONE,
            {"sample_mode": "temperature", "per_dataset_patch_limit": 0},
            {
                (*DATA, "temperature"): "mode temperature needs it",
                (*DATA, "per_dataset_patch_limit"): "at least 1, got 0",
            },
        ),
        (ONE, {"sample_mode": "weights", "weights": {"classify": -1.0}}, {(*DATA, "weights", "classify"): "positive"}),
        (TWO, {"sample_mode": "weights", "weights": {"classify": 1.0}}, {(*DATA, "weights"): "no value for segment"}),
        (ONE, {"sample_mode": "randomly"}, {(*DATA, "sample_mode"): "randomly"}),
        (ONE, {"refill_batches": True, "steps_per_epoch": 3}, {(*DATA, "steps_per_epoch"): "contradicts"}),
        # The module names its own arguments as the config does.
        (ONE, {"max_faults": -1}, {(*DATA, "max_faults"): "got -1; 0 or more"}),
        (ONE, {"read_timeout": 0}, {(*DATA, "read_timeout"): "seconds, more than 0"}),
    ],
)
def test_faults_of_the_mixture_stand_at_the_arguments_of_the_config(
    datasets: dict[str, tuple[str, str]], given: dict[str, Any], wanted: dict[tuple[str, ...], str]
) -> None:
    found = {finding.at: finding.what for finding in parse(run_config(datasets, **given)).findings}
    assert set(found) == set(wanted)
    for at, message in wanted.items():
        assert message in found[at]


def test_a_sound_config_has_no_fault_and_a_small_head_has_one() -> None:
    assert parse(run_config(TWO)).findings == ()
    config = run_config(OTHER)
    config["model"]["init_args"]["task"]["init_args"]["tasks"]["segment"]["init_args"]["num_classes"] = 5
    (found,) = parse(config).findings
    assert found.at[-4:] == ("segment", 0, "init_args", "out_channels")
    assert found.what == "2 outputs, but the task 'segment' has 5 classes; make them equal"


def test_a_list_of_what_should_be_texts_is_one_finding() -> None:
    config = run_config(ONE)
    for task in (
        config["model"]["init_args"]["task"],
        config["data"]["init_args"]["data_modules"]["classify"]["init_args"]["task"],
    ):
        task["init_args"]["tasks"]["classify"]["init_args"]["classes"] = [0, 1]
    told = [found.what for found in parse(config).findings]
    assert told
    assert set(told) == {"expected str; got 0; write it in quotes (and 1 more here)"}


def test_a_class_of_another_rslp_is_told_apart() -> None:
    config = run_config(ONE)
    config["data"]["init_args"]["data_modules"]["classify"]["init_args"]["train_config"]["transforms"] = [
        {"class_path": "rslp.harbour.transforms.Quay"}
    ]
    (found,) = parse(config).findings
    assert "'rslp.harbour.transforms.Quay' can't be imported: No module named 'rslp.harbour'; " in found.what
    assert "rslearn_projects has a package of this name too: copy the class into a module of your own" in found.what


def test_a_class_that_moved_is_told_where_it_is() -> None:
    config = run_config(ONE)
    config["model"]["init_args"]["model"]["class_path"] = "rslp.train.model.JointModel"
    config["trainer"]["callbacks"] = [{"class_path": "rslp.train.freezing.Freeze"}]
    assert {(finding.at, finding.what) for finding in parse(config).findings} == {
        (
            ("model", "init_args", "model", "class_path"),
            "'rslp.train.model.JointModel' is 'rslp.train.JointModel' now",
        ),
        (("trainer", "callbacks", 0, "class_path"), "'rslp.train.freezing.Freeze' is 'rslp.train.Freeze' now"),
    }


def test_false_is_what_yaml_makes_of_off() -> None:
    assert parse(run_config(ONE, store=False, features=False)).findings == ()


def test_class_names_of_a_run_config_are_compared() -> None:
    config = run_config(ONE)
    task = config["model"]["init_args"]["task"]["init_args"]["tasks"]["classify"]
    task["init_args"]["classes"] = ["dark", "dark"]
    assert [found.what for found in parse(config).findings] == ["the class 'dark' stands 2 times; keep one"]


@pytest.mark.parametrize(
    ("key", "argument"),
    [
        ("mixture.limits.crops", ("per_dataset_patch_limit", "crops")),
        ("mixture.mode", ("sample_mode",)),
        ("mixture.stop", ("refill_batches",)),
        ("mixture.steps_per_epoch", ("steps_per_epoch",)),
        ("band_names.x", ("band_names", "x")),
        ("", ()),
    ],
)
def test_a_key_of_the_mixture_is_told_as_the_argument_that_set_it(key: str, argument: tuple[str, ...]) -> None:
    assert argument_of(key) == argument
