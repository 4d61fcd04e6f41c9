"""Dataset configs as rslearn's own documentation writes them: they compose, pass the check, and train."""

# ruff: noqa: E501 - a table with one mistake a line reads better than a wrapped one
import copy
import os
import shutil
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest
import yaml

from rslp.cli.main import main
from rslp.config import placeholder_names
from rslp.config.placeholders import Filler
from rslp.io import dump_yaml, read_yaml
from tests.children import rslp
from tests.config.samples import CROPS, FIELDS, MULTI, composed, line, replaced, write
from tests.examples import shared_example

MODEL = ("model", "init_args", "model", "init_args")
TASK = ("data", "init_args", "task")
FILLER = Filler(placeholder_names({"patch_size": 4, "encoder_embedding_size": 16}))


def at(tree, place):
    return reduce(lambda node, key: node[key], place, tree)


def single(config: dict) -> dict:
    """The same dataset as a tutorial of rslearn writes it: one plain task, one decoder, inputs by the task's names."""
    config = copy.deepcopy(config)
    ((name, decoder),) = at(config, MODEL)["decoders"].items()
    model = at(config, MODEL)
    del model["decoders"]
    model["decoder"] = decoder
    config["model"]["class_path"] = "rslearn.train.lightning_module.RslearnLightningModule"
    config["model"]["init_args"]["model"]["class_path"] = "rslearn.models.singletask.SingleTaskModel"
    arguments = config["data"]["init_args"]
    mapping = arguments["task"]["init_args"]["input_mapping"][name]
    arguments["inputs"] = {mapping.get(key, key): value for key, value in arguments["inputs"].items()}
    arguments["task"] = arguments["task"]["init_args"]["tasks"][name]
    text = yaml.safe_dump(config, sort_keys=False)
    return yaml.safe_load(text.replace(f"target/{name}/", "target/").replace(f"target/{name}", "target/"))


def spelt_out(config: dict) -> dict:
    """The same config as ``--print_config`` writes it."""
    config = copy.deepcopy(config)
    arguments = config["data"]["init_args"]
    wrap = lambda name, value: {"class_path": f"rslearn.train.dataset.{name}", "init_args": value}  # noqa: E731
    arguments["inputs"] = {key: wrap("DataInput", value) for key, value in arguments["inputs"].items()}
    for key in [key for key in arguments if key.endswith("_config")]:
        arguments[key] = wrap("SplitConfig", arguments[key])
    return config


def loaded(text: str, folder: Path) -> dict:
    (folder / "one.yaml").write_text(text)
    return FILLER.fill(read_yaml(folder / "one.yaml").data, lambda what, _: pytest.fail(what))


@pytest.mark.parametrize("options", [[], ["--keep_class_paths", "true"]])
def test_a_plain_task_composes_as_the_same_task_of_a_multitask(tmp_path, options):
    crops = CROPS.replace("            label: targets", "            targets: targets").replace(
        "inputs:", "inputs:\n      targets: {data_type: vector, layers: [label], is_target: true}"
    )
    plain = dump_yaml(single(loaded(crops, tmp_path)))
    multi = replaced(MULTI, "  - crops.yaml\n", "  - {name: crops, cfgs: crops.yaml}\n")
    wanted = composed(tmp_path, *options, multi=multi, crops=crops)
    mapping = at(
        wanted, ("data", "init_args", "data_modules", "crops", "init_args", "task", "init_args", "input_mapping")
    )
    mapping["crops"] = {"targets": "targets", "s2": "s2"}
    at(wanted, ("model", "init_args", "task", "init_args", "input_mapping"))["crops"] = mapping["crops"]
    assert composed(tmp_path, *options, multi=multi, crops=plain) == wanted


def test_a_plain_task_is_named_by_its_entry_or_its_file_and_told(tmp_path, capsys):
    plain = dump_yaml(single(loaded(CROPS, tmp_path)))
    run = composed(tmp_path, crops=plain)
    assert list(at(run, (*MODEL, "decoders"))) == ["crops", "fields"]
    what = "data.init_args.task: becomes the task 'crops' of a MultiTask, since it is a plain one"
    assert f"crops.yaml:{line(plain, 'task:')}: {what}" in capsys.readouterr().err
    run = composed(
        tmp_path, crops=plain, multi=replaced(MULTI, "  - crops.yaml\n", "  - {name: east, cfgs: crops.yaml}\n")
    )
    assert list(at(run, (*MODEL, "decoders"))) == ["east", "fields"]
    selectors = at(
        run, ("data", "init_args", "data_modules", "east", "init_args", "train_config", "transforms", 0, "init_args")
    )
    assert selectors == {"image_selectors": ["s2", "target/east/classes"]}


def test_overrides_of_a_plain_task_are_wrapped_as_it_is(tmp_path):
    plain = dump_yaml(single(loaded(CROPS, tmp_path)))
    over = "{data: {init_args: {task: {init_args: {property_name: %s}}}}}"
    entry = f"  - {{name: east, cfgs: [crops.yaml, more.yaml], overrides: {over % 'entry'}}}\n"
    path = ("model", "init_args", "task", "init_args", "tasks", "east", "init_args", "property_name")
    more = f"{over % 'file'}\n"
    multi = replaced(MULTI, "  - crops.yaml\n", entry)
    assert at(composed(tmp_path, crops=plain, more=more, multi=multi), path) == "entry"
    multi = multi.replace(", overrides: " + over % "entry", "")
    assert at(composed(tmp_path, crops=plain, more=more, multi=multi), path) == "file"
    multi = replaced(multi, "  - - fields.yaml\n    - fields_more.yaml\n", "") + f"local_overrides: {over % 'local'}\n"
    assert at(composed(tmp_path, crops=plain, more=more, multi=multi), path) == "local"


def test_a_fault_in_a_plain_task_stands_at_its_line(tmp_path, capsys):
    plain = dump_yaml(single(loaded(replaced(CROPS, "out_channels: 3", "out_channels: 2"), tmp_path)))
    assert main(["helios", "make_multidataset_config", "--cfg", str(write(tmp_path, crops=plain))]) == 2
    assert f"crops.yaml:{line(plain, 'out_channels')}: " in capsys.readouterr().err


def test_inputs_and_splits_may_name_their_class(tmp_path):
    wanted = composed(tmp_path)
    spelt = dump_yaml(spelt_out(loaded(CROPS, tmp_path)))
    assert "class_path: rslearn.train.dataset.SplitConfig" in spelt
    assert composed(tmp_path, crops=spelt) == wanted


def test_a_misspelt_argument_of_an_input_that_names_its_class_is_found(tmp_path, capsys):
    spelt = dump_yaml(spelt_out(loaded(replaced(CROPS, "bands:", "band:"), tmp_path)))
    assert main(["helios", "make_multidataset_config", "--cfg", str(write(tmp_path, crops=spelt))]) == 2
    said = capsys.readouterr().err
    assert f"crops.yaml:{line(spelt, 'band:')}: data.init_args.inputs.s2.band: unknown key for DataInput" in said


def test_lists_are_appended_to_by_overrides_of_datasets(tmp_path):
    over = "{data: {init_args: {train_config: {groups+: [more]}, val_config: {names+: [w]}}}}"
    entry = f"  - {{name: crops, cfgs: crops.yaml, overrides: {over}}}\n"
    groups = ("data", "init_args", "data_modules", "crops", "init_args", "train_config", "groups")
    assert at(composed(tmp_path, multi=replaced(MULTI, "  - crops.yaml\n", entry)), groups) == ["one", "more"]
    assert at(composed(tmp_path, multi=MULTI + f"local_overrides: {over}\n"), groups) == ["one", "more"]


def test_an_argument_that_is_gone_is_dropped_and_told(tmp_path, capsys):
    pick_features = "            - {class_path: rslearn.models.pick_features.PickFeatures, init_args: {indexes: [0], collapse: true}}\n"
    crops = replaced(
        CROPS,
        "          crops:\n            - class_path: rslearn.models",
        f"          crops:\n{pick_features}            - class_path: rslearn.models",
    )
    run = composed(tmp_path, crops=crops)
    assert at(run, (*MODEL, "decoders", "crops", 0, "init_args")) == {"indexes": [0]}
    note = f"PickFeatures.collapse is gone, and dropped ({tmp_path}/crops.yaml:{line(crops, 'collapse')})"
    assert note in capsys.readouterr().err.replace("../", "")
    kept = composed(tmp_path, "--keep_class_paths", "true", crops=crops)
    assert at(kept, (*MODEL, "decoders", "crops", 0, "init_args")) == {"indexes": [0], "collapse": True}


def test_a_switch_that_never_was_gets_a_hint(tmp_path, capsys):
    path = write(tmp_path, multi=MULTI + "global_overrides: {model: {init_args: {cosine_anneal: true}}}\n")
    assert main(["helios", "make_multidataset_config", "--cfg", str(path)]) == 2
    assert (
        "unknown key for JointModule; write scheduler: {class_path: rslearn.train.scheduler.Cosine"
        in capsys.readouterr().err
    )


NAMES = ["no", "7", "1.5", "null", "2024-05-01", "~"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_text_is_one_line_before_anything_is_written(tmp_path, capsys, name):
    crops = CROPS.replace("          crops:", f"          {name}:")
    assert main(["helios", "make_multidataset_config", "--cfg", str(write(tmp_path, crops=crops))]) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1
    assert f"crops.yaml:{line(crops, f'{name}:')}: " in said.err
    assert "write it in quotes" in said.err
    assert not (tmp_path / "OUT.yaml").exists()
    assert "crops" in composed(tmp_path, crops=CROPS.replace("crops:", '"crops":'))["data"]["init_args"]["data_modules"]


def test_a_group_that_looks_like_a_selector_keeps_its_name(tmp_path):
    crops = replaced(CROPS, 'groups: ["one"]', "groups: [target/crops]\n      names: [target/crops/x]")
    entry = "  - {name: east, cfgs: crops.yaml}\n"
    run = composed(tmp_path, crops=crops, multi=replaced(MULTI, "  - crops.yaml\n", entry))
    split = at(run, ("data", "init_args", "data_modules", "east", "init_args", "train_config"))
    assert split["groups"] == ["target/crops"]
    assert split["names"] == ["target/crops/x"]
    assert split["transforms"][0]["init_args"]["image_selectors"] == ["s2", "target/east/classes"]


SPLIT = ("data", "init_args", "train_config")


@pytest.mark.parametrize(
    ("multi", "files", "wanted"),
    [
        (MULTI.replace("- crops.yaml", "- OUT_before.yaml"), {"OUT_before": "made"}, "OUT_before.yaml: is a run config, but dataset_cfgs names it"),
        (MULTI.replace("- crops.yaml", "- [crops.yaml, more.yaml]"), {"more": "# nothing yet\n"}, "more.yaml: is empty, but"),
        (MULTI.replace("/models/helios # v0.2: 'base'", "/p{PATCH_SIZE}"), {}, "helios_checkpoint_path: must be a text; got '/p{PATCH_SIZE}'; a constant can't hold the placeholder of another"),
        (MULTI + "substitutions: {a: '{PATCH_SIZE}'}\n", {}, "multi.yaml:10: substitutions.a: must be a value without the placeholder of another, and no mapping; got '{PATCH_SIZE}'"),
        (MULTI + "substitutions: {my-group: x}\n", {}, "multi.yaml:10: substitutions.my-group: must be a name of letters, digits and _ that starts with a letter; got 'my-group'"),
        (MULTI.replace("patch_size: 4", "patch_size:"), {}, "multi.yaml:6 sets patch_size to null"),
        (MULTI, {"crops": CROPS.replace("batch_size: 4", "batch_size: {foo}")}, "data.init_args.batch_size: {foo} is no placeholder"),
        (MULTI, {"crops": CROPS.replace("batch_size: 4", "batch_size: {256/foo}")}, "data.init_args.batch_size: {256/foo} is no placeholder"),
        (MULTI.replace("  - crops.yaml", "  - {name: no, cfgs: crops.yaml}"), {}, "got False; write it in quotes"),
    ],
)  # fmt: skip
def test_one_right_line(tmp_path, capsys, multi, files, wanted):
    if "OUT_before" in files:
        files = {"OUT_before": dump_yaml(composed(tmp_path))}
        capsys.readouterr()
    assert main(["helios", "make_multidataset_config", "--cfg", str(write(tmp_path, multi=multi, **files))]) == 2
    said = capsys.readouterr().err
    assert wanted in said.replace(f"{tmp_path}/", "")
    assert "Traceback" not in said


def test_a_tag_alone_is_no_placeholder(tmp_path):
    crops = replaced(CROPS, '      groups: ["two"]', '      groups: ["two"]\n      tags: {checked}')
    run = composed(tmp_path, crops=crops)
    assert at(run, ("data", "init_args", "data_modules", "crops", "init_args", "val_config", "tags")) == {
        "checked": None
    }


def test_a_pipe_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.yaml")
    path = write(tmp_path, multi=MULTI.replace("- crops.yaml", "- pipe.yaml"))
    assert main(["helios", "make_multidataset_config", "--cfg", str(path)]) == 2
    assert "multi.yaml:3: dataset_cfgs.0: 'pipe.yaml' is no regular file" in capsys.readouterr().err


def test_a_store_without_credentials_is_one_line(tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    path = write(tmp_path, multi=MULTI.replace("- crops.yaml", "- s3://bucket/a.yaml"))
    command = [sys.executable, "-m", "rslp.main", "helios", "make_multidataset_config", "--cfg", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "multi.yaml:3: dataset_cfgs.0: 's3://bucket/a.yaml' cannot be read: " in done.stderr
    assert len(done.stderr.splitlines()) == 1


VARIABLES = replaced(CROPS, "batch_size: 4", "batch_size: ${SIZE}").replace(
    'groups: ["one"]', 'groups: ["${GROUP}", "v${SIZE}"]'
)


def test_variables_stay_in_files_and_keep_their_quotes(tmp_path):
    run = composed(tmp_path, crops=replaced(VARIABLES, 'groups: ["two"]', 'groups: ["${SIZE}"]'))
    module = at(run, ("data", "init_args", "data_modules", "crops", "init_args"))
    assert module["batch_size"] == "${SIZE}"
    text = (tmp_path / "OUT.yaml").read_text()
    assert "batch_size: ${SIZE}\n" in text
    assert "groups: ['${SIZE}']" in text
    assert read_yaml(tmp_path / "OUT.yaml").data == run
    assert dump_yaml(read_yaml(tmp_path / "OUT.yaml").data) in text


# A model that is no encoder with decoders, as projects have beside rslearn's.
OWN_MODEL = """\
model:
  init_args:
    model:
      class_path: harbour.models.PairModel
      init_args:
        decoder_stages: [[64, 3]]
        loss_weight: 2.0
data:
  class_path: rslearn.train.data_module.RslearnDataModule
  init_args:
    path: /data/harbour
    inputs: {before: {data_type: raster, layers: [a], bands: [B02], passthrough: true}}
    task: {class_path: harbour.tasks.PairTask}
"""
OVERLAY = "data: {init_args: {batch_size: 3}}\n"
OWN_MULTI_TASK = replaced(CROPS, "rslearn.train.tasks.multi_task.MultiTask", "harbour.tasks.CropsTask").replace(
    "        tasks:\n", "        buckets: [1, 2]\n        tasks:\n"
)


@pytest.mark.parametrize(
    ("crops", "place", "wanted"),
    [
        (OWN_MODEL, "class_path: harbour.models", "model.init_args.model.class_path: PairModel has no decoders by task, and those alone are taken into a joint model: `decoders` of a MultiTaskModel, or the `decoder` of a SingleTaskModel"),
        (OVERLAY, "data:", "data: names no class_path; a file that is laid over another stands behind it in one list of dataset_cfgs"),
        (OWN_MULTI_TASK, "class_path: harbour", "data.init_args.task.class_path: harbour.tasks.CropsTask is a MultiTask of its own, and what it does beside would be lost: all tasks are united in one MultiTask; once the labels hold what the tasks read, write rslearn.train.tasks.multi_task.MultiTask, without buckets"),
        (replaced(CROPS, "out_channels: 3", "out_channels: 2"), "out_channels", "2 outputs, but the task 'crops' has 3 classes; make them equal"),
    ],
)  # fmt: skip
def test_what_no_joint_run_can_take_is_one_line_that_says_what_can(tmp_path, capsys, crops, place, wanted):
    assert main(["helios", "make_multidataset_config", "--cfg", str(write(tmp_path, crops=crops))]) == 2
    said = capsys.readouterr().err.replace(f"{tmp_path}/", "").splitlines()
    assert said[0].startswith(f"error: crops.yaml:{line(crops, place)}: ")
    assert wanted in said[0]
    assert len(said) == 1 + (crops == OVERLAY)  # of an overlay the decoders are missing too


def test_a_class_of_another_project_gets_no_hints_from_ours(tmp_path, capsys):
    crops = replaced(CROPS, "        decoders:\n", "        decoder_stages: []\n        decoders:\n")
    composed(tmp_path, crops=replaced(crops, "    model:\n", "    model:\n      class_path: harbour.MultiTaskModel\n"))
    assert "decoder_stages" in capsys.readouterr().err  # told: it stays behind
    assert main(["helios", "make_multidataset_config", "--cfg", str(write(tmp_path, crops=crops))]) == 2
    assert "decoder_stages: unknown key; did you mean" in capsys.readouterr().err


def test_a_normalisation_of_another_package_is_brought_up_to_date(tmp_path):
    own = "        - {class_path: olmoearth_projects.olmoearth_pretrain.norm.OlmoEarthNormalize, init_args: {band_names: {}}}\n"
    run = composed(tmp_path, crops=replaced(CROPS, "      transforms:\n", f"      transforms:\n{own}"))
    first = at(run, ("data", "init_args", "data_modules", "crops", "init_args", "train_config", "transforms", 0))
    assert first["class_path"] == "rslearn.models.olmoearth_pretrain.norm.OlmoEarthNormalize"


@pytest.mark.parametrize("options", [[], ["--keep_class_paths", "true"]])
def test_an_old_and_a_present_name_of_the_crop_size_are_one_too_many(tmp_path, capsys, options):
    fields = replaced(FIELDS, "crop_size: 64", "crop_size: 64\n      patch_size: 32")
    path = str(write(tmp_path, fields=fields))
    assert main(["helios", "make_multidataset_config", "--cfg", path, *options]) == 2
    said = capsys.readouterr().err
    assert (
        f"fields.yaml:{line(fields, 'patch_size: 32')}: data.init_args.train_config.patch_size: is the old name of crop_size, which stands here too"
        in said
    )


def test_a_flat_key_takes_a_variable(tmp_path, capsys):
    run = composed(tmp_path, multi=MULTI + "batch_size: ${BS}\nnum_workers: ${WORKERS}\n")
    modules = at(run, ("data", "init_args", "data_modules"))
    assert [module["init_args"]["batch_size"] for module in modules.values()] == ["${BS}", "${BS}"]
    assert "num_workers: ${WORKERS}\n" in (tmp_path / "OUT.yaml").read_text()
    path = str(write(tmp_path, multi=MULTI + 'batch_size: "${BS}"\n'))
    assert main(["helios", "make_multidataset_config", "--cfg", path]) == 2
    assert (
        "batch_size: must be a whole number above 0; got '${BS}'; write ${BS} without quotes" in capsys.readouterr().err
    )


# The example's datasets, each in a form of rslearn's documentation.
SHAPES = {
    "crop_type": (single, "a plain classification"),
    "land_cover": (lambda config: spelt_out(single(config)), "a plain segmentation that spells out its inputs"),
    "fuel_moisture": (spelt_out, "a regression as --print_config writes it"),
    "vessel_detection": (single, "a plain detection"),
}


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("user") / "example"
    shutil.copytree(shared_example(tmp_path_factory), path)
    return path


def test_each_form_composes_checks_and_trains_a_step_beside_the_example(example, monkeypatch):
    filler = Filler(placeholder_names({"patch_size": 8, "encoder_embedding_size": 128}))
    for name, (form, _) in SHAPES.items():
        config = filler.fill(read_yaml(example / f"{name}.yaml").data, lambda what, _: pytest.fail(what))
        changed = form(config)
        changed["data"]["init_args"]["batch_size"] = "SIZE"
        (example / f"own_{name}.yaml").write_text(
            dump_yaml(changed).replace("batch_size: SIZE", "batch_size: ${BATCH}")
        )
    multi = yaml.safe_load((example / "multi_dataset.yaml").read_text())
    multi["dataset_cfgs"] = [
        {"name": f"own_{name}", "cfgs": f"own_{name}.yaml"} for name in SHAPES if name != "fuel_moisture"
    ]
    multi["dataset_cfgs"] += ["own_fuel_moisture.yaml"]
    multi["global_overrides"]["trainer"] |= {"max_epochs": 1, "check_val_every_n_epoch": 1}
    multi["global_overrides"]["data"] = {"init_args": {"steps_per_epoch": 4, "sample_mode": "cycle", "store": False}}
    multi |= {"output_path": "OUT_own.yaml", "num_workers": 0}
    (example / "own.yaml").write_text(yaml.safe_dump(multi).replace("store: false", "store: off"))
    assert main(["helios", "make_multidataset_config", "--cfg", str(example / "own.yaml")]) == 0
    monkeypatch.chdir(example.parent)
    monkeypatch.setenv("BATCH", "2")
    words = ["launch_finetune", "--config_paths+=example/OUT_own.yaml", "--rslp_project", "p", "--experiment_id", "own"]
    done = rslp("helios", *words, "--local", "true", cwd=example.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (example.parent / "project_data/projects/p/own/DONE.json").exists()
