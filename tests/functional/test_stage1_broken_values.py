"""Whatever stands in place of a value, stage 1 answers with a run config or with a user's error, never with a crash."""

import copy

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rslp.cli.make_multidataset_config import make_multidataset_config
from rslp.errors import UserError
from tests.config.samples import FILES, MULTI, replaced, write

MERGED = replaced(
    MULTI, "  - crops.yaml\n", "  - crops.yaml\n  - {name: pair, cfgs: [two.yaml], overrides: {data: {}}}\n"
) + (
    "merge_options: {merge_heads: true, merge_task_labels: true, same_label_groups: [[crops]]}\n"
    "global_overrides: {trainer: {max_epochs: 3, callbacks+: []}}\n"
    "local_overrides: {data: {init_args: {batch_size: 3}}}\n"
)
LATER = MERGED.replace("patch_size: 4", "substitutions:\n  patch_size: 4").replace("encoder_e", "  encoder_e")
LATER = LATER.replace("helios_c", "  helios_c")
# A plain task, and decoders that are shared by hand.
PLAIN = """\
model: {init_args: {model: {init_args: {decoder: [{class_path: a.P, init_args: {out_channels: 2}}, {class_path: aB}]}}}}
data:
  class_path: rslearn.train.data_module.RslearnDataModule
  init_args:
    path: /data/plain
    inputs: {targets: {class_path: rslearn.train.dataset.DataInput, init_args: {data_type: vector, is_target: true}}}
    task: {class_path: rslearn.train.tasks.classification.ClassificationTask, init_args: {classes: [x, y]}}
    val_config: {class_path: rslearn.train.dataset.SplitConfig, init_args: {transforms: [{class_path: a.C}]}}
"""
SHARED = replaced(MULTI, "  - crops.yaml\n", "  - crops.yaml\n  - {name: plain, cfgs: plain.yaml}\n") + (
    "global_overrides: {model: {init_args: {model: {init_args: {decoder_to_target: {crops: [crops]},\n"
    "  task_label_offsets: {crops: {offset: 0}}}}}}}\n"
)
MAKERS = {"multi.yaml": MERGED, "later.yaml": LATER, "shared.yaml": SHARED}
TEXTS = {**FILES, "plain.yaml": PLAIN, **MAKERS}
WRONG = [None, 3, -1.5, True, "x", "{PATCH_SIZE}", "{NO}", [], {}, [1], [[]], {"a": 1}, {"a+": 1}, {"class_path": 3}]


def load(text: str):
    return yaml.safe_load(text.replace("{PATCH_SIZE}", "4").replace("{ENCODER_EMBEDDING_SIZE}", "16"))


def paths(node, at=()):
    yield at
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from paths(value, (*at, key))


PLACES = [(name, at) for name, text in TEXTS.items() for at in paths(load(text))]


def put(node, at, value):
    if not at:
        return value
    changed = copy.copy(node)
    changed[at[0]] = put(node[at[0]], at[1:], value)
    return changed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    write(folder, multi=MERGED, later=LATER, shared=SHARED, plain=PLAIN)
    for maker in MAKERS:
        make_multidataset_config(str(folder / maker))
    return folder


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.sampled_from(PLACES), value=st.sampled_from(WRONG), keep=st.booleans(), maker=st.sampled_from([*MAKERS])
)
def test_no_value_crashes_stage_1(folder, place, value, keep, maker):
    name, at = place
    multi = name if name in MAKERS else "shared.yaml" if name == "plain.yaml" else maker
    output = folder / "OUT.yaml"
    output.write_text("before: 1\n")
    (folder / name).write_text(yaml.safe_dump(put(load(TEXTS[name]), at, value)))
    try:
        make_multidataset_config(str(folder / multi), keep_class_paths=keep)
    except UserError as error:
        assert str(error)
        assert output.read_text() == "before: 1\n"
    finally:
        (folder / name).write_text(TEXTS[name])
