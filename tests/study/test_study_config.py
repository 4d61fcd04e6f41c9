"""What a study.yaml may hold, which arms and runs it gives, and that budgets are equal."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from make_schema import STUDY_PAGE, STUDY_SCHEMA_FILE, documented_study, study_schema

from rslp.cli.main import main
from rslp.data.mixture.mixture import Mixture, plan_epoch
from rslp.errors import ConfigError
from rslp.io import read_yaml
from rslp.study.budget import Epoch, needs_epoch, run_tree
from rslp.study.config import arms_of, read_study
from rslp.study.plan import StudyPlan
from tests import children
from tests.examples import shared_example
from tests.study.small import KINDS, write_study

REMEDY = "run: make schema"


def test_page_and_schema_follow_the_keys() -> None:
    assert documented_study(STUDY_PAGE.read_text()) == STUDY_PAGE.read_text(), REMEDY
    assert json.loads(STUDY_SCHEMA_FILE.read_text()) == study_schema(), REMEDY


def test_the_study_of_the_page_is_valid_and_that_of_the_example_too(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", STUDY_PAGE.read_text(), re.DOTALL)
    example = Path(__file__).parents[2] / "rslp" / "example" / "configs"
    (tmp_path / "multi_dataset.yaml").write_text((example / "multi_dataset.yaml").read_text())
    for text in (block, (example / "study.yaml").read_text()):
        (tmp_path / "study.yaml").write_text(text)
        study = read_study(tmp_path / "study.yaml")
        assert [arm.name for arm in arms_of(study, ["a", "b"])][:2] == ["joint", "single"]


def test_the_commands_of_the_page(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (block,) = re.findall(r"```bash\n(.*?)```", STUDY_PAGE.read_text(), re.DOTALL)
    example, dry_run, whole = (shlex.split(line)[3:] for line in block.splitlines())
    assert example == ["helios", "make_example", "--path", "example/"]
    shutil.copytree(shared_example(tmp_path_factory), tmp_path / "example")
    done = children.rslp(*dry_run, cwd=tmp_path)
    assert done.returncode == 0 and "19 runs" in done.stdout, done.stderr
    assert [*whole, "--dry_run", "true"] == dry_run


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"arms": []}, "arms: must be a list of at least one item; got []"),
        ({"arms": ["joint", "jiont"]}, "study.yaml:7: arms.1: must be 'joint', 'single'"),
        ({"arms": ["joint", "joint"]}, "two arms are called joint"),
        ({"arms": [{"overrides": {"batch_size": 2}}]}, "arms.0: has overrides, so it needs a name of its own"),
        ({"arms": [{"name": "x", "kind": "pairs"}]}, "pairs is several arms"),
        ({"arms": [{"name": "a b"}]}, "arms.0.name: must "),
        ({"seeds": [1, 1]}, "seeds: names 1 twice"),
        ({"seeds": [-1]}, "seeds.0: must be greater than or equal to 0; got -1"),
        ({"fractions": [1.5]}, "fractions.0: must be less than 1; got 1.5"),
        ({"sedes": [1]}, "sedes: unknown key; did you mean seeds?"),
        ({"budget": "time"}, "budget: must be 'samples' or 'steps'; got 'time'"),
        ({"multi_dataset_config": "no.yaml"}, "'no.yaml' does not exist"),
        ({"reference": "mean"}, "there is no arm 'mean'; got joint, single"),
        ({"patch_size": 0}, "patch_size: must be greater than 0"),
        (
            {"arms": [{"name": "x", "overrides": {"global_overides": {}}}]},
            "arms.0.overrides: with these overrides: multi.yaml:1: unknown key; did you mean global_overrides?",
        ),
    ],
)
def test_a_mistake_is_named_with_its_line(
    tmp_path: Path, monkeypatch: Any, capsys: Any, keys: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RSLP_PREFIX", str(tmp_path / "runs"))
    write_study(tmp_path, sizes={"train": 1, "val": 1, "test": 1}, **keys)
    assert main(["helios", "study", "--cfg", "study.yaml", "--dry_run", "true"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: study.yaml") and "Traceback" not in error
    assert not (tmp_path / "runs").exists()


def test_arms_and_their_runs(tmp_path: Path) -> None:
    arms = ["joint", "single", "pairs", "leave_one_out", "fractions", {"name": "x", "kind": "single"}]
    path = write_study(tmp_path, sizes={"train": 1, "val": 1, "test": 1}, arms=arms, fractions=[0.25])
    made = {arm.name: arm.runs for arm in arms_of(read_study(path), ["a", "b", "c"])}
    each = (("a",), ("b",), ("c",))
    assert made == {
        "joint": (("a", "b", "c"),),
        "single": each,
        "pair:a+b": (("a", "b"),),
        "pair:a+c": (("a", "c"),),
        "pair:b+c": (("b", "c"),),
        "without:a": (("b", "c"),),
        "without:b": (("a", "c"),),
        "without:c": (("a", "b"),),
        "joint:0.25": (("a", "b", "c"),),
        "single:0.25": each,
        "x": each,
    }
    with pytest.raises(ConfigError, match="single needs two datasets or more"):
        arms_of(read_study(path), ["a"])


def test_fingerprints_are_the_same_elsewhere_and_change_with_the_config(tmp_path: Path) -> None:
    def fingerprints(folder: Path, **keys: Any) -> dict[str, str]:
        if not folder.exists():
            folder.mkdir()
            write_study(folder, sizes={"train": 1, "val": 1, "test": 1}, seeds=[0], **keys)
        plan = StudyPlan.of(read_study(folder / "study.yaml"), str(folder / "runs"))
        return {run.experiment: run.fingerprint for run in plan.runs}

    one, two = fingerprints(tmp_path / "one"), fingerprints(tmp_path / "two")
    assert one == two and len(set(one.values())) == len(one) == 3
    more = fingerprints(tmp_path / "more", arms=["joint", "single", "leave_one_out"])
    assert {name: more[name] for name in one} == one
    steps = fingerprints(tmp_path / "steps", budget="steps")
    assert not set(steps.values()) & set(one.values())
    dataset = tmp_path / "two" / "classes.yaml"
    dataset.write_text(dataset.read_text().replace("batch_size: 2", "batch_size: 4"))
    assert not set(fingerprints(tmp_path / "two").values()) & set(one.values())


SIZES, BATCHES = {"a": 10, "b": 40, "c": 7}, {"a": 4, "b": 4, "c": 2}


def drawn(tree: dict[str, Any], epochs: int = 1) -> dict[str, int]:
    """Samples that a run config draws of each dataset, and under an empty name its steps."""
    arguments = tree["data"]["init_args"]
    present = [name for name in SIZES if name not in arguments.get("disabled_datasets", ())]
    mixture = Mixture(
        mode=arguments.get("sample_mode", "random_cycle"),
        weights=arguments.get("weights"),
        steps_per_epoch=arguments.get("steps_per_epoch"),
        datasets_per_step=arguments.get("datasets_per_step", 1),
        stop=arguments.get("stop", "all"),
    )
    samples = dict.fromkeys(["", *present], 0)
    for epoch in range(epochs):
        planned = plan_epoch(
            {name: SIZES[name] for name in present},
            {name: BATCHES[name] for name in present},
            mixture,
            seed=0,
            epoch=epoch,
        )
        samples[""] += planned.steps
        for batch in planned:
            samples[batch.dataset] += batch.global_size
    return samples


@pytest.mark.parametrize("given", [{}, {"datasets_per_step": 2}, {"stop": "longest"}, {"steps_per_epoch": 9}])
@pytest.mark.parametrize("datasets", [("a",), ("b",), ("a", "c")])
def test_equal_samples_and_equal_steps(given: dict[str, Any], datasets: tuple[str, ...]) -> None:
    modules = {name: {"init_args": {}} for name in SIZES}
    tree = {"data": {"init_args": {"data_modules": modules, **given}}, "trainer": {"max_epochs": 1}}
    joint = drawn(tree)
    mixture = Mixture(
        **({"datasets_per_step": given["datasets_per_step"]} if "datasets_per_step" in given else {}),
        stop=given.get("stop", "all"),
        steps_per_epoch=given.get("steps_per_epoch"),
    )
    planned = plan_epoch(SIZES, BATCHES, mixture, seed=0, epoch=0)
    samples = {name: joint[name] for name in SIZES}
    epoch = Epoch(planned.counts, samples, SIZES, SIZES, BATCHES, planned.steps, 1, mixture.whole, 1)
    for budget in ("samples", "steps"):
        needed = needs_epoch(tree, datasets=datasets, fraction=1, budget=budget)  # type: ignore[arg-type]
        assert needed == (budget == "steps" or not mixture.whole)
        run = run_tree(tree, datasets=datasets, seed=3, budget=budget, epoch=epoch if needed else None)  # type: ignore[arg-type]
        assert run["seed"] == 3 and "seed" not in tree
        got = drawn(run)
        assert set(got) == {"", *datasets}
        if budget == "steps":
            assert got[""] == round(joint[""] * len(datasets) / 3)
        else:
            # Up to the last batch, which may be smaller in a pass than elsewhere.
            assert all(abs(got[name] - joint[name]) <= BATCHES[name] for name in datasets)


def test_a_fraction_draws_as_many_samples_of_fewer_windows() -> None:
    modules = {name: {"init_args": {"train_config": {"tags": {"split": "train"}}}} for name in SIZES}
    tree = {"data": {"init_args": {"data_modules": modules}}, "trainer": {"max_epochs": 1}}
    epoch = Epoch({"a": 3, "b": 10, "c": 4}, SIZES, SIZES, SIZES, BATCHES, 17, 1, True, 1)
    run = run_tree(tree, datasets=("a", "b"), seed=0, fraction=0.1, epoch=epoch)
    arguments = run["data"]["init_args"]
    assert arguments["data_modules"]["a"]["init_args"]["train_config"] == {"tags": {"split": "train"}, "num_samples": 1}
    assert arguments["data_modules"]["b"]["init_args"]["train_config"]["num_samples"] == 4
    # Ten passes over one window of "a", in batches of one; ten over four of "b".
    assert (arguments["weights"], arguments["steps_per_epoch"]) == ({"a": 10, "b": 10}, 20)
    assert "num_samples" not in str(tree)


def test_a_dry_run_lists_the_runs_and_starts_nothing(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RSLP_PREFIX", str(tmp_path / "runs"))
    write_study(tmp_path, arms=["joint", "single"], seeds=[0, 1], baselines=["constant"], epochs=3)
    assert main(["helios", "study", "--cfg", "study.yaml", "--dry_run", "true"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^study\.joint\.s0 +18 +36 +\d+\.\d\d +\d+\.\d\d$", shown, re.MULTILINE), shown
    assert re.search(r"^study\.single\.numbers\.s1 +9 +18 ", shown, re.MULTILINE)
    assert "study.constant.s0" in shown and "7 runs, 72 steps" in shown
    assert max(map(len, shown.splitlines())) <= 120
    assert not (tmp_path / "runs").exists()


def test_limits_that_arms_could_not_share_are_refused(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path)
    base = yaml.safe_load(Path("base.yaml").read_text())
    base["trainer"] |= {"max_steps": 5}
    Path("base.yaml").write_text(yaml.safe_dump(base))
    assert main(["helios", "study", "--cfg", "study.yaml", "--dry_run", "true"]) == 2
    assert "trainer.max_steps: a study counts in epochs" in capsys.readouterr().err


def test_the_datasets_of_the_small_study(tmp_path: Path) -> None:
    plan = StudyPlan.of(read_study(write_study(tmp_path)), str(tmp_path))
    assert plan.datasets == tuple(KINDS)
    assert read_yaml(tmp_path / "study.yaml").data["multi_dataset_config"] == "multi.yaml"
