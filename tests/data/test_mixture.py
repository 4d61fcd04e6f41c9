"""Known answers: what each mode, stop rule and limit is for, and where the stock sampler is wrong."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rslp.data.mixture.mixture import EpochBatches, Mixture, PlannedBatch, plan_epoch, plan_evaluation
from rslp.errors import ConfigError, DataError, UsageError

SIZES = {"a": 40, "b": 10, "c": 3}  # 10, 3 and 1 batches of at most 4
FOUR = dict.fromkeys(SIZES, 4)


def draw(
    mixture: Mixture, *, number: int = 0, seed: int = 0, sizes: dict[str, int] = SIZES, batch: int = 4
) -> EpochBatches:
    return plan_epoch(sizes, dict.fromkeys(sizes, batch), mixture, seed=seed, epoch=number)


def line(batches: EpochBatches) -> str:
    return "".join(batch.dataset for batch in batches)


def mean_counts(mixture: Mixture, *, epochs: int, sizes: dict[str, int] = SIZES, batch: int = 4) -> dict[str, float]:
    total = Counter[str]()
    for number in range(epochs):
        total.update(draw(mixture, number=number, sizes=sizes, batch=batch).counts)
    return {name: total[name] / epochs for name in sizes}


# --- order -----------------------------------------------------------------------------------------------------------


def test_cycle_goes_by_name_and_drops_what_is_used_up() -> None:
    assert line(draw(Mixture(mode="cycle"))) == "abc" + "ab" * 2 + "a" * 7


def test_random_cycle_has_each_dataset_that_is_left_once_a_round_in_changing_order() -> None:
    text = line(draw(Mixture(mode="random_cycle"), sizes={"a": 400, "b": 400, "c": 80}))
    rounds = [text[i : i + 3] for i in range(0, 60, 3)]
    assert {"".join(sorted(r)) for r in rounds} == {"abc"}
    assert len(set(rounds)) == 6
    pairs = [text[i : i + 2] for i in range(60, 220, 2)]
    assert set(pairs) == {"ab", "ba"}


def test_reptile_stays_for_a_turn() -> None:
    text = line(draw(Mixture(mode="reptile", steps_per_dataset=3), sizes={"a": 36, "b": 36, "c": 16}))
    turns = [text[:3], text[3:6], text[6:9]]
    assert sorted(turns) == ["aaa", "bbb", "ccc"]
    assert Counter(text) == {"a": 9, "b": 9, "c": 4}
    assert sorted(text[9:16]) == list("aaabbbc")  # round 2: the one that c has left


def test_random_picks_evenly_among_what_is_left_whatever_the_sizes() -> None:
    first = Counter(line(draw(Mixture(mode="random"), seed=seed))[0] for seed in range(1500))
    assert all(430 < first[name] < 570 for name in SIZES)
    texts = [line(draw(Mixture(mode="random"), seed=seed)) for seed in range(1500)]
    after_c = Counter(text[text.index("c") + 1] for text in texts if text.index("c") < 3)  # a and b are both left
    assert abs(after_c["a"] / after_c.total() - 0.5) < 0.06
    assert after_c["c"] == 0


def test_weights_are_odds_when_all_is_drawn_once() -> None:
    mixture = Mixture(mode="weights", weights={"a": 1, "b": 1, "c": 8})
    first = Counter(line(draw(mixture, seed=seed))[0] for seed in range(1000))
    assert 760 < first["c"] < 840
    assert draw(mixture).counts == {"a": 10, "b": 3, "c": 1}


def test_every_epoch_has_another_order_of_samples_and_datasets() -> None:
    mixture = Mixture(mode="random_cycle", stop="longest")
    one, two, again, other = draw(mixture), draw(mixture, number=1), draw(mixture), draw(mixture, seed=1)
    assert list(one) == list(again)
    for unlike in (two, other):
        assert line(one) != line(unlike)
        assert [b.indices for b in one if b.dataset == "a"] != [b.indices for b in unlike if b.dataset == "a"]
    passes = [[i for b in one if b.dataset == "b" for i in b.indices][p : p + 10] for p in (0, 10)]
    assert passes[0] != passes[1]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(10))


def test_the_order_of_one_dataset_does_not_hang_on_the_others() -> None:
    alone = [b.indices for b in draw(Mixture(), sizes={"a": 40})]
    assert alone == [b.indices for b in draw(Mixture()) if b.dataset == "a"]
    assert alone != [b.indices for b in draw(Mixture(), sizes={"z": 40})]


# --- how many --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "expected"),
    [("all", (10, 3, 1)), ("shortest", (1, 1, 1)), ("longest", (10, 10, 10))],
)
@pytest.mark.parametrize("mode", ["cycle", "random_cycle", "reptile", "random"])
def test_even_modes(mode: str, stop: str, expected: tuple[int, ...]) -> None:
    length = 2 if mode == "reptile" else None
    mixture = Mixture(mode=mode, stop=stop, steps_per_dataset=length)  # type: ignore[arg-type]
    if (mode, stop) == ("random", "all"):
        assert draw(mixture).counts == dict(zip("abc", expected, strict=True))
    for number in range(3):
        assert tuple(draw(mixture, number=number).counts.values()) == expected


@pytest.mark.parametrize(
    ("mixture", "odds"),
    [
        (Mixture(mode="proportional", steps_per_epoch=20), (40, 10, 3)),
        (Mixture(mode="temperature", temperature=1, steps_per_epoch=20), (40, 10, 3)),
        (Mixture(mode="temperature", temperature=2, steps_per_epoch=20), (40**0.5, 10**0.5, 3**0.5)),
        (Mixture(mode="temperature", temperature=5, steps_per_epoch=7), (40**0.2, 10**0.2, 3**0.2)),
        (Mixture(mode="temperature", temperature=1e9, steps_per_epoch=7), (1, 1, 1)),
        (Mixture(mode="weights", weights={"a": 1, "b": 2.5, "c": 0.01}, steps_per_epoch=3), (1, 2.5, 0.01)),
        (Mixture(mode="weights", weights={"a": 2, "b": 3, "c": 5}, steps_per_epoch=1), (2, 3, 5)),
        (Mixture(mode="cycle", steps_per_epoch=2), (1, 1, 1)),
        (Mixture(mode="proportional", steps_per_epoch=30, limits={"a": 20}), None),
    ],
)
def test_shares_tend_to_what_was_asked(mixture: Mixture, odds: tuple[float, ...] | None) -> None:
    steps = mixture.steps_per_epoch
    assert steps is not None
    epochs = 500
    found = np.array(list(mean_counts(mixture, epochs=epochs).values()))
    expected = np.array([5, 25 * 10 / 13, 25 * 3 / 13])  # a stops at its 5 batches of 4, b and c share the rest
    if odds is not None:
        expected = steps * np.array(odds) / sum(odds)
    assert np.abs(found - expected).max() <= 3 / epochs
    assert found.sum() == steps


def test_proportional_draws_every_sample_equally_often_whatever_the_batch_sizes() -> None:
    sizes, batch_sizes = {"images": 4000, "points": 4000}, {"images": 2, "points": 40}
    made = plan_epoch(sizes, batch_sizes, Mixture(mode="proportional", steps_per_epoch=2100), seed=0, epoch=0)
    assert made.counts == {"images": 2000, "points": 100}


def test_few_steps_still_reach_every_dataset() -> None:
    sizes = {f"d{i:02}": 50 for i in range(20)}
    mean = mean_counts(Mixture(steps_per_epoch=3), epochs=40, sizes=sizes)
    assert all(4 <= 40 * n <= 8 for n in mean.values())


def test_longest_is_through_once_with_unequal_shares() -> None:
    mixture = Mixture(mode="weights", weights={"a": 1, "b": 1, "c": 2}, stop="longest")
    assert draw(mixture).counts == {"a": 10, "b": 10, "c": 20}
    mixture = Mixture(mode="weights", weights={"a": 5, "b": 3, "c": 2}, stop="shortest")
    assert len(draw(mixture, sizes={"a": 100, "b": 40, "c": 40})) == 33  # 10 batches of b are 30 % of it


@pytest.mark.parametrize("limit", [1, 4, 7, 9, 10, 39])
def test_a_limited_epoch_goes_on_where_the_last_one_ended(limit: int) -> None:
    drawn = [i for e in range(10) for b in draw(Mixture(limits={"a": limit}), number=e) for i in _of(b, "a")]
    assert len(drawn) == 10 * limit
    for start in range(0, len(drawn) // 40 * 40, 40):
        assert sorted(drawn[start : start + 40]) == list(range(40))
    assert len({len(draw(Mixture(limits={"a": limit}), number=e)) for e in range(10)}) == 1


def test_a_limit_above_the_size_binds_refills_only() -> None:
    assert draw(Mixture(limits=60)).counts == draw(Mixture()).counts
    refilled = draw(Mixture(limits={"c": 9}, stop="longest"))
    assert refilled.counts == {"a": 10, "b": 10, "c": 3}
    assert sum(b.global_size for b in refilled if b.dataset == "c") == 9


# --- steps over several datasets -------------------------------------------------------------------------------------


def test_steps_of_two_datasets() -> None:
    batches = list(draw(Mixture(mode="cycle", stop="longest", datasets_per_step=2)))
    assert "".join(b.dataset for b in batches[:6]) == "abcabc"
    assert [b.step for b in batches[:5]] == [0, 0, 1, 1, 2]
    assert {b.step_size for b in batches} == {2}


def test_a_dominant_dataset_is_in_every_step_and_the_others_beside_it() -> None:
    batches = draw(Mixture(datasets_per_step=2))
    assert batches.steps == 10
    assert [b.step for b in batches if b.dataset == "a"] == list(range(10))
    assert Counter(b.step_size for b in batches) == {2: 8, 1: 6}


def test_a_weight_above_its_possible_share_is_in_every_step() -> None:
    mixture = Mixture(mode="weights", weights={"a": 100, "b": 1, "c": 3}, datasets_per_step=2, steps_per_epoch=8)
    assert draw(mixture).counts == {"a": 8, "b": 2, "c": 6}


def test_steps_per_epoch_are_optimiser_steps() -> None:
    made = draw(Mixture(mode="random", datasets_per_step=3, steps_per_epoch=5))
    assert (made.steps, len(made)) == (5, 15)


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batches_are_even_and_a_process_without_a_share_gets_filler() -> None:
    (one, two), (three, four) = (
        [plan_epoch({"a": n}, {"a": 8}, Mixture(), seed=0, epoch=0, world=2, rank=r)[0] for r in (0, 1)] for n in (9, 1)
    )
    assert (one.global_size, one.real, two.real) == (9, 4, 5)
    assert (three.real, four.real) == (0, 1)
    assert three.indices == four.indices == (0,)
    sizes = [b.global_size for b in plan_epoch({"a": 9}, {"a": 8}, Mixture(), seed=0, epoch=0)]
    assert sizes == [4, 5]


def test_draws_count_passes() -> None:
    drawn = [b.draws for number in (0, 1) for b in draw(Mixture(stop="longest"), number=number) if b.dataset == "c"]
    assert drawn == [(n,) * 3 for n in range(20)]


def test_a_million_epochs_later() -> None:
    mixture = Mixture(mode="weights", weights={"a": 1, "b": 2, "c": 4}, steps_per_epoch=9)
    before, after = draw(mixture, number=10**6 - 1), draw(mixture, number=10**6)
    last, first = ([b for b in made if b.dataset == "a"] for made in (before, after))
    assert first[0].draws[0] - last[-1].draws[0] in (0, 1)
    assert abs(first[0].draws[0] * 10 - 10**6 * 9 / 7) <= 20  # ten batches of "a" are a pass


def test_positions_out_of_range() -> None:
    batches = draw(Mixture())
    assert list(batches.steps_from(14)) == []
    with pytest.raises(IndexError):
        batches[14]
    with pytest.raises(UsageError, match="step 15 of an epoch that has 14"):
        batches.steps_from(15)


def test_evaluation_of_nothing_in_one_dataset() -> None:
    batches = list(plan_evaluation({"a": 0, "b": 3}, {"a": 4, "b": 2}))
    assert [(b.dataset, b.indices) for b in batches] == [("b", (0,)), ("b", (1, 2))]
    assert list(plan_evaluation({"a": 0}, {"a": 4})) == []


def alone(code: str, *, hash_seed: str) -> str:
    """Run code in a process of its own that has the mixture and nothing that it does not import."""
    stub = "import sys; from rslp.data.mixture.mixture import *; "
    env = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", stub + code], env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_no_hash_seed_matters(hash_seed: str) -> None:
    code = "print(list(plan_epoch({'a': 40, 'b': 10}, {'a': 4, 'b': 4}, Mixture(mode='random'), seed=3, epoch=2)))"
    here = list(plan_epoch({"a": 40, "b": 10}, {"a": 4, "b": 4}, Mixture(mode="random"), seed=3, epoch=2))
    assert alone(code, hash_seed=hash_seed) == str(here)


def test_nothing_heavy_is_imported() -> None:
    heavy = "{'torch', 'lightning', 'rslearn', 'rasterio'}"
    assert alone(f"print(len({heavy} & set(sys.modules)), 'numpy' in sys.modules)", hash_seed="0") == "0 True"


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "randm"}, "mixture.mode: got 'randm', allowed: random, cycle"),
        ({"stop": "never"}, "mixture.stop: got 'never', allowed: all, shortest, longest"),
        ({"mode": "temperature"}, "mixture.temperature: mode temperature needs it"),
        ({"mode": "reptile"}, "mixture.steps_per_dataset: mode reptile needs it"),
        ({"mode": "weights"}, "mixture.weights: mode weights needs it"),
        ({"temperature": 2.0}, "mixture.temperature: only mode temperature uses it, the mode is random_cycle"),
        ({"mode": "temperature", "temperature": 0}, "must be a positive number, got 0"),
        ({"mode": "temperature", "temperature": float("nan")}, "must be a positive number, got nan"),
        ({"mode": "weights", "weights": {"a": 0, "b": 1}}, "mixture.weights.a: must be a positive number, got 0"),
        ({"limits": 0}, "mixture.limits: must be a whole number of at least 1, got 0"),
        ({"limits": {"a": 2.5}}, "mixture.limits.a: must be a whole number of at least 1, got 2.5"),
        ({"steps_per_epoch": -1}, "mixture.steps_per_epoch: must be a whole number of at least 1, got -1"),
        ({"steps_per_epoch": 5, "stop": "longest"}, "contradicts stop: longest"),
        ({"datasets_per_step": True}, "mixture.datasets_per_step: must be a whole number"),
        ({"mode": "reptile", "steps_per_dataset": 2, "datasets_per_step": 2}, "mode reptile stays with one dataset"),
    ],
)
def test_a_mixture_that_cannot_be(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        Mixture(**arguments)  # type: ignore[arg-type]


def test_all_faults_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Mixture(mode="cycle", temperature=-1, limits=0, datasets_per_step=0)
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize(
    ("sizes", "batch_sizes", "mixture", "message"),
    [
        (SIZES, {"a": 4, "b": 4}, Mixture(), "batch_sizes: no value for c"),
        (SIZES, {**FOUR, "d": 4}, Mixture(), "batch_sizes.d: no such dataset"),
        (SIZES, {**FOUR, "a": 0}, Mixture(), "batch_sizes.a: must be a whole number of at least 1, got 0"),
        (
            {"corn": 3},
            {"corn": 1},
            Mixture(limits={"cron": 1}),
            "mixture.limits.cron: no such dataset; did you mean corn?",
        ),
        (SIZES, FOUR, Mixture(mode="weights", weights={"a": 1, "b": 1}), "mixture.weights: no value for c"),
        (SIZES, FOUR, Mixture(datasets_per_step=4), "got 4, but there are only 3 datasets"),
        (SIZES, FOUR, Mixture(limits=4, steps_per_epoch=9), r"9 steps are more than the limits allow \(3 batches\)"),
        (
            SIZES,
            FOUR,
            Mixture(mode="weights", weights={"a": 1e-300, "b": 1, "c": 1}, stop="longest"),
            "an epoch would have .* batches",
        ),
    ],
)
def test_a_mixture_that_does_not_fit(
    sizes: dict[str, int], batch_sizes: dict[str, int], mixture: Mixture, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_epoch(sizes, batch_sizes, mixture, seed=0, epoch=0)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"epoch": -1}, "the epoch must be a whole number of at least 0, got -1"),
        ({"world": 0}, "the number of processes must be"),
        ({"world": 2, "rank": 2}, "the rank of 2 processes must be one of 0 to 1, got 2"),
    ],
)
def test_a_process_that_cannot_be(place: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_epoch(SIZES, FOUR, Mixture(), seed=0, **{"epoch": 0, **place})


def test_nothing_to_draw() -> None:
    with pytest.raises(DataError, match=r"no samples to draw: b \(0\)"):
        plan_epoch({"a": 1, "b": 0}, {"a": 1, "b": 1}, Mixture(), seed=0, epoch=0)
    with pytest.raises(DataError, match="no dataset"):
        plan_epoch({}, {}, Mixture(), seed=0, epoch=0)


def test_a_mixture_does_not_change_with_what_it_was_made_of() -> None:
    weights = {"a": 1.0, "b": 1.0, "c": 1.0}
    mixture = Mixture(mode="weights", weights=weights)
    weights["a"] = 5.0
    assert mixture.weights == {"a": 1.0, "b": 1.0, "c": 1.0}


# --- against the stock sampler ---------------------------------------------------------------------------------------


def stock(
    sizes: dict[str, int], *, batch: int = 4, world: int = 1, rank: int = 0, **options: object
) -> list[PlannedBatch]:
    """The batches of rslearn's own sampler, with indices counted within the dataset."""
    from rslearn.train.data_module import DistributedPerDatasetBatchSampler

    ends = np.cumsum([0, *sizes.values()]).tolist()
    buckets = {name: range(*ends) for name, ends in zip(sizes, pairwise(ends), strict=True)}
    datasets = SimpleNamespace(datasets={name: range(n) for name, n in sizes.items()}, buckets=buckets)
    sampler = DistributedPerDatasetBatchSampler(
        datasets, dict.fromkeys(sizes, batch), num_replicas=world, rank=rank, **options
    )
    made = []
    for indices in sampler:
        name = next(name for name, bucket in buckets.items() if indices[0] in bucket)
        own = tuple(i - buckets[name].start for i in indices)
        made.append(PlannedBatch(name, own, (0,) * len(own), len(own), len(own), 0, 1))
    return made


@pytest.mark.parametrize(
    ("mode", "refill"),
    [("random", False), ("cycle", False), ("cycle", True), ("random_cycle", False), ("random_cycle", True)],
)
def test_as_many_batches_as_the_stock_sampler(mode: str, refill: bool) -> None:
    theirs = Counter(b.dataset for b in stock(SIZES, sample_mode=mode, refill_batches=refill))
    ours = draw(Mixture(mode=mode, stop="longest" if refill else "all"))  # type: ignore[arg-type]
    assert ours.counts == theirs


def test_the_same_cycle_as_the_stock_sampler() -> None:
    sizes = {"a": 12, "b": 12, "c": 12}
    theirs = "".join(b.dataset for b in stock(sizes, sample_mode="cycle", refill_batches=True))
    assert line(draw(Mixture(mode="cycle", stop="longest"), sizes=sizes)) == theirs == "abc" * 3
    # Without refill it jumps out of turn when the first dataset is used up.
    theirs = "".join(b.dataset for b in stock(sizes, sample_mode="cycle"))
    assert line(draw(Mixture(mode="cycle"), sizes=sizes)) == "abc" * 3 != theirs == "abcabcacb"


def test_the_stock_sampler_lets_limits_grow_with_processes_and_ours_does_not() -> None:
    theirs = [b for r in (0, 1) for b in stock({"a": 40}, world=2, rank=r, per_dataset_patch_limit=8)]
    ours = [
        b for r in (0, 1) for b in plan_epoch({"a": 40}, {"a": 4}, Mixture(limits=8), seed=0, epoch=0, world=2, rank=r)
    ]
    assert sum(b.real for b in theirs) == 16
    assert sum(b.real for b in ours) == 8


@pytest.mark.parametrize("refill", [False, True])
def test_the_stock_sampler_repeats_evaluation_samples_and_ours_does_not(refill: bool) -> None:
    sizes = {"a": 7, "b": 21}
    options = {"sample_mode": "cycle", "shuffle": False, "refill_batches": refill}
    theirs = Counter(
        (b.dataset, i) for r in (0, 1) for b in stock(sizes, world=2, rank=r, **options) for i in b.indices
    )
    ours = Counter(
        (b.dataset, i)
        for r in (0, 1)
        for b in plan_evaluation(sizes, dict.fromkeys(sizes, 4), world=2, rank=r)
        for i in b.indices[: b.real]
    )
    assert max(theirs.values()) > 1
    assert len(ours) == 28
    assert set(ours.values()) == {1}


def _of(batch: PlannedBatch, dataset: str) -> tuple[int, ...]:
    return batch.indices if batch.dataset == dataset else ()
