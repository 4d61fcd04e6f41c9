"""What holds for every way of drawing samples: classes become equal, draws never repeat, and no state is needed."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rslp.data.mixture.mixture import Mixture, plan_epoch
from rslp.data.mixture.sampling import ClassBalanced, InTurn, Sampling, Weighted
from rslp.data.mixture.stream import shuffled

quick = settings(deadline=None, max_examples=40)


@st.composite
def balanced(draw: st.DrawFn) -> ClassBalanced:
    """Samples with one to three of up to five classes, every class in at least one sample."""
    classes = draw(st.integers(2, 5))
    more = draw(st.lists(st.sets(st.integers(0, classes - 1), min_size=1, max_size=3), max_size=30))
    table = [{each} for each in range(classes)] + more
    members = [np.array([i for i, own in enumerate(table) if each in own]) for each in range(classes)]
    return ClassBalanced(members, size=len(table))


@st.composite
def samplings(draw: st.DrawFn) -> Sampling:
    samples, size = draw(st.integers(1, 30)), draw(st.integers(1, 40))
    if draw(st.booleans()):
        return draw(balanced())
    if draw(st.booleans()):
        return InTurn(samples, size)
    weights = np.array(draw(st.lists(st.floats(0.1, 9), min_size=samples, max_size=samples)))
    replacement = draw(st.booleans())
    return Weighted(weights, size if replacement else min(size, samples), replacement)


def passes(sampling: Sampling, count: int, seed: int = 3) -> list[tuple[int, int]]:
    """The (sample, draw) of some passes."""
    parts = [sampling.drawn(seed=seed, dataset="d", number=number) for number in range(count)]
    return [pair for indices, draws in parts for pair in zip(indices.tolist(), draws.tolist(), strict=True)]


@quick
@given(samplings(), st.integers(0, 2**32))
def test_no_sample_is_drawn_twice_with_the_same_draw(sampling: Sampling, seed: int) -> None:
    pairs = passes(sampling, 6, seed)
    assert len(set(pairs)) == len(pairs) == 6 * sampling.size
    assert pairs == passes(sampling, 6, seed)


@quick
@given(balanced(), st.integers(1, 12))
def test_classes_are_drawn_equally_often_and_their_samples_in_turn(sampling: ClassBalanced, count: int) -> None:
    drawn = [index for index, _ in passes(sampling, count)]
    classes = len(sampling.members)
    # In each round of as many draws as there are classes, one draw stands for each of them.
    for start in range(0, len(drawn) - classes + 1, classes):
        left = list(drawn[start : start + classes])
        assert all(set(members.tolist()) & set(left) for members in sampling.members)
    only = [
        members
        for members in sampling.members
        if all(Counter(np.concatenate(sampling.members))[i] == 1 for i in members)
    ]
    for members in only:
        times = [drawn.count(sample) for sample in members.tolist()]
        assert max(times) - min(times) <= 1
        assert abs(sum(times) - len(drawn) / classes) <= 1


@quick
@given(samplings(), st.integers(1, 5), st.integers(1, 3), st.integers(0, 3), st.data())
def test_a_resumed_epoch_and_other_ranks_draw_the_same(
    sampling: Sampling, batch: int, world: int, epoch: int, data: st.DataObject
) -> None:
    def plan(epoch: int, *, world: int = 1, rank: int = 0, batch: int = batch * world) -> list[list[tuple[int, int]]]:
        planned = plan_epoch(
            {"d": 1}, {"d": batch}, Mixture(), seed=5, epoch=epoch, world=world, rank=rank, samplings={"d": sampling}
        )
        return [list(zip(b.indices[: b.real], b.draws[: b.real], strict=True)) for b in planned]

    alone = plan(epoch)
    # All epochs up to this one are the passes in order: nothing is lost or repeated between them.
    whole = [pair for number in range(epoch + 1) for part in plan(number) for pair in part]
    assert whole == passes(sampling, epoch + 1, seed=5)
    ranks = [plan(epoch, world=world, rank=rank, batch=batch) for rank in range(world)]
    assert [[pair for part in parts for pair in part] for parts in zip(*ranks, strict=True)] == alone
    start = data.draw(st.integers(0, len(alone)))
    planned = plan_epoch({"d": 1}, {"d": batch * world}, Mixture(), seed=5, epoch=epoch, samplings={"d": sampling})
    resumed = [list(zip(b.indices, b.draws, strict=True)) for (b,) in planned.steps_from(start)]
    assert resumed == alone[start:]


@quick
@given(st.integers(1, 30), st.integers(0, 4))
def test_without_a_sampling_a_pass_is_a_permutation(samples: int, number: int) -> None:
    indices, draws = InTurn(samples, samples).drawn(seed=1, dataset="d", number=number)
    assert np.array_equal(indices, shuffled(samples, seed=1, dataset="d", number=number))
    assert (draws == number).all()


def test_weights_are_odds() -> None:
    drawn = Counter(index for index, _ in passes(Weighted(np.array([1.0, 0.0, 3.0]), 400, replacement=True), 10))
    assert drawn[1] == 0 and abs(drawn[2] / drawn[0] - 3) < 0.4
