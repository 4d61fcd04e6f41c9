"""Stage 1 and a user's mistakes: each one clean message with its place, exit code 2, and nothing touched on disk."""

# ruff: noqa: E501 - a table with one mistake a line reads better than a wrapped one
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from rslp.cli.main import main
from tests.config.samples import BASE, CHECKPOINT, CROPS, FIELDS, MULTI, line, replaced, write

OLD_OUTPUT = "# what an earlier run left\nkeep: me\n"
SCRIPT = Path(__file__).parents[2] / "make_multidataset_config.py"


@dataclass(frozen=True)
class Mistake:
    """Changed files, and what the message must hold."""

    name: str
    files: dict[str, str]
    wanted: tuple[str, ...]
    prepare: Callable[[Path], object] = str


def multi(old: str, new: str) -> dict[str, str]:
    return {"multi": replaced(MULTI, old, new)}


def plus(text: str) -> dict[str, str]:
    return {"multi": MULTI + text}


def crops(old: str, new: str) -> dict[str, str]:
    return {"crops": replaced(CROPS, old, new)}


def base(old: str, new: str) -> dict[str, str]:
    return {"base": replaced(BASE, old, new)}


def fields(old: str, new: str) -> dict[str, str]:
    return {"fields": replaced(FIELDS, old, new)}


def binary(name: str, raw: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(raw)


ENTRY = "  - crops.yaml\n"
MANY = "".join(f"  - {{name: crops_{number}, cfgs: crops.yaml}}\n" for number in range(40))
HEADS = "merge_options: {merge_heads: true, merge_task_labels: true%s}\n"
TREES = CROPS.replace("crops", "trees")
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)

MISTAKES = [
    # The multi-dataset config itself.
    Mistake("misspelt key", multi("patch_size", "pach_size"), ("multi.yaml:6: pach_size", "did you mean patch_size?")),
    Mistake("unknown key", plus("whatever: 3\n"), ("multi.yaml:10: whatever: unknown key", "allowed: base_cfg")),
    Mistake("no datasets", multi("dataset_cfgs:\n  - crops.yaml\n  - - fields.yaml\n    - fields_more.yaml\n", ""), ("dataset_cfgs: is missing",)),
    Mistake("empty datasets", multi("dataset_cfgs:\n  - crops.yaml\n  - - fields.yaml\n    - fields_more.yaml\n", "dataset_cfgs: []\n"), ("multi.yaml:2: dataset_cfgs: must be a list of at least one item; got []",)),
    Mistake("datasets as text", multi("dataset_cfgs:\n  - crops.yaml\n  - - fields.yaml\n    - fields_more.yaml\n", "dataset_cfgs: crops.yaml\n"), ("dataset_cfgs: must be a list", "'crops.yaml'")),
    Mistake("both spellings", plus("task_cfgs: [crops.yaml]\n"), ("task_cfgs", "old spelling of dataset_cfgs")),
    Mistake("no output", multi("output_path: OUT.yaml\n", ""), ("output_path: is missing", "output_path: OUT_multi.yaml")),
    Mistake("output is no yaml", multi("OUT.yaml", "OUT"), ("multi.yaml:9: output_path: must end in .yaml",)),
    Mistake("output is remote", multi("OUT.yaml", "gs://bucket/OUT.yaml"), ("multi.yaml:9: output_path: must be a local path",)),
    Mistake("output with an unset variable", multi("OUT.yaml", "${NOT_SET_ANYWHERE}/OUT.yaml"), ("output_path: must be a local path, with no variable that is not set",)),
    Mistake("output is a folder", multi("OUT.yaml", "sub.yaml"), ("output_path", "is a folder"), lambda folder: (folder / "sub.yaml").mkdir()),
    Mistake("output is the base", multi("OUT.yaml", "base.yaml"), ("multi.yaml:9: output_path: would overwrite", "base.yaml")),
    Mistake("output is a dataset", multi("OUT.yaml", "./fields_more.yaml"), ("would overwrite", "fields_more.yaml")),
    Mistake("output is the config", multi("OUT.yaml", "multi.yaml"), ("would overwrite", "multi.yaml")),
    Mistake("output with too long a name", multi("OUT.yaml", f"{'x' * 300}.yaml"), ("multi.yaml:9: output_path: a file's name may have 220 bytes; this one has 305: xxx",)),
    Mistake("output derived from too many names", {"multi": replaced(replaced(MULTI, "OUT.yaml", "null"), ENTRY, MANY)}, ("output_path: a file's name may have 220 bytes",)),
    Mistake("output is a list", multi("OUT.yaml", "[a.yaml]"), ("output_path: must be a path",)),
    Mistake("patch size quoted", multi("patch_size: 4", 'patch_size: "4"'), ("multi.yaml:6: patch_size: must be a whole number above 0", "write 4 without quotes")),
    Mistake("patch size zero", multi("patch_size: 4", "patch_size: 0"), ("patch_size: must be a whole number above 0; got 0",)),
    Mistake("patch size true", multi("patch_size: 4", "patch_size: true"), ("patch_size: must be a whole number",)),
    Mistake("embedding size a float", multi("encoder_embedding_size: 16", "encoder_embedding_size: 16.5"), ("encoder_embedding_size: must be a whole number",)),
    Mistake("batch size negative", plus("batch_size: -1\n"), ("multi.yaml:10: batch_size: must be a whole number above 0; got -1",)),
    Mistake("workers negative", plus("num_workers: -1\n"), ("num_workers: must be a whole number from 0",)),
    Mistake("checkpoint a list", multi(f'"{CHECKPOINT}"', "[a, b]"), ("helios_checkpoint_path: must be a text",)),
    Mistake("constant twice", plus("substitutions: {patch_size: 8}\n"), ("patch_size: is given here and under substitutions too",)),
    Mistake("substitutions a list", plus("substitutions: [1]\n"), ("substitutions: must be a mapping; got [1]",)),
    Mistake("substitution of the wrong kind", {"multi": replaced(replaced(MULTI, "patch_size: 4\n", ""), "output_path", "substitutions: {patch_size: big}\noutput_path")}, ("substitutions.patch_size: must be a whole number",)),
    Mistake("constants of one placeholder", plus("substitutions: {my_size: 3, MY_SIZE: 4}\n"), ("multi.yaml:10: substitutions.MY_SIZE: fills {MY_SIZE} like my_size does; keep one",)),
    Mistake("overrides a list", plus("global_overrides: [1]\n"), ("global_overrides: must be a mapping",)),
    Mistake("misspelt option", plus("merge_options: {merge_head: true}\n"), ("merge_options.merge_head: unknown key; did you mean merge_heads?",)),
    Mistake("option no flag", plus("merge_options: {merge_heads: 3}\n"), ("merge_options.merge_heads: must be true or false",)),
    Mistake("labels without heads", plus("merge_options: {merge_task_labels: true}\n"), ("merge_task_labels: has no effect without merge_heads",)),
    Mistake("empty file", {"multi": ""}, ("multi.yaml: is no multi-dataset config",)),
    Mistake("a list", {"multi": "- a\n"}, ("is no multi-dataset config",)),
    Mistake("a dataset config", {"multi": CROPS}, ("multi.yaml: is a dataset config, not a multi-dataset config", "dataset_cfgs")),
    Mistake("a base config", {"multi": BASE}, ("multi.yaml: is a base config, not a multi-dataset config", "base_cfg")),
    # Entries.
    Mistake("entry a number", multi(ENTRY, "  - 3\n"), ("multi.yaml:3: dataset_cfgs.0: must be a path",)),
    Mistake("entry an empty list", multi(ENTRY, "  - []\n"), ("dataset_cfgs.0: must be a path or a list of paths",)),
    Mistake("misspelt entry key", multi(ENTRY, "  - {name: x, cfg: crops.yaml}\n"), ("dataset_cfgs.0.cfg: unknown key; did you mean cfgs?",)),
    Mistake("bad dataset name", multi(ENTRY, "  - {name: a.b, cfgs: crops.yaml}\n"), ("dataset_cfgs.0.name: must be a name",)),
    Mistake("missing dataset file", multi(ENTRY, "  - corps.yaml\n"), ("multi.yaml:3: dataset_cfgs.0: 'corps.yaml' does not exist", "looked in")),
    Mistake("missing base", multi("base_cfg: base.yaml", "base_cfg: /nowhere/base.yaml"), ("multi.yaml:1: base_cfg: '/nowhere/base.yaml' does not exist",)),
    Mistake("the base as a dataset", multi(ENTRY, "  - base.yaml\n"), ("base.yaml: is a base config, but dataset_cfgs names it",)),
    Mistake("a dataset as the base", multi("base_cfg: base.yaml", "base_cfg: crops.yaml"), ("crops.yaml: is a dataset config, but base_cfg names it",)),
    Mistake("itself as a dataset", multi(ENTRY, "  - multi.yaml\n"), ("multi.yaml: is a multi-dataset config, but dataset_cfgs names it",)),
    Mistake("the same dataset twice", multi(ENTRY, ENTRY + ENTRY), ("multi.yaml:4: dataset_cfgs.1: 'crops'", "a name of its own")),
    Mistake("a name that is a task elsewhere", multi(ENTRY, "  - {name: fields, cfgs: crops.yaml}\n"), ("'fields' is a task or name of an entry before it",)),
    Mistake("two tasks without a name", multi(ENTRY, "  - two.yaml\n"), ("two.yaml:1: has 2 tasks (height, kind), so the dataset needs a name",)),
    Mistake("rename of an absent task", multi(ENTRY, "  - {name: p, cfgs: two.yaml, tasks: {hight: h}}\n"), ("the entry renames the task 'hight', which is not here; did you mean height?",)),
    Mistake("rename of two tasks to one", multi(ENTRY, "  - {name: p, cfgs: two.yaml, tasks: {height: k, kind: k}}\n"), ("multi.yaml:3: dataset_cfgs.0.tasks: two tasks of this dataset would be called 'k': height, kind",)),
    Mistake("rename to a task that is there", multi(ENTRY, "  - {name: p, cfgs: two.yaml, tasks: {height: kind}}\n"), ("multi.yaml:3: dataset_cfgs.0.tasks: two tasks of this dataset would be called 'kind': height, kind",)),
    Mistake("two new names for one task", multi(ENTRY, "  - {name: p, cfgs: crops.yaml, tasks: {crops: q}}\n"), ("multi.yaml:3: dataset_cfgs.0: the task 'crops' goes by the dataset's name 'p', and tasks calls it 'q'; keep one",)),
    Mistake("a name longer than a file's", multi(ENTRY, f"  - {{name: {'x' * 101}, cfgs: crops.yaml}}\n"), ("dataset_cfgs.0.name: must be a name of at most 100 letters",)),
    Mistake("rename to a number", multi(ENTRY, "  - {name: p, cfgs: two.yaml, tasks: {height: 3}}\n"), ("dataset_cfgs.0.tasks: must be a mapping of task names",)),
    Mistake("unset variable", multi(ENTRY, "  - ${NOT_SET_ANYWHERE}/crops.yaml\n"), ("multi.yaml:3: dataset_cfgs.0:", "needs an environment variable that is not set")),
    # Files as such.
    Mistake("broken yaml", crops("layers: [", "layers: [[") , ("crops.yaml:", "is not valid YAML")),
    Mistake("tab indentation", crops("    batch_size: 4", "\tbatch_size: 4"), (f"crops.yaml:{line(CROPS, 'batch_size')}", "is not valid YAML")),
    Mistake("duplicate key", fields("    batch_size: 2\n", "    batch_size: 2\n    batch_size: 3\n"), (f"fields.yaml:{line(FIELDS, 'batch_size') + 1}: batch_size: stands twice",)),
    Mistake("not utf-8", {}, ("fields_more.yaml:2: is not UTF-8 text",), binary("fields_more.yaml", b"data:\n  caf\xe9: 1\n")),
    Mistake("huge", {}, ("fields_more.yaml: is larger than 4 MB",), binary("fields_more.yaml", b"#" * 5_000_000)),
    Mistake("alias bomb", {"fields_more": BOMB}, ("fields_more.yaml", "aliases expand to more than")),
    Mistake("self reference", {"fields_more": "data: &a\n  b: *a\n"}, ("fields_more.yaml:1: an alias refers to itself",)),
    Mistake("deep nesting", {"fields_more": "data: " + "[" * 5000 + "]" * 5000}, ("fields_more.yaml:1: is nested deeper",)),
    Mistake("deep block nesting", {"fields_more": "data:\n  " + "- " * 5000 + "x\n"}, ("fields_more.yaml:2: is nested deeper",)),
    Mistake("python tag", {"fields_more": "data: !!python/object/apply:os.system ['true']\n"}, ("fields_more.yaml:1: the YAML tag", "is not allowed")),
    Mistake("a folder as dataset", multi(ENTRY, "  - sub\n"), ("sub: is a folder; a YAML file is wanted",), lambda folder: (folder / "sub").mkdir()),
    Mistake("dataset is a list", {"fields_more": "- a\n"}, ("fields_more.yaml: is no config",)),
    # Placeholders.
    Mistake("constant left out", multi("encoder_embedding_size: 16\n", ""), (f"crops.yaml:{line(CROPS, 'EMBEDDING')}", "no constant fills the placeholder {ENCODER_EMBEDDING_SIZE}")),
    Mistake("unknown placeholder", base("{PATCH_SIZE}", "{PATCH_SISE}"), (f"base.yaml:{line(BASE, 'PATCH_SIZE')}", "{PATCH_SISE}; did you mean PATCH_SIZE?")),
    Mistake("quoted unknown placeholder", base('"{CHECKPOINT_PATH}"', '"{CHECKPOINT}"'), ("no constant fills the placeholder {CHECKPOINT}",)),
    Mistake("small letters", base("{PATCH_SIZE}", "{patch_size}"), ("left-over placeholder {patch_size}; write {PATCH_SIZE}",)),
    Mistake("quoted small letters", base('"{CHECKPOINT_PATH}"', '"{checkpoint_path}"'), ("left-over placeholder {checkpoint_path}",)),
    Mistake("other arithmetic", base("{PATCH_SIZE}", "{PATCH_SIZE*2}"), ("left-over placeholder {PATCH_SIZE*2}",)),
    Mistake("inexact division", base("{PATCH_SIZE}", "{10/PATCH_SIZE}"), ("{10/PATCH_SIZE}: 10 cannot be divided by patch_size = 4",)),
    Mistake("division by a text", base("{PATCH_SIZE}", "{256/CHECKPOINT_PATH}"), ("divides by checkpoint_path", "a whole number is wanted")),
    Mistake("placeholder in an override", plus("global_overrides: {trainer: {max_epochs: {EPOCHS}}}\n"), ("multi.yaml:10: global_overrides.trainer.max_epochs: no constant fills the placeholder {EPOCHS}",)),
    Mistake("placeholder in a constant", multi("'base'\"", "{PATCH_SIZE}\""), ("helios_checkpoint_path: must be a text",)),
    # Datasets.
    Mistake("no decoder", crops("          crops:\n            - class", "          corps:\n            - class"), ("'corps', which is no task here; did you mean crops?", "the task 'crops' has no decoder; did you mean corps?")),
    Mistake("decoder a mapping", {"crops": replaced(CROPS, CROPS[CROPS.index("            - class_path: rslearn.models") : CROPS.index("    lr: 5")], "            class_path: x\n")}, ("decoders.crops: must be a list of modules",)),
    Mistake("no model", {"crops": CROPS[CROPS.index("data:") :]}, ("crops.yaml", "decoders: is missing; each task needs a decoder")),
    Mistake("no data", {"crops": CROPS[: CROPS.index("data:")]}, ("crops.yaml", "data: is missing")),
    Mistake("no multi task", crops("rslearn.train.tasks.multi_task.MultiTask", "rslearn.train.tasks.classification.ClassificationTask"), (f"crops.yaml:{line(CROPS, 'multi_task')}: data.init_args.task.class_path: must be rslearn.train.tasks.multi_task.MultiTask",)),
    Mistake("too few outputs", crops("out_channels: 3", "out_channels: 2"), (f"crops.yaml:{line(CROPS, 'out_channels')}", "2 outputs, but the task 'crops' has 3 classes")),
    Mistake("plus with a text", {"fields_more": "data:\n  init_args:\n    train_config:\n      groups+: one\n"}, ("fields_more.yaml:4: data.init_args.train_config.groups+: a key with + appends a list; got 'one'",)),
    Mistake("plus over a text", {"fields_more": "data:\n  init_args:\n    path+: [one]\n"}, ("fields_more.yaml:3: data.init_args.path+: + appends to a list, but below it stands '/data/fields'",)),
    Mistake("a relative path that is nowhere", crops("/data/crops", "data/crops"), (f"crops.yaml:{line(CROPS, '/data/crops')}: data.init_args.path: 'data/crops' does not exist; looked in",)),
    Mistake("misspelt data argument", crops("    batch_size: 4", "    bach_size: 4"), (f"crops.yaml:{line(CROPS, 'batch_size')}: data.init_args.bach_size: unknown key for RslearnDataModule; did you mean batch_size?",)),
    Mistake("misspelt split argument", fields("      crop_size: 64", "      crop_sise: 64"), ("fields.yaml", "train_config.crop_sise: unknown key for SplitConfig; did you mean crop_size?")),
    Mistake("misspelt input argument", crops("bands:", "band:"), ("crops.yaml", "inputs.s2.band: unknown key for DataInput; did you mean bands?")),
    Mistake("misspelt decoder argument", crops("out_channels: 3", "out_channel: 3"), ("crops.yaml", "unknown key for PoolingDecoder; did you mean out_channels?")),
    Mistake("misspelt transform argument", crops("image_selectors:", "image_selector:"), ("crops.yaml", "unknown key for Flip; did you mean image_selectors?")),
    Mistake("misspelt class", crops("rslearn.models.pooling_decoder.PoolingDecoder", "rslearn.models.pooling_decoder.PoolingDecodr"), ("crops.yaml", "did you mean rslearn.models.pooling_decoder.PoolingDecoder?")),
    Mistake("misspelt init_args", crops("              property_name", "              property_nam"), ("crops.yaml", "did you mean property_name?")),
    # Overrides.
    Mistake("misspelt trainer key", plus("global_overrides: {trainer: {max_epoch: 3}}\n"), ("multi.yaml:10: global_overrides.trainer.max_epoch: unknown key for Trainer; did you mean max_epochs?",)),
    Mistake("misspelt local trainer key", plus("local_overrides: {trainer: {max_epoch: 3}}\n"), ("multi.yaml:10: local_overrides.trainer.max_epoch: unknown key for Trainer; did you mean max_epochs?",)),
    Mistake("misspelt section", plus("global_overrides: {trianer: {max_epochs: 3}}\n"), ("global_overrides.trianer: unknown key; did you mean trainer?",)),
    Mistake("override of an absent dataset", plus("global_overrides: {data: {init_args: {data_modules: {crop: {init_args: {batch_size: 3}}}}}}\n"), ("no dataset is called 'crop'; did you mean crops?",)),
    Mistake("override of an absent task", plus("local_overrides: {model: {init_args: {model: {init_args: {decoders: {corps: []}}}}}}\n"), ("no dataset has the task 'corps'; did you mean crops?",)),
    Mistake("weight of an absent task", plus("global_overrides: {model: {init_args: {model: {init_args: {loss_weights: {field: 2}}}}}}\n"), ("loss_weights.field: nothing is called 'field'; did you mean fields?",)),
    Mistake("override of all datasets by nothing", plus("global_overrides: {data: {init_args: {data_modules: null}}}\n"), ("multi.yaml:10: global_overrides.data.init_args.data_modules: must be a mapping, since stage 1 puts the datasets into it; got null",)),
    Mistake("override of the data by a list", plus("global_overrides: {data: [1, 2]}\n"), ("multi.yaml:10: global_overrides.data: must be a mapping, since stage 1 puts the datasets into it; got [1, 2]",)),
    Mistake("override of all decoders by nothing", plus("global_overrides: {model: {init_args: {model: {init_args: {decoders: null}}}}}\n"), ("multi.yaml:10: global_overrides.model.init_args.model.init_args.decoders: must be a mapping",)),
    Mistake("override of one decoder by nothing", plus("global_overrides: {model: {init_args: {model: {init_args: {decoders: {crops: null}}}}}}\n"), ("multi.yaml:10: global_overrides.model.init_args.model.init_args.decoders.crops: must be a list of modules",)),
    Mistake("override of the tasks by a text", plus("global_overrides: {model: {init_args: {task: {init_args: {tasks: crops}}}}}\n"), ("multi.yaml:10: global_overrides.model.init_args.task.init_args.tasks: must be a mapping",)),
    Mistake("override of the trainer by nothing", plus("global_overrides: {trainer: null}\n"), ("multi.yaml:10: global_overrides.trainer: must be a mapping",)),
    Mistake("section that is no text", plus("global_overrides: {3: {a: 1}}\n"), ("multi.yaml:10: global_overrides.3: unknown key; allowed: data, model",)),
    Mistake("section that nothing knows", plus("global_overrides: {whatever: {a: 1}}\n"), ("multi.yaml:10: global_overrides.whatever: unknown key; allowed: data, model",)),
    Mistake("base without a data module", {"base": BASE[: BASE.index("data:")] + BASE[BASE.index("trainer:") :]}, ("base.yaml:1: data.class_path: is missing; the base config names the class, such as rslp.train.MultiDatasetDataModule",)),
    Mistake("base without a trainer", {"base": BASE[: BASE.index("trainer:")]}, ("base.yaml:1: trainer: is missing",)),
    Mistake("class path a number", crops("class_path: rslearn.train.tasks.classification.ClassificationHead", "class_path: 3"), (f"crops.yaml:{line(CROPS, 'ClassificationHead')}", "class_path: must be the dotted path of a class; got 3")),
    Mistake("decoder's module a text", {"crops": replaced(CROPS, "- class_path: rslearn.train.tasks.classification.ClassificationHead", "- ClassificationHead")}, (f"crops.yaml:{line(CROPS, 'ClassificationHead')}", "decoders.crops.1: must be a module with class_path and init_args; got 'ClassificationHead'")),
    Mistake("misspelt optimizer argument", base("lr: 1e-4", "lrr: 1e-4"), (f"base.yaml:{line(BASE, 'lr: 1e-4')}", "unknown key for AdamW")),
    Mistake("misspelt key beside class_path", base("      init_args:\n        lr", "      init_arg:\n        lr"), ("base.yaml", "did you mean init_args?")),
    # Shared heads.
    Mistake("overlapping groups", plus(HEADS % ", same_label_groups: [[crops, fields], [fields]]"), ("same_label_groups.1: the task 'fields' stands in two label groups",)),
    Mistake("group over two heads", plus(HEADS % ", same_label_groups: [[crops, fields]]"), ("tasks of different heads cannot share labels: ClassificationHead, SegmentationHead",)),
    Mistake("groups no lists", plus(HEADS % ", same_label_groups: [crops]"), ("same_label_groups: must be a list of lists",)),
    Mistake("group of unequal widths", {"multi": replaced(MULTI, ENTRY, ENTRY + "  - trees.yaml\n") + HEADS % ", same_label_groups: [[crops, trees]]", "trees": TREES.replace("out_channels: 3", "out_channels: 4")}, ("shared labels need equal numbers of outputs; got crops: 3, trees: 4",)),
    Mistake("heads of unequal widths", {"multi": replaced(MULTI, ENTRY, ENTRY + "  - trees.yaml\n") + "merge_options: {merge_heads: true}\n", "trees": TREES.replace("out_channels: 3", "out_channels: 4")}, ("set merge_task_labels: true",)),
    Mistake("decoders that differ", {"multi": replaced(MULTI, ENTRY, ENTRY + "  - trees.yaml\n") + HEADS % "", "trees": TREES.replace("in_channels: {ENCODER_EMBEDDING_SIZE}", "in_channels: 3")}, ("trees.yaml", "differs from the decoder of 'crops' in more than its outputs")),
    Mistake("info that contradicts", {"multi": MULTI + HEADS % "", "base": BASE + "all_dataset_info_path: info.yaml\n", "info": "crops: {num_outputs: 7, outputs_key: class}\n"}, ("crops.yaml", "has 3 outputs; all_dataset_info_path says 7")),
    Mistake("info a list", {"base": BASE + "all_dataset_info_path: info.yaml\n", "info": "- crops\n"}, ("info.yaml: is no table of datasets: a mapping is wanted", )),
    Mistake("missing info", {"base": BASE + "all_dataset_info_path: info.yaml\n"}, ("base.yaml", "all_dataset_info_path: 'info.yaml' does not exist")),
]  # fmt: skip


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_one_clean_message_and_leaves_the_disk_alone(tmp_path, capsys, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, **mistake.files)
    mistake.prepare(tmp_path)
    (tmp_path / "OUT.yaml").write_text(OLD_OUTPUT)
    before = files_of(tmp_path)
    code = main(["helios", "make_multidataset_config", "--cfg", "multi.yaml"])
    said = capsys.readouterr()
    assert code == 2, said.err
    assert "Traceback" not in said.err
    for fragment in mistake.wanted:
        assert fragment in said.err
    assert files_of(tmp_path) == before
    assert said.out == ""
    assert len(said.err) < 1500


def test_there_are_enough_of_them():
    assert len(MISTAKES) >= 60
    assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES)


def test_all_problems_of_all_files_come_at_once(tmp_path, capsys):
    path = write(
        tmp_path,
        multi=replaced(MULTI, "encoder_embedding_size: 16\n", ""),
        base=replaced(BASE, "{PATCH_SIZE}", "{PATCH_SISE}"),
        crops=replaced(CROPS, "/data/crops", "data/crops"),
    )
    assert main(["helios", "make_multidataset_config", "--cfg", str(path)]) == 2
    said = capsys.readouterr().err
    places = (
        f"base.yaml:{line(BASE, 'PATCH_SIZE')}:",
        f"base.yaml:{line(BASE, 'EMBEDDING')}:",
        f"crops.yaml:{line(CROPS, 'EMBEDDING')}:",
        f"crops.yaml:{line(CROPS, '/data/crops')}:",
        f"fields.yaml:{line(FIELDS, 'EMBEDDING')}:",
    )
    for place in places:
        assert place in said


def test_faults_of_unlike_kinds_come_at_once(tmp_path, capsys):
    text = replaced(MULTI, "  - crops.yaml\n", "  - crops.yaml\n  - crops.yaml\n").replace(
        "encoder_embedding_size: 16\n", ""
    )
    text = (
        replaced(text, "output_path: OUT.yaml", "output_path: crops.yaml")
        + "global_overrides: {trainer: {max_epoch: 3}}\n"
    )
    path = write(tmp_path, multi=text, crops=replaced(CROPS, "/data/crops", "nowhere"))
    assert main(["helios", "make_multidataset_config", "--cfg", str(path)]) == 2
    said = capsys.readouterr().err
    for wanted in (
        "would overwrite",
        "no constant fills the placeholder {ENCODER_EMBEDDING_SIZE}",
        "'nowhere' does not exist",
        "did you mean max_epochs?",
        "'crops' is a task or name of an entry before it too",
    ):
        assert said.count(wanted) >= 1, said
    assert said.count("would overwrite") == 1


def test_all_unreadable_files_are_named_at_once(tmp_path, capsys):
    path = write(tmp_path, multi=replaced(MULTI, "  - crops.yaml\n", "  - gone.yaml\n"), fields="a: [", base="b: }")
    assert main(["helios", "make_multidataset_config", "--cfg", str(path)]) == 2
    said = capsys.readouterr().err
    for name in ("gone.yaml", "fields.yaml:", "base.yaml:1"):
        assert name in said


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--cfg", "absent.yaml"], "absent.yaml: no such file"),
        ([], "cfg"),
        (["--cfgs", "multi.yaml"], "did you mean --cfg?"),
        (["--cfg", "multi.yaml", "--explain", "trainer.max_epoch"], "did you mean max_epochs?"),
        (["--cfg", "multi.yaml", "--diff", "absent.yaml"], "absent.yaml: no such file"),
        (["--cfg", "."], "is a folder"),
    ],
)
def test_mistakes_on_the_command_line_in_a_process_of_its_own(tmp_path, arguments, wanted):
    write(tmp_path)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert wanted in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "OUT.yaml").exists()


def test_an_output_folder_that_cannot_be_written_is_a_users_error(tmp_path, capsys):
    path = write(tmp_path, multi=replaced(MULTI, "OUT.yaml", "base.yaml/OUT.yaml"))
    assert main(["helios", "make_multidataset_config", "--cfg", str(path)]) == 2
    assert "output_path" in capsys.readouterr().err
