"""What holds for every mixture, whatever the sizes, modes, limits and numbers of processes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rslp.data.mixture.counts import counts
from rslp.data.mixture.mixture import EpochBatches, Mixture, PlannedBatch, plan_epoch, plan_evaluation
from rslp.data.mixture.stream import Stream
from rslp.errors import ConfigError

MODES = ("random", "cycle", "random_cycle", "reptile", "proportional", "temperature", "weights")
NAMES = ("barley", "clouds", "fields", "vessels", "wheat")
EPOCHS = 4
quick = settings(deadline=None, max_examples=60)


@dataclass(frozen=True)
class Case:
    sizes: dict[str, int]
    batch_sizes: dict[str, int]
    mixture: Mixture
    seed: int
    world: int

    def epoch(self, number: int, *, rank: int = 0) -> EpochBatches:
        return plan_epoch(
            self.sizes, self.batch_sizes, self.mixture, seed=self.seed, epoch=number, world=self.world, rank=rank
        )

    def ranks(self, number: int) -> list[list[PlannedBatch]]:
        return [list(self.epoch(number, rank=rank)) for rank in range(self.world)]

    def drawn(self, number: int) -> list[tuple[PlannedBatch, list[int]]]:
        """Global batches: the real samples of all ranks, in rank order."""
        return [
            (parts[0], [i for part in parts for i in part.indices[: part.real]])
            for parts in zip(*self.ranks(number), strict=True)
        ]


@st.composite
def mixtures(draw: st.DrawFn, names: list[str], *, limits: bool = True) -> Mixture:
    mode = draw(st.sampled_from(MODES))
    stop = draw(st.sampled_from(["all", "shortest", "longest"]))
    limit = st.none() | st.integers(1, 50) | st.dictionaries(st.sampled_from(names), st.integers(1, 50))
    return Mixture(
        mode=mode,
        stop=stop,
        steps_per_epoch=draw(st.none() | st.integers(1, 20)) if stop == "all" else None,
        temperature=draw(st.floats(1, 50)) if mode == "temperature" else None,
        weights={name: draw(st.floats(0.2, 5)) for name in names} if mode == "weights" else None,
        limits=draw(limit) if limits else None,
        steps_per_dataset=draw(st.integers(1, 4)) if mode == "reptile" else None,
        datasets_per_step=1 if mode == "reptile" else draw(st.integers(1, len(names))),
    )


@st.composite
def cases(draw: st.DrawFn, *, limits: bool = True) -> Case:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=True))
    case = Case(
        sizes={name: draw(st.integers(1, 60)) for name in names},
        batch_sizes={name: draw(st.integers(1, 9)) for name in names},
        mixture=draw(mixtures(names, limits=limits)),
        seed=draw(st.integers(0, 2**32)),
        world=draw(st.integers(1, 4)),
    )
    try:
        case.epoch(0)
    except ConfigError as error:
        assert "more than the limits allow" in str(error)
        assume(False)
    return case


@quick
@given(cases(), st.integers(0, 50))
def test_all_ranks_go_together(case: Case, number: int) -> None:
    ranks = case.ranks(number)
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) == sum(case.epoch(number).counts.values()) == len(case.epoch(0))
    assert case.epoch(number).steps == case.epoch(0).steps > 0
    for parts in zip(*ranks, strict=True):
        assert len({(b.dataset, b.global_size, b.step, b.step_size) for b in parts}) == 1
        assert sum(b.real for b in parts) == parts[0].global_size
        assert max(b.real for b in parts) - min(b.real for b in parts) <= 1
        for part in parts:
            assert len(part.indices) == len(part.draws) == max(part.real, 1) <= case.batch_sizes[part.dataset]
            assert set(part.indices) <= set(range(case.sizes[part.dataset]))


@quick
@given(cases())
def test_every_sample_once_before_any_again_and_draws_count_it(case: Case) -> None:
    seen = {name: np.zeros(size, dtype=int) for name, size in case.sizes.items()}
    for number in range(EPOCHS):
        for batch, indices in case.drawn(number):
            assert len(set(indices)) == len(indices), "a sample twice in a batch"
            of = seen[batch.dataset]
            assert set(of[indices]) == set(batch.draws)
            of[indices] += 1
            assert of.max() - of.min() <= 1


@quick
@given(cases())
def test_limits_hold_over_all_processes(case: Case) -> None:
    for number in range(EPOCHS):
        drawn = Counter[str]()
        for batch, indices in case.drawn(number):
            drawn[batch.dataset] += len(indices)
        for name, size in case.sizes.items():
            limit = case.mixture.limit(name)
            assert limit is None or drawn[name] <= limit
            if case.mixture.whole:
                assert drawn[name] == (size if limit is None else min(size, limit))


@quick
@given(cases(limits=False))
def test_without_limits_each_sample_is_in_each_epoch_once(case: Case) -> None:
    assume(case.mixture.whole)
    for number in range(EPOCHS):
        drawn = {(batch.dataset, i): batch.draws[0] for batch, indices in case.drawn(number) for i in indices}
        assert set(drawn) == {(name, i) for name, size in case.sizes.items() for i in range(size)}
        assert set(drawn.values()) == {number}
        assert sum(len(indices) for _, indices in case.drawn(number)) == len(drawn)


@quick
@given(cases(), st.integers(0, 50))
def test_one_process_with_the_whole_batch_draws_the_same(case: Case, number: int) -> None:
    whole = {name: size * case.world for name, size in case.batch_sizes.items()}
    alone = list(plan_epoch(case.sizes, whole, case.mixture, seed=case.seed, epoch=number))
    assert [(b.dataset, list(b.indices)) for b in alone] == [(b.dataset, i) for b, i in case.drawn(number)]
    assert all(b.real == b.global_size == len(b.indices) for b in alone)


@quick
@given(cases(), st.integers(0, 50), st.randoms(use_true_random=False))
def test_the_order_of_mappings_does_not_matter(case: Case, number: int, random: np.random.RandomState) -> None:
    names = list(case.sizes)
    random.shuffle(names)
    turned = Case(
        sizes={name: case.sizes[name] for name in names},
        batch_sizes={name: case.batch_sizes[name] for name in reversed(names)},
        mixture=case.mixture,
        seed=case.seed,
        world=case.world,
    )
    assert list(turned.epoch(number)) == list(case.epoch(number))


@quick
@given(cases(), st.integers(0, 9), st.data())
def test_an_epoch_can_be_entered_anywhere(case: Case, number: int, data: st.DataObject) -> None:
    whole, epoch = list(case.epoch(number)), case.epoch(number)
    position = data.draw(st.integers(0, len(whole)))
    assert [epoch[i] for i in range(position, len(epoch))] == whole[position:]
    first = whole[position].step if position < len(whole) else epoch.steps
    later = [batch for step in case.epoch(number).steps_from(first) for batch in step]
    assert later == [batch for batch in whole if batch.step >= first]
    if position < len(whole):
        assert case.epoch(number)[position] == whole[position] == case.epoch(number)[position - len(whole)]


@quick
@given(cases(), st.integers(0, 9))
def test_a_step_holds_different_datasets(case: Case, number: int) -> None:
    batches, k = list(case.epoch(number)), case.mixture.datasets_per_step
    groups = [[b for b in batches if b.step == step] for step in range(batches[-1].step + 1)]
    assert [b.step for b in batches] == sorted(b.step for b in batches)
    for group in groups:
        assert len({b.dataset for b in group}) == len(group) == group[0].step_size <= k
    most = max(Counter(b.dataset for b in batches).values())
    assert len(groups) == max(math.ceil(len(batches) / k), most) == case.epoch(number).steps
    if case.mixture.limits is None and not case.mixture.whole:
        assert all(len(group) == k for group in groups)
    if case.mixture.steps_per_epoch is not None:
        assert len(groups) == case.mixture.steps_per_epoch


@quick
@given(cases(limits=False), st.integers(0, 9), st.integers(2, 5), st.data())
def test_rounds_make_longer_steps_of_the_same_batches(
    case: Case, number: int, rounds: int, data: st.DataObject
) -> None:
    mixture = replace(case.mixture, accumulate=rounds)
    asked = case.mixture.steps_per_epoch
    plain = replace(case, mixture=replace(case.mixture, steps_per_epoch=asked and asked * rounds))
    single, long = list(plain.epoch(number).steps_from(0)), replace(case, mixture=mixture).epoch(number)
    assert [drawn(step) for step in long.steps_from(0)] == [
        drawn(batch for step in single[i : i + rounds] for batch in step) for i in range(0, len(single), rounds)
    ]
    assert long.steps == math.ceil(len(single) / rounds)
    start = data.draw(st.integers(0, long.steps))
    assert list(long.steps_from(start)) == list(long.steps_from(0))[start:]
    for step, batches in enumerate(long.steps_from(0)):
        assert {(batch.step, batch.step_size) for batch in batches} == {(step, len(batches))}


def drawn(step: Iterable[PlannedBatch]) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    return [(batch.dataset, batch.indices, batch.draws) for batch in step]


@quick
@given(cases())
def test_the_stop_rules_do_what_they_are_called(case: Case) -> None:
    assume(case.mixture.datasets_per_step == 1 and case.mixture.limits is None)
    passes = {name: math.ceil(n / (case.batch_sizes[name] * case.world)) for name, n in case.sizes.items()}
    drawn = case.epoch(0).counts
    if case.mixture.stop == "shortest":  # shares are kept up to one batch, but an epoch has at least one batch
        assert all(drawn[name] <= passes[name] for name in passes)
        if case.mixture.mode in ("cycle", "random_cycle", "reptile", "random"):
            assert set(drawn.values()) == {min(passes.values())}
    if case.mixture.stop == "longest":
        assert all(drawn[name] >= passes[name] - 1 for name in passes)
        if case.mixture.mode in ("cycle", "random_cycle", "reptile", "random"):
            assert set(drawn.values()) == {max(passes.values())}


@quick
@given(st.lists(st.floats(0.01, 20), min_size=1, max_size=30), st.integers(0, 3000))
def test_rounded_quotas_are_off_by_less_than_one_in_an_epoch_and_by_little_in_many(raw: list[float], many: int) -> None:
    quota = np.array(raw) * (math.ceil(sum(raw)) / sum(raw))
    before, now = counts(quota, many)
    after, _ = counts(quota, many + 1)
    assert (before + now == after).all()
    assert now.sum() == round(quota.sum())
    assert (now >= np.floor(quota - 1e-6)).all() and (now <= np.ceil(quota + 1e-6)).all()
    assert np.abs(before - many * quota).max() <= 2 + 0.5 * math.log1p(many)


@quick
@given(st.integers(1, 80), st.integers(1, 30), st.data())
def test_a_stream_is_cut_without_gaps_overlaps_or_torn_batches(size: int, batch: int, data: st.DataObject) -> None:
    stream = Stream(size=size, samples_per_cycle=data.draw(st.integers(1, size)), batch=batch)
    position = 0
    for number in range(stream.batches * 12):
        of, first, stop = stream.span(number)
        assert of * size + first == position
        assert first < stop <= size and stop - first <= batch
        position += stop - first
        assert (number + 1) % stream.batches or position % stream.samples_per_cycle == 0
    assert stream.batches <= math.ceil(stream.samples_per_cycle / batch) + 1


@quick
@given(
    st.dictionaries(st.sampled_from(NAMES), st.tuples(st.integers(0, 60), st.integers(1, 9)), min_size=1),
    st.integers(1, 5),
)
def test_evaluation_counts_every_sample_once_on_any_number_of_processes(
    given_sizes: dict[str, tuple[int, int]], world: int
) -> None:
    sizes = {name: size for name, (size, _) in given_sizes.items()}
    batch_sizes = {name: batch for name, (_, batch) in given_sizes.items()}
    ranks = [list(plan_evaluation(sizes, batch_sizes, world=world, rank=rank)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    real = [(b.dataset, i) for parts in zip(*ranks, strict=True) for b in parts for i in b.indices[: b.real]]
    assert real == [(name, i) for name in sorted(sizes) for i in range(sizes[name])]
    for batches in ranks:
        for b in batches:
            assert len(b.indices) == max(1, b.real) <= batch_sizes[b.dataset]
            assert set(b.draws) == {0}
