import datetime
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rslp.errors import ConfigError
from rslp.io import Template, dump_yaml, parse_yaml, plain_scalar, read_yaml

TEXT = """\
# a comment
model:
  lr: 1e-4
  names: [a, b]
  deep:
    - first: 1
      second: 2
    - third: {x: [1, 2]}
list+:
  - one
8: eight
base: &base {p: 1, q: 2}
child:
  <<: *base
  q: 3
"""


def parsed(text: str):
    return parse_yaml(text, name="x.yaml", folder="/f")


def test_every_key_has_its_line():
    document = parsed(TEXT)
    facts = {
        ("model",): 2,
        ("model", "lr"): 3,
        ("model", "names", 1): 4,
        ("model", "deep", 0, "second"): 7,
        ("model", "deep", 1): 8,
        ("model", "deep", 1, "third", "x", 1): 8,
        ("list",): 9,
        ("list+",): 9,
        ("list", 0): 10,
        (8,): 11,
        ("child", "q"): 15,
        ("child", "p"): 12,
        ("absent",): None,
        ("model", "lr", "deeper"): None,
        ("model", "names", 2): None,
    }
    assert {path: document.line(path) for path in facts} == facts
    assert document.nearest_line(("model", "deep", 1, "absent")) == 8
    assert document.nearest_line(("absent",)) == 1


def test_values_are_those_of_yaml_but_for_floats():
    document = parsed(TEXT)
    assert document.data == {**yaml.safe_load(TEXT), "model": {**yaml.safe_load(TEXT)["model"], "lr": 0.0001}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5e1", 5.0),
        ("1.5", 1.5),
        ("10", 10),
        ("true", True),
        ("~", None),
        (".inf", math.inf),
        ("1e", "1e"),
        ("e5", "e5"),
        ("1.2.3e4", "1.2.3e4"),
        ("v1e4", "v1e4"),
        ("2024-05-06", datetime.date(2024, 5, 6)),
    ],
)
def test_types_of_unquoted_texts(text, value):
    assert plain_scalar(text) == value
    assert type(plain_scalar(text)) is type(value)
    assert parsed(f"a: {text}").data == {"a": value}


@pytest.mark.parametrize(
    ("text", "written", "plain"),
    [
        ("a: {PATCH_SIZE}", "{PATCH_SIZE}", True),
        ('a: "{PATCH_SIZE}"', "{PATCH_SIZE}", False),
        ("a: {CHECKPOINT_PATH}/step#1", "{CHECKPOINT_PATH}/step#1", True),
        ("a: x{256/PATCH_SIZE}y", "x{256/PATCH_SIZE}y", True),
        ("a: '{A}: {B}'", "{A}: {B}", False),
        ("a: {A} # {B}", "{A}", True),
    ],
)
def test_a_placeholder_is_a_template_wherever_it_stands(text, written, plain):
    value = parsed(text).data["a"]
    assert isinstance(value, Template)
    assert (value, value.plain) == (written, plain)


def test_placeholders_in_flow_collections_and_keys():
    data = parsed("a: [{A}, {8: 1, {B}: 2}]\nb: ${HOME}/x\nc: {d: 1}\n").data
    assert data == {"a": ["{A}", {8: 1, "{B}": 2}], "b": "${HOME}/x", "c": {"d": 1}}
    assert isinstance(data["a"][0], Template)
    assert not isinstance(data["b"], Template)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a: 1\nb: 2\na: 3\n", "x.yaml:3: a: stands twice"),
        ("a: {b: 1, b: 2}\n", "x.yaml:1: b: stands twice"),
        ("a: [1\nb: 2\n", "x.yaml:2: is not valid YAML"),
        ("a: !!python/name:os.system x\n", "x.yaml:1: the YAML tag"),
        ("a: !mine {b: 1}\n", "x.yaml:1: the YAML tag '!mine' is not allowed"),
        ("a: &a [*a]\n", "x.yaml:1: an alias refers to itself"),
        ("a: *nowhere\n", "x.yaml:1: is not valid YAML"),
        ("? [1, 2]\n: x\n", "x.yaml:1: a key must be a single value"),
        ("a: 1\n---\nb: 2\n", "x.yaml:2: is not valid YAML"),
        ("a: \x01\n", "x.yaml"),
        ("a: \ue000\n", "U+E000"),
        ("[" * 100_000, "x.yaml:1: is nested deeper than"),
        ("- " * 100_000, "x.yaml:1: is nested deeper than"),
        ("<<: 3\n", "x.yaml:1: << wants a mapping"),
        ("a: 2024-13-45\n", "x.yaml:1: '2024-13-45' is no valid timestamp"),
    ],
)
def test_unsound_files_are_refused_with_their_line(text, wanted):
    with pytest.raises(ConfigError) as caught:
        parsed(text)
    assert wanted in str(caught.value)


def test_all_duplicate_keys_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        parsed("a: 1\na: 2\nb:\n  c: 1\n  c: 2\n")
    assert len(caught.value.problems) == 2


def test_an_empty_file_holds_nothing(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("# nothing\n")
    assert read_yaml(path).data is None


def test_a_document_knows_its_name_folder_and_hash(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    document = read_yaml(path, name="shown.yaml")
    assert document.data == {"a": 1, "b": 2}
    assert (document.name, document.folder, len(document.sha256)) == ("shown.yaml", str(tmp_path), 64)


def test_an_unreadable_file_is_a_config_error(tmp_path):
    for path, wanted in (
        (tmp_path, "is a folder"),
        (tmp_path / "no", "no such file"),
        ("nosuch://x/y", "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=wanted):
            read_yaml(path)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.sampled_from(
        ["yes", "null", "1e5", "0x1F", "- a", "a: b", "# c", "'", "{A}", "1:30", "=", "<<", " x ", "2024-01-01"]
    )
    | st.dates()
)
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers() | st.booleans(), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(trees)
def test_what_is_written_reads_back_the_same(tree):
    assert yaml.safe_load(dump_yaml(tree)) == tree


@given(trees)
def test_writing_twice_gives_the_same_text(tree):
    assert dump_yaml(yaml.safe_load(dump_yaml(tree))) == dump_yaml(tree)


def test_written_yaml_is_for_people():
    data = {
        "a": {"b": [1, 2], "c": [{"d": 1, "e": []}, [3, [4]]], "lr": 1e-05},
        "s": "a: b",
        "n": None,
        "long": ["x" * 60] * 2,
    }
    assert dump_yaml(data) == (
        "a:\n  b: [1, 2]\n  c:\n  - d: 1\n    e: []\n  - [3, [4]]\n  lr: 1.0e-05\n"
        f"s: 'a: b'\nn: null\nlong:\n- {'x' * 60}\n- {'x' * 60}\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        *("${B}", "1e-4", "1e3", "yes", "1_0", "0x1f", "12:30", "2020-01-01", "{A}", "a: b", "\n", "a\nb", " a ", ""),
        *("~", "=", "<<", "- a", "#x", "a #b", "'q'", '"d"', "\t", "\u2028", "\u2022", "\U0001f600", "%x", "&x", "?"),
        *(":", "0o17", ".5", ".nan"),
    ],
)
def test_a_text_that_looks_like_something_else_stays_a_text(text: str):
    tree = {"value": text, "list": [text], "nested": [{text: [text, {"a": text}]}]}
    assert parse_yaml(dump_yaml(tree), name="x.yaml", folder="/").data == tree
