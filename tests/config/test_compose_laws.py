import copy
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rslp.config import merge, pick
from rslp.config.merge import Overlay, merge_overlays
from rslp.config.placeholders import Filler, placeholder_names
from rslp.config.provenance import trace_origins
from rslp.config.shared_heads import label_ranges
from rslp.errors import ConfigError
from rslp.io import Template, parse_yaml

ADAMW = "rslearn.train.optimizer.AdamW"
LAYER_DECAY = "rslearn.models.olmoearth_pretrain.optimizer.LayerDecayAdamW"

keys = st.sampled_from(["a", "b", "c", 1, 2])
leaves = st.none() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=3)
configs = st.recursive(
    st.dictionaries(keys, leaves, max_size=4), lambda inner: st.dictionaries(keys, inner | leaves, max_size=4)
)


@given(configs)
def test_nothing_is_merged_into_anything_unchanged(config):
    assert merge(config, {}) == config
    assert merge({}, config) == config


@given(configs)
def test_merging_twice_is_merging_once(config):
    assert merge(config, config) == config


def covers(merged, over) -> bool:
    if isinstance(over, dict):
        return isinstance(merged, dict) and all(covers(merged[key], value) for key, value in over.items())
    return merged == over


@given(configs, configs)
def test_the_right_side_wins_and_the_left_side_fills(left, right):
    merged = merge(left, right)
    assert covers(merged, right)
    assert {key: merged[key] for key in left if key not in right} == {k: v for k, v in left.items() if k not in right}


@given(configs, configs, configs)
def test_it_does_not_matter_how_layers_are_bracketed_where_kinds_agree(a, b, c):
    def kinds_agree(x, y) -> bool:
        if isinstance(x, dict) and isinstance(y, dict):
            return all(kinds_agree(x[key], y[key]) for key in x.keys() & y.keys())
        return isinstance(x, dict) == isinstance(y, dict)

    if kinds_agree(a, b) and kinds_agree(b, c) and kinds_agree(a, c):
        assert merge(merge(a, b), c) == merge(a, merge(b, c))


@given(configs, configs)
def test_inputs_are_never_changed(left, right):
    before = copy.deepcopy((left, right))
    merge(left, right)
    assert (left, right) == before


@given(st.lists(st.integers()), st.lists(st.integers()))
def test_plus_concatenates(below, above):
    assert merge({"x": below}, {"x+": above}) == {"x": below + above}
    assert merge({}, {"x+": above}) == {"x": above}
    assert merge({"x": None}, {"x+": above}) == {"x": above}
    assert merge(merge({"x": below}, {"x+": above}), {"x+": below}) == {"x": below + above + below}


@pytest.mark.parametrize(
    ("base", "over", "merged"),
    [
        ({"a": None}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"a": {"b": 1}}, {"a": None}, {"a": None}),
        ({"a": [1, 2]}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"a": {"b": 1}}, {"a": [3]}, {"a": [3]}),
        ({1: {"b": 1}}, {1: {"c": 2}}, {1: {"b": 1, "c": 2}}),
        ({"a": {"b": 1}}, {"a": {}}, {"a": {"b": 1}}),
        ({"a": [1]}, {"a": [2], "a+": [3]}, {"a": [2, 3]}),
        ({}, {"a": {"b+": [1]}}, {"a": {"b": [1]}}),
        ({"a": 1}, {"a": {"b+": [1]}}, {"a": {"b": [1]}}),
        # Another class keeps the arguments that it takes; one that is not known keeps them all.
        (
            {"class_path": "A", "init_args": {"x": 1}, "dict_kwargs": {"y": 2}},
            {"class_path": "B", "init_args": {"z": 3}},
            {"class_path": "B", "init_args": {"x": 1, "z": 3}, "dict_kwargs": {"y": 2}},
        ),
        (
            {"class_path": ADAMW, "init_args": {"lr": 1, "fused": True}, "dict_kwargs": {"y": 2}},
            {"class_path": LAYER_DECAY, "init_args": {"num_layers": 3}},
            {"class_path": LAYER_DECAY, "init_args": {"lr": 1, "num_layers": 3}},
        ),
        (
            {"class_path": LAYER_DECAY, "init_args": {"num_layers": 3}},
            {"class_path": ADAMW},
            {"class_path": ADAMW},
        ),
        (
            {"class_path": LAYER_DECAY, "init_args": {"num_layers": 3}},
            {"class_path": ADAMW, "init_args": {"num_layers": 4}},
            {"class_path": ADAMW, "init_args": {"num_layers": 4}},
        ),
        (
            {"s": {"class_path": "A", "init_args": {"x": 1}}},
            {"s": {"class_path": "A", "init_args": {"z": 3}}},
            {"s": {"class_path": "A", "init_args": {"x": 1, "z": 3}}},
        ),
        (
            {"class_path": "A", "init_args": {"x": [1]}},
            {"class_path": "B", "init_args": {"x+": [2]}},
            {"class_path": "B", "init_args": {"x": [1, 2]}},
        ),
        (
            {"class_path": "A", "init_args": {"lrs": [1]}},
            {"class_path": ADAMW, "init_args": {"lrs+": [2]}},
            {"class_path": ADAMW, "init_args": {"lrs": [2]}},
        ),
        ({"init_args": {"x": 1}}, {"class_path": "B"}, {"class_path": "B", "init_args": {"x": 1}}),
    ],
)
def test_facts_of_merging(base, over, merged):
    assert merge(base, over) == merged


@pytest.mark.parametrize(
    ("base", "over"), [({"a": "x"}, {"a+": [1]}), ({"a": [1]}, {"a+": "x"}), ({}, {"a+": {"b": 1}})]
)
def test_plus_wants_lists(base, over):
    with pytest.raises(ConfigError, match="append"):
        merge(base, over)


@pytest.mark.parametrize("nothing", [None, 3, [1], "x"])
def test_arguments_are_not_emptied(nothing):
    with pytest.raises(ConfigError, match=r"init_args: must be a mapping; .* would drop the arguments below it: x, y"):
        merge({"class_path": "A", "init_args": {"x": 1, "y": 2}}, {"init_args": nothing})
    assert merge({"class_path": "A", "init_args": {}}, {"init_args": None}) == {"class_path": "A", "init_args": None}


TAKEN = {"A": frozenset({"x", "y"}), "B": frozenset({"y", "z"}), "C": None}
arguments = st.dictionaries(
    st.sampled_from("xyz"), st.integers(0, 9) | st.dictionaries(keys, st.integers(), max_size=2)
)
lists = st.dictionaries(st.sampled_from(["p", "p+", "y+"]), st.lists(st.integers(0, 9), max_size=2))
one_class = st.fixed_dictionaries(
    {},
    optional={
        "class_path": st.sampled_from("ABC"),
        "init_args": st.builds(lambda a, b: {**b, **a}, arguments, lists),
        "dict_kwargs": st.just({"k": 1}),
    },
)
stacks = st.lists(st.builds(lambda a, b: {"m": a, "n": {"o": b}}, one_class, one_class), min_size=1, max_size=5)


def leaf_paths(node, at=()):
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaf_paths(value, (*at, key))
    else:
        yield at


@given(stacks)
def test_every_value_is_traced_to_who_set_it_also_through_changes_of_class(trees):
    document = parse_yaml("a: 1", name="x", folder="/")
    layers = [Overlay(tree, (), document, ()) for tree in trees]
    origins = {}
    try:
        result = merge_overlays(layers, accepts=TAKEN.get, origins=origins)
    except ConfigError:  # + over something that is no list
        return
    traced = dict(trace_origins(result, origins))
    here = set(leaf_paths(result))
    assert here <= set(traced)
    for at, said in traced.items():
        won = [one.value for one in said if one.won]
        value = pick(result, at)
        if at not in here:
            assert won == []
        elif isinstance(value, list) and won:
            assert value == [item for each in won for item in each]
        elif value != {}:
            assert won == [value]


@given(stacks)
def test_what_a_change_of_class_drops_is_listed_and_nothing_else_is_lost(trees):
    document = parse_yaml("a: 1", name="x", folder="/")
    layers = [Overlay(tree, (), document, ()) for tree in trees]
    replaced = []
    try:
        result = merge_overlays(layers, accepts=TAKEN.get, replaced=replaced)
    except ConfigError:
        return
    for place in (("m",), ("n", "o")):
        named = [pick(tree, (*place, "class_path")) for tree in trees]
        given = {key.rstrip("+") for tree in trees for key in pick(tree, (*place, "init_args")) or {}}
        left = set(pick(result, (*place, "init_args")) or {})
        dropped = {name for one in replaced if one.key_path == place for name in one.dropped}
        assert given - left <= dropped - {"dict_kwargs"}
        classes = [name for name in named if name]
        assert sum(one.key_path == place for one in replaced) == sum(a != b for a, b in itertools.pairwise(classes))


names = st.sampled_from(["PATCH_SIZE", "SIZE", "A_1"])
odd_texts = st.text(alphabet="ab #:'\"{}[]\\,&*!|>%@`-?", max_size=12).filter(lambda text: "{" not in text)
values = st.integers(1, 64) | odd_texts | st.booleans() | st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.fixed_dictionaries({"PATCH_SIZE": values, "SIZE": values, "A_1": values}),
    st.lists(names, min_size=1, max_size=4),
)
def test_filling_leaves_nothing_over_and_keeps_values_whole(constants, used):
    rows = [f"k{i}: {{{name}}}\nq{i}: '<{{{name}}}>'\nl{i}: [{{{name}}}, 1]" for i, name in enumerate(used)]
    document = parse_yaml("\n".join(rows), name="x", folder="/")
    problems = []
    filled = Filler(constants).fill(document.data, lambda what, _: problems.append(what))
    assert problems == []
    for i, name in enumerate(used):
        value = constants[name]
        assert filled[f"k{i}"] == value
        assert type(filled[f"k{i}"]) is type(value)
        assert filled[f"l{i}"] == [value, 1]
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        assert filled[f"q{i}"] == f"<{shown}>"
    assert not any(isinstance(value, Template) for value in filled.values())


@given(st.integers(1, 300), st.integers(1, 300))
def test_division_is_exact_or_refused(number, size):
    problems = []
    data = {"a": Template(f"{{{number}/SIZE}}", plain=True)}
    filled = Filler({"SIZE": size}).fill(data, lambda what, _: problems.append(what))
    if number % size:
        assert len(problems) == 1
    else:
        assert (filled, problems) == ({"a": number // size}, [])


def test_constants_go_by_their_names_in_capitals():
    every = ("CHECKPOINT_PATH", "HELIOS_CHECKPOINT_PATH", "OLMOEARTH_CHECKPOINT_PATH")
    for name in ("helios_checkpoint_path", "olmoearth_checkpoint_path"):
        names = placeholder_names({"patch_size": 4, name: "/x"})
        assert names == {"PATCH_SIZE": 4, **dict.fromkeys(every, "/x")}


@st.composite
def heads(draw):
    tasks = draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True))
    numbers = {task: draw(st.integers(1, 9)) for task in tasks}
    shuffled = draw(st.permutations(tasks))
    cuts = sorted(draw(st.sets(st.integers(0, len(tasks)), max_size=3)))
    groups = [list(shuffled[a:b]) for a, b in zip([0, *cuts], cuts, strict=False) if b > a]
    for group in groups:
        numbers.update(dict.fromkeys(group, numbers[group[0]]))
    return numbers, groups


@given(heads())
def test_label_ranges_are_disjoint_and_complete(case):
    numbers, groups = case
    ranges, total = label_ranges(numbers, groups)
    assert set(ranges) == set(numbers)
    assert all(ranges[task][1] == number for task, number in numbers.items())
    together = {task: next((tuple(group) for group in groups if task in group), (task,)) for task in numbers}
    spans = {together[task]: range(offset, offset + number) for task, (offset, number) in ranges.items()}
    labels = sorted(label for span in spans.values() for label in span)
    assert labels == list(range(total))
    for task, (offset, number) in ranges.items():
        assert range(offset, offset + number) == spans[together[task]]
