"""Arguments without effect are told: each kind once, at file and line, and only where they ask for something."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from rslp.check.config import parse
from rslp.config import without_effect
from rslp.config.notes import RULES
from tests.config.samples import CROPS, FIELDS, MULTI, composed
from tests.tiny import run_config

_SPLIT = ("data", "init_args", "data_modules", "a", "init_args", "train_config")


def test_stage_1_names_file_and_line_of_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    crops = CROPS.replace('      groups: ["two"]', '      groups: ["two"]\n      sampler: {class_path: x.Sampler}')
    fields = FIELDS.replace("    batch_size: 2", "    batch_size: 2\n    num_workers: 8\n    retries: 3")
    composed(tmp_path, crops=crops, fields=fields, multi=MULTI + "max_train_patches: 100\n")
    notes = [line for line in capsys.readouterr().err.splitlines() if "has no effect" in line]
    texts = {"crops": crops, "fields": fields, "multi": MULTI + "max_train_patches"}

    def at(name: str, word: str) -> str:
        number = next(i for i, line in enumerate(texts[name].splitlines(), 1) if word in line)
        return f"{name}.yaml:{number}"

    (workers,) = [note for note in notes if "`num_workers`" in note]
    assert f"{at('crops', 'num_workers')}: data.init_args.num_workers" in workers
    assert f"(also {at('fields', 'num_workers')})" in workers.replace(f"{tmp_path}/", "")
    (sampler,) = [note for note in notes if "`sampler`" in note]
    assert f"{at('crops', 'sampler')}: data.init_args.val_config.sampler" in sampler
    assert "an evaluation and a prediction use each sample once" in sampler
    (patches,) = [note for note in notes if "`num_patches`" in note]
    assert f"{at('multi', 'max_train_patches')}: max_train_patches" in patches
    assert len(notes) == 3


def _with(at: tuple[Any, ...], value: Any) -> dict[str, Any]:
    config = run_config({"a": ("nowhere", "detect")})
    node: Any = config
    for key in at[:-1]:
        node = node.setdefault(key, {})
    node[at[-1]] = copy.deepcopy(value)
    return config


@pytest.mark.parametrize(
    ("at", "value", "told"),
    [
        ((*_SPLIT, "num_patches"), 5, True),
        ((*_SPLIT, "num_patches"), None, False),
        (_SPLIT, {"class_path": "rslearn.train.dataset.SplitConfig", "init_args": {"num_patches": 5}}, True),
        ((*_SPLIT[:-1], "num_workers"), 0, False),
        ((*_SPLIT[:-1], "use_in_memory_dataset"), False, False),
        ((*_SPLIT[:-1], "use_in_memory_dataset"), True, True),
        ((*_SPLIT, "sampler"), {"class_path": "x.Sampler"}, False),
        ((*_SPLIT[:-1], "inputs", "image", "resampling"), "nearest", False),
        ((*_SPLIT[:-1], "inputs", "image", "resampling"), "bilinear", True),
        (
            (*_SPLIT[:-1], "default_config"),
            {"output_layer_name_skip_inference_if_exists": "out"},
            False,
        ),
        ((*_SPLIT, "output_layer_name_skip_inference_if_exists"), "out", True),
        (("trainer", "strategy"), {"class_path": "x.DDPStrategy", "init_args": {"find_unused_parameters": True}}, True),
        (("trainer", "strategy"), "ddp", False),
        (("trainer", "logger"), False, True),
        (("trainer", "logger"), None, False),
        (("trainer", "use_distributed_sampler"), False, False),
    ],
)
def test_only_what_asks_for_something_is_told(at: tuple[Any, ...], value: Any, told: bool) -> None:
    assert bool(without_effect(_with(at, value))) is told


@pytest.mark.parametrize("path", ["rslearn.train.tasks.detection.DetectionTask", "rslp.helios.tasks.MarineInfraTask"])
def test_arguments_of_a_class_are_told_wherever_it_stands(path: str) -> None:
    config = run_config({"a": ("nowhere", "detect")})
    for arguments in (config["model"]["init_args"], config["data"]["init_args"]["data_modules"]["a"]["init_args"]):
        task = arguments["task"]["init_args"]["tasks"]["a"]
        task["class_path"] = path
        task["init_args"]["skip_empty_examples"] = True
    ((rule, places),) = without_effect(config)
    assert (rule.name, len(places)) == ("skip_empty_examples", 2)
    (found,) = [finding for finding in parse(config).findings if "skip_empty_examples" in finding.what]
    assert (found.error, found.at) == (False, places[0])
    assert found.what.endswith("(and in 1 more places)")


def test_each_kind_says_what_to_do_in_one_line() -> None:
    for rule in RULES:
        assert "\n" not in rule.message()
        assert len(rule.message()) < 220
    for odd in (None, [], "x", {"trainer": None}, {"trainer": []}, {"data": {"init_args": {"data_modules": None}}}):
        assert without_effect(odd) == []
