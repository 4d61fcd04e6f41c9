"""Whatever a person writes into a config, stage 1 carries it over, tells that it does not, or refuses it."""

import copy
import json
import re

import pytest
import yaml

from rslp.cli.main import main
from rslp.cli.make_multidataset_config import make_multidataset_config
from rslp.config.migrate import ARGUMENTS, MOVED_ARGUMENTS
from rslp.errors import UserError
from tests.config.samples import (
    BASE,
    CROPS,
    FIELDS,
    FILES,
    MULTI,
    TWO,
    composed,
    line,
    replaced,
    write,
)
from tests.functional.test_stage1_broken_values import MERGED, load, paths, put

KEY, VALUE = "zz_nobody_knows", 7
EVERY = MERGED.replace("overrides: {data: {}}", "overrides: {data: {init_args: {batch_size: 5}}}") + (
    "substitutions: {size: 3}\n"
)
TEXTS = {**FILES, "base.yaml": BASE.replace("max_epochs: 10", "max_epochs: 10\n  log_every_n_steps: {SIZE}")}
TEXTS["multi.yaml"] = EVERY


def read(text: str):
    return load(text.replace("{SIZE}", "3"))


def at_place(node, at):
    for key in at:
        node = node[key]
    return node


MAPPINGS = [
    (n, at) for n, text in TEXTS.items() for at in paths(read(text)) if isinstance(at_place(read(text), at), dict)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    write(folder, **{name.removesuffix(".yaml"): text for name, text in TEXTS.items()})
    make_multidataset_config(str(folder / "multi.yaml"))
    return folder


def holds(node, key) -> bool:
    if isinstance(node, dict):
        return node.get(key) == VALUE or any(holds(value, key) for value in node.values())
    return isinstance(node, list) and any(holds(value, key) for value in node)


def noted(said: str, name: str, at: tuple) -> bool:
    """Whether a note with file and line names a key, or one above it."""
    keys = {".".join(map(str, at[:length])) for length in range(1, len(at) + 1)}
    return any(keys & set(re.split(r"[ ,:]+", note)) for note in said.splitlines() if re.search(rf"{name}:\d+:", note))


@pytest.mark.parametrize("place", MAPPINGS, ids=lambda place: f"{place[0]}:{'.'.join(map(str, place[1]))}")
def test_an_unknown_key_is_carried_over_told_or_refused(folder, capsys, place):
    name, at = place
    (folder / "OUT.yaml").write_text("before: 1\n")
    capsys.readouterr()
    node = at_place(read(TEXTS[name]), at)
    try:
        (folder / name).write_text(yaml.safe_dump(put(read(TEXTS[name]), at, {**node, KEY: VALUE}), sort_keys=False))
        make_multidataset_config(str(folder / "multi.yaml"))
    except UserError as error:
        assert KEY in str(error)
        assert re.search(rf"{name}:\d+:", str(error))
    else:
        run = yaml.safe_load((folder / "OUT.yaml").read_text())
        assert holds(run, KEY) or noted(capsys.readouterr().err, name, (*at, KEY))
    finally:
        (folder / name).write_text(TEXTS[name])


# Keys that mean something in another config, or that the base config alone sets.
MODULE = ("model", "init_args")
MODEL = (*MODULE, "model", "init_args")
STAYS = [
    (("seed",), 3),
    (("rslp_project",), "mine"),
    (("batch_size",), 3),
    (("trainer", "max_epochs"), 77),
    (("model", "class_path"), "my.Module"),
    ((*MODULE, "lr"), 5.0),
    ((*MODULE, "plateau"), True),
    ((*MODULE, "scheduler"), {"class_path": "a.B"}),
    ((*MODULE, "restore_config"), {"restore_path": "/x"}),
    ((*MODULE, "model", "class_path"), "my.Model"),
    ((*MODEL, "trunk"), {"class_path": "a.B"}),
    ((*MODEL, "encoder"), [{"class_path": "a.B"}]),
]


def with_value(node, at, value):
    node = copy.deepcopy(node)
    below = node
    for key in at[:-1]:
        below = below[key] if isinstance(below, list) else below.setdefault(key, {})
    below[at[-1]] = value
    return node


@pytest.mark.parametrize(("at", "value"), STAYS, ids=lambda value: ".".join(value) if isinstance(value, tuple) else "")
@pytest.mark.parametrize("where", ["fields.yaml", "fields_more.yaml", "local_overrides", "overrides"])
def test_what_the_base_config_sets_is_told_wherever_a_dataset_says_it(folder, capsys, where, at, value):
    name, within = where, at
    if where == "local_overrides":
        name, within = "multi.yaml", ("local_overrides", *at)
    elif where == "overrides":
        name, within = "multi.yaml", ("dataset_cfgs", 1, "overrides", *at)
    try:
        (folder / name).write_text(yaml.safe_dump(with_value(read(TEXTS[name]), within, value), sort_keys=False))
        capsys.readouterr()
        make_multidataset_config(str(folder / "multi.yaml"))
    finally:
        (folder / name).write_text(TEXTS[name])
    assert noted(capsys.readouterr().err, name, within)


def test_what_stays_behind_is_one_line_a_file_and_surprises_have_their_own(tmp_path, capsys):
    crops = replaced(CROPS, "    num_workers: 2\n", "") + (
        "  callbacks:\n"
        "    - class_path: lightning.pytorch.callbacks.ModelCheckpoint\n"
        "      init_args:\n"
        "        monitor: val_accuracy\n"
        "    - class_path: lightning.pytorch.callbacks.EarlyStopping\n"
        "      init_args: {monitor: val_loss}\n"
        "    - class_path: rslearn.train.callbacks.freeze_unfreeze.FreezeUnfreeze\n"
        "      init_args: {unfreeze_at_epoch: 3}\n"
        "    - class_path: lightning.pytorch.callbacks.LearningRateMonitor\n"
    )
    composed(tmp_path, crops=crops)
    encoder = line(crops, "encoder:")
    callbacks = "trainer.callbacks"
    assert capsys.readouterr().err.replace(f"{tmp_path}/", "").splitlines() == [
        f"note: crops.yaml:{encoder}: model.init_args.model.init_args.encoder, model.init_args.lr "
        f"(line {line(crops, 'lr: 5')}), trainer (line {line(crops, 'trainer:')}) stay behind: "
        "the base config sets them for all datasets",
        f"note: crops.yaml:{line(crops, 'val_accuracy')}: {callbacks}.0.init_args.monitor: 'val_accuracy' chooses no "
        "checkpoint: best-<dataset>.ckpt goes by the primary metric of its tasks",
        f"note: crops.yaml:{line(crops, 'val_loss')}: {callbacks}.1.init_args.monitor: 'val_loss' is not watched: "
        "the callbacks of the base config act for all datasets",
        f"note: crops.yaml:{line(crops, 'FreezeUnfreeze')}: {callbacks}.2: freezes nothing: the callbacks of the base "
        "config say what is frozen, for all datasets",
    ]


def test_what_the_base_config_says_too_needs_no_note(tmp_path, capsys):
    encoder = BASE[BASE.index("        encoder:") : BASE.index("        decoders:")]
    own = CROPS[CROPS.index("        encoder:") : CROPS.index("        decoders:")]
    crops = replaced(CROPS, own, encoder)
    crops = replaced(replaced(crops, "    lr: 5\n", ""), "    num_workers: 2\n", "")
    crops = replaced(
        crops,
        "model:\n  init_args:\n    model:",
        "model:\n  class_path: rslp.train.JointModule\n  init_args:\n    model:",
    )
    composed(tmp_path, crops=crops[: crops.index("trainer:")])
    assert capsys.readouterr().err == ""


LAYER_DECAY = "rslearn.models.olmoearth_pretrain.optimizer.LayerDecayAdamW"


def test_a_learning_rate_survives_another_optimizer(tmp_path, capsys):
    multi = MULTI + (
        "global_overrides:\n  model:\n    init_args:\n      optimizer:\n"
        f"        class_path: {LAYER_DECAY}\n        init_args: {{num_layers: 4}}\n"
    )
    base = replaced(BASE, "        lr: 1e-4", "        lr: 1e-4\n        fused: true")
    base = replaced(base, "rslearn.train.optimizer.AdamW", "my.pkg.Optimizer")
    crops = CROPS[: CROPS.index("trainer:")]
    run = composed(tmp_path, base=base, multi=multi, crops=crops)
    optimizer = run["model"]["init_args"]["optimizer"]
    assert optimizer == {"class_path": LAYER_DECAY, "init_args": {"lr": 0.0001, "num_layers": 4}}
    note = (
        f"multi.yaml:{line(multi, LAYER_DECAY)}: global_overrides.model.init_args.optimizer.class_path: {LAYER_DECAY} "
        "takes the place of my.pkg.Optimizer; dropped, since it does not take them: fused; these stay: lr"
    )
    assert note in capsys.readouterr().err
    provenance = json.loads((tmp_path / "OUT.provenance.json").read_text())
    key = "model.init_args.optimizer.init_args"
    (entry,) = provenance[f"{key}.lr"]
    where = {"file": "base.yaml", "line": line(base, "lr: 1e-4"), "key": [*key.split("."), "lr"]}
    assert entry == {**where, "value": 1e-4, "won": True}
    assert not provenance[f"{key}.fused"][0]["won"]
    words = ["helios", "make_multidataset_config", "--cfg", str(tmp_path / "multi.yaml"), "--explain"]
    assert main([*words, f"{key}.lr"]) == 0
    assert f"set by base.yaml:{line(base, 'lr: 1e-4')}  0.0001" in capsys.readouterr().out
    assert main([*words, f"{key}.fused"]) == 0
    assert "fell away" in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--keep_class_paths", "true"]])
def test_a_class_that_is_not_known_keeps_all_arguments(tmp_path, capsys, options):
    multi = MULTI + "global_overrides:\n  model:\n    class_path: my.pkg.Module\n"
    run = composed(tmp_path, *options, multi=multi)
    assert run["model"]["class_path"] == "my.pkg.Module"
    assert list(run["model"]["init_args"]) == ["model", "optimizer", "task"]
    note = (
        "multi.yaml:12: global_overrides.model.class_path: my.pkg.Module takes the place of rslp.train.JointModule; "
        "which arguments it takes is not known here, so all stay: model, optimizer, task"
    )
    assert note in capsys.readouterr().err


def test_class_paths_of_another_version_keep_all_arguments(tmp_path):
    multi = MULTI + f"global_overrides: {{model: {{init_args: {{optimizer: {{class_path: {LAYER_DECAY}}}}}}}}}\n"
    base = replaced(BASE, "        lr: 1e-4", "        lr: 1e-4\n        fused: true")
    base = replaced(base, "rslearn.train.optimizer.AdamW", "my.pkg.Optimizer")
    run = composed(tmp_path, "--keep_class_paths", "true", base=base, multi=multi)
    assert run["model"]["init_args"]["optimizer"]["init_args"] == {"lr": 0.0001, "fused": True}


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        (
            "{model: {class_path: rslp.train.JointModel}}",
            "multi.yaml:10: global_overrides.model.class_path: rslp.train.JointModel does not take model, "
            "optimizer, task, which stage 1 needs here",
        ),
        (
            "{data: {class_path: rslearn.train.data_module.RslearnDataModule}}",
            "multi.yaml:10: global_overrides.data.class_path: rslearn.train.data_module.RslearnDataModule does not "
            "take data_modules, which stage 1 needs here",
        ),
        (
            "{data: {init_args: null}}",
            "multi.yaml:10: global_overrides.data.init_args: must be a mapping; null would drop",
        ),
        (
            "{data: {init_args: {data_modules: {crops: {class_path: a.B}}}}}",
            "multi.yaml:10: global_overrides.data.init_args.data_modules.crops.class_path: an override can't make a.B "
            "of a dataset's RslearnDataModule",
        ),
        (
            "{model: {init_args: {optimizer: {init_args: 3}}}}",
            "multi.yaml:10: global_overrides.model.init_args.optimizer.init_args: must be a mapping; 3 would drop",
        ),
    ],
)
def test_an_override_that_takes_away_what_is_needed_is_the_one_to_blame(tmp_path, capsys, override, wanted):
    path = write(tmp_path, multi=MULTI + f"global_overrides: {override}\n")
    assert main(["helios", "make_multidataset_config", "--cfg", str(path)]) == 2
    said = capsys.readouterr().err
    assert wanted in said
    assert "base.yaml" not in said


LOCAL = [
    ("{data: null}", "data", "must be a mapping to lay over the one below; got null"),
    ("{data: {init_args: }}", "data.init_args", "null would drop the arguments below it: path, inputs"),
    ("{data: {class_path: a.B}}", "data.class_path", "an override can't make a.B of a dataset's RslearnDataModule"),
    ("{data: {init_args: {task: }}}", "data.init_args.task", "must be a mapping to lay over the one below; got null"),
    (
        "{data: {init_args: {task: {class_path: a.B}}}}",
        "data.init_args.task.class_path",
        "a.B",
    ),
    (
        "{data: {init_args: {task: {init_args: {tasks: }}}}}",
        "data.init_args.task.init_args.tasks",
        "must be a mapping to lay over the one below; got null",
    ),
    (
        "{model: {init_args: {model: {init_args: {decoders: }}}}}",
        "model.init_args.model.init_args.decoders",
        "must be a mapping to lay over the one below; got null",
    ),
    (
        "{model: {init_args: {model: {init_args: {loss_weights: 3}}}}}",
        "model.init_args.model.init_args.loss_weights",
        "must be a mapping to lay over the one below; got 3",
    ),
    (
        "{model: {init_args: {model: {init_args: {decoder: {crops: []}}}}}}",
        "model.init_args.model.init_args.decoder",
        "unknown key; did you mean decoders?",
    ),
    ("{date: {init_args: {batch_size: 2}}}", "date", "unknown key; did you mean data?"),
]


@pytest.mark.parametrize(("override", "at", "wanted"), LOCAL, ids=[at for _, at, _ in LOCAL])
@pytest.mark.parametrize("where", ["file", "local_overrides", "overrides"])
def test_an_override_of_a_dataset_is_not_dropped(tmp_path, capsys, where, override, at, wanted):
    place = at
    if where == "file":
        file, changed = "crops_more.yaml", replaced(MULTI, "  - crops.yaml\n", "  - [crops.yaml, crops_more.yaml]\n")
    elif where == "local_overrides":
        file, changed, place = "multi.yaml", MULTI + f"local_overrides: {override}\n", f"local_overrides.{at}"
    else:
        entry = f"  - {{name: crops, cfgs: crops.yaml, overrides: {override}}}\n"
        file, changed, place = (
            "multi.yaml",
            replaced(MULTI, "  - crops.yaml\n", entry),
            f"dataset_cfgs.0.overrides.{at}",
        )
    path = write(tmp_path, multi=changed, crops_more=f"{override}\n")
    assert main(["helios", "make_multidataset_config", "--cfg", str(path)]) == 2
    said = [row for row in capsys.readouterr().err.splitlines() if f": {place}: " in row]
    assert len(said) == 1, said
    assert file in said[0]
    assert wanted in said[0]


def test_flat_numbers_without_effect_are_told(tmp_path, capsys):
    multi = MULTI + "max_train_patches: 3\n"
    composed(tmp_path, multi=multi)
    assert (
        "multi.yaml:10: max_train_patches: `num_patches` has no effect: rslearn 0.1.19 keeps it"
        in capsys.readouterr().err
    )


def test_a_constant_that_no_file_asks_for_is_told(tmp_path, capsys):
    base = replaced(BASE, "{PATCH_SIZE}", "4")
    composed(tmp_path, base=base, fields=FIELDS.replace("{PATCH_SIZE}", "4"))
    assert "multi.yaml:6: patch_size: no file has the placeholder {PATCH_SIZE}" in capsys.readouterr().err


def test_old_arguments_without_their_switch_are_told(tmp_path, capsys):
    base = replaced(BASE, "    optimizer:", "    plateau_factor: 0.5\n    optimizer:")
    composed(tmp_path, base=base)
    what = "model.init_args.scheduler.init_args.factor: has no effect: no class_path names a scheduler"
    assert f"base.yaml:{line(base, 'plateau_factor')}: {what}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("      crop_size: 64", "      crop_size: 64\n      patch_size: 32", "data.init_args.train_config.patch_size"),
        ("      crop_size: 64", "      load_all_crops: true\n      load_all_patches: false", "load_all_patches"),
    ],
)
def test_one_argument_under_two_names_is_an_error(tmp_path, capsys, old, new, place):
    path = write(tmp_path, fields=replaced(FIELDS, old, new))
    assert main(["helios", "make_multidataset_config", "--cfg", str(path)]) == 2
    said = capsys.readouterr().err
    assert f"{place}: is the old name of" in said
    assert "keep one" in said


def old_names():
    yield from ((f"{'.'.join(move.parent)}.{move.old}", move.parent, move.old) for move in MOVED_ARGUMENTS)


@pytest.mark.parametrize("name", [name for _, _, name in old_names()])
def test_names_that_were_right_once_stay_where_class_paths_are_kept(tmp_path, name):
    places = [at for _, at, old in old_names() if old == name]
    multi = yaml.safe_load(MULTI)
    for at in places:
        at = tuple("crops" if key == "*" else key for key in at)
        if at[:2] == ("data", "init_args") and at[2:] and at[2] != "data_modules":
            at = (*at[:2], "data_modules", "crops", "init_args", at[2])
        multi = with_value(multi, ("global_overrides", *at, name), 7)
    run = composed(tmp_path, "--keep_class_paths", "true", multi=yaml.safe_dump(multi))
    assert holds(run, name)


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, names in ARGUMENTS.items() for name in names])
def test_old_arguments_of_a_class_stay_where_class_paths_are_kept(tmp_path, path, name):
    callback = [{"class_path": path, "init_args": {name: VALUE}}]
    multi = yaml.safe_dump({**yaml.safe_load(MULTI), "global_overrides": {"trainer": {"callbacks+": callback}}})
    assert holds(composed(tmp_path, "--keep_class_paths", "true", multi=multi), name)


TREES = CROPS.replace("crops", "trees")
PAIR = replaced(MULTI, "  - crops.yaml\n", "  - crops.yaml\n  - trees.yaml\n")
GROUP = "merge_options: {merge_heads: true, merge_task_labels: true, same_label_groups: [[crops, trees]]}\n"
ALL_ONE = "merge_options: {merge_heads: true}\n"
APART = "merge_options: {merge_heads: true, merge_task_labels: true}\n"


@pytest.mark.parametrize("option", [GROUP, ALL_ONE])
def test_one_output_may_not_mean_two_classes(tmp_path, capsys, option):
    multi = replaced(PAIR, "  - - fields.yaml\n    - fields_more.yaml\n", "") + option
    trees = replaced(TREES, '["a", "b", "c"]', '["b", "a", "c"]')
    assert main(["helios", "make_multidataset_config", "--cfg", str(write(tmp_path, multi=multi, trees=trees))]) == 2
    said = capsys.readouterr().err
    assert (
        f"trees.yaml:{line(trees, 'classes: [')}: data.init_args.task.init_args.tasks.trees.init_args.classes" in said
    )
    assert "shares its outputs with 'crops', which has the same classes in another order (a, b, c)" in said


def test_labels_kept_apart_may_come_in_any_order(tmp_path, capsys):
    trees = replaced(TREES, '["a", "b", "c"]', '["b", "a", "c"]')
    composed(tmp_path, multi=PAIR + APART, trees=trees)
    assert "shares its outputs" not in capsys.readouterr().err


def test_other_names_for_the_same_outputs_are_told(tmp_path, capsys):
    trees = replaced(TREES, '["a", "b", "c"]', '["a", "b", "oak"]')
    composed(tmp_path, multi=PAIR + GROUP, trees=trees)
    assert "shares its outputs with 'crops', whose classes have other names (a, b, c)" in capsys.readouterr().err


def test_decoders_that_share_by_hand_are_compared_too(tmp_path, capsys):
    share = "{model: {init_args: {model: {init_args: {decoder_to_target: {crops: [crops, trees]}}}}}}"
    trees = replaced(TREES, '["a", "b", "c"]', '["b", "a", "c"]')
    path = write(tmp_path, multi=PAIR + f"global_overrides: {share}\n", trees=trees)
    assert main(["helios", "make_multidataset_config", "--cfg", str(path)]) == 2
    assert "the same classes in another order" in capsys.readouterr().err


def test_a_group_member_without_a_dataset_is_told(tmp_path, capsys):
    multi = MULTI + "merge_options: {merge_heads: true, merge_task_labels: true, same_label_groups: [[crops, crop]]}\n"
    composed(tmp_path, multi=multi)
    note = "multi.yaml:10: merge_options.same_label_groups.0: no dataset has the task 'crop'; did you mean crops?"
    assert note in capsys.readouterr().err


def test_a_sharing_by_hand_that_merging_replaces_is_told(tmp_path, capsys):
    share = "{model: {init_args: {model: {init_args: {decoder_to_target: {crops: [crops]}}}}}}"
    composed(tmp_path, multi=MULTI + f"global_overrides: {share}\n" + APART)
    assert "decoder_to_target: is replaced by what merge_options.merge_heads makes" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["", APART])
def test_a_task_needs_a_head_of_its_kind(tmp_path, capsys, option):
    task = "{property_name: k, classes: [x, y]}"
    two = replaced(TWO, task, "{property_name: k}")
    two = replaced(
        two, "rslearn.train.tasks.classification.ClassificationTask", "rslearn.train.tasks.regression.RegressionTask"
    )
    multi = replaced(MULTI, "  - crops.yaml\n", "  - crops.yaml\n  - {name: pair, cfgs: two.yaml}\n") + option
    assert main(["helios", "make_multidataset_config", "--cfg", str(write(tmp_path, multi=multi, two=two))]) == 2
    said = capsys.readouterr().err
    assert (
        "tasks.kind.class_path: the decoder of 'kind' ends in ClassificationHead, which is for a ClassificationTask"
        in said
    )


def test_a_class_may_stand_once(tmp_path, capsys):
    path = write(tmp_path, crops=replaced(CROPS, '["a", "b", "c"]', '["a", "b", "a"]'))
    assert main(["helios", "make_multidataset_config", "--cfg", str(path)]) == 2
    assert "tasks.crops.init_args.classes: the class 'a' stands 2 times; keep one" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["checkpoint_path", "CHECKPOINT_PATH", "HELIOS_CHECKPOINT_PATH"])
def test_one_checkpoint_is_enough(tmp_path, capsys, name):
    path = write(tmp_path, multi=MULTI + f"substitutions: {{{name}: /other}}\n")
    assert main(["helios", "make_multidataset_config", "--cfg", str(path)]) == 2
    assert f"multi.yaml:10: substitutions.{name}: fills" in capsys.readouterr().err


def test_the_checkpoint_by_its_later_name(tmp_path, capsys):
    path = write(tmp_path, multi=MULTI.replace("helios_checkpoint_path", "olmoearth_checkpoint_path"))
    assert main(["olmoearth_pretrain", "make_multidataset_config", "--cfg", str(path)]) == 0
    capsys.readouterr()
    path = write(tmp_path, multi=MULTI + "olmoearth_checkpoint_path: /other\n")
    assert main(["helios", "make_multidataset_config", "--cfg", str(path)]) == 2
    said = capsys.readouterr().err
    assert "multi.yaml:10: olmoearth_checkpoint_path: fills {" in said
    assert said.count("keep one") == 1
