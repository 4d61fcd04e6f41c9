"""Whatever stands in place of a value, stage 1 answers with a run config or with a user's error, never with a crash."""

import copy

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rslp.errors import UserError
from rslp.helios.make_multidataset_config import make_multidataset_config
from tests.compose.samples import FILES, MULTI, replaced, write

MERGED = replaced(
    MULTI, "  - crops.yaml\n", "  - crops.yaml\n  - {name: pair, cfgs: [two.yaml], overrides: {data: {}}}\n"
) + (
    "merge_options: {merge_heads: true, merge_task_labels: true, same_label_groups: [[crops]]}\n"
    "global_overrides: {trainer: {max_epochs: 3, callbacks+: []}}\n"
    "local_overrides: {data: {init_args: {batch_size: 3}}}\n"
)
LATER = MERGED.replace("patch_size: 4", "substitutions:\n  patch_size: 4").replace("encoder_e", "  encoder_e")
LATER = LATER.replace("helios_c", "  helios_c")
TEXTS = {**FILES, "multi.yaml": MERGED, "later.yaml": LATER}
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
    write(folder, multi=MERGED, later=LATER)
    make_multidataset_config(str(folder / "multi.yaml"))
    make_multidataset_config(str(folder / "later.yaml"))
    return folder


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), value=st.sampled_from(WRONG), keep=st.booleans(), later=st.booleans())
def test_no_value_crashes_stage_1(folder, place, value, keep, later):
    name, at = place
    multi = "later.yaml" if name == "later.yaml" or (later and name != "multi.yaml") else "multi.yaml"
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
