"""Damage to all files that a real run leaves in its caches: ``python -m tests.train.cache_damage FOLDER --cases 300``.

A real run of a frozen encoder fills the sample cache and the feature cache of a dataset. Each case puts them back as
they were, damages one file and starts three times: each start reads all samples, the floors and all kept features, and
makes anew what is missing, as a run does. Values are compared bit for bit with what rslearn reads and the encoder gave;
by the third start the caches must be whole again.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import platform
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rslp import upstream
from rslp.data.cache.segments import read_entries
from rslp.data.datamodule import MultiDatasetDataModule
from rslp.data.features.cache import FeatureCache, FeatureCacheWriter
from rslp.data.features.codec import CachedBatch, CachedSample
from rslp.data.samples import SampleSource
from rslp.errors import RunError, UserError
from rslp.rundir import RunDir
from rslp.train.baselines import fit_baselines
from rslp.train.build import build
from rslp.train.fit import fit
from tests.data.cache.places import assert_same
from tests.tiny import run_config, write_dataset, write_run

NAME = "classify"
FREEZE = {"class_path": "rslp.train.Freeze", "init_args": {}}
Rng = random.Random


def flip(path: Path, rng: Rng) -> None:
    raw = bytearray(path.read_bytes())
    if raw:
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def cut(path: Path, rng: Rng) -> None:
    if size := path.stat().st_size:
        os.truncate(path, rng.randrange(size))


def hole(path: Path, rng: Rng) -> None:
    """Zeros where a full disk or a crash let nothing arrive."""
    raw = bytearray(path.read_bytes())
    if raw:
        start, stop = sorted((rng.randrange(len(raw)), rng.randrange(len(raw))))
        raw[start : stop + 1] = bytes(stop + 1 - start)
    path.write_bytes(raw)


def empty(path: Path, rng: Rng) -> None:
    path.write_bytes(b"")


def lost(path: Path, rng: Rng) -> None:
    path.unlink()


def longer(path: Path, rng: Rng) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 200)))


def swapped_bytes(path: Path, rng: Rng) -> None:
    """As a machine of the other byte order would write it."""
    raw = path.read_bytes()
    path.write_bytes(b"".join(raw[at : at + 8][::-1] for at in range(0, len(raw), 8)))


def other_format(path: Path, rng: Rng) -> None:
    path.write_bytes(b"rslpcol1" + path.read_bytes()[8:])


def of_another(path: Path, rng: Rng) -> None:
    """Another file of its kind in its place, as when a copy went wrong."""
    others = [one for one in sorted(path.parent.glob(f"*{path.suffix}")) if one != path and one.is_file()]
    path.write_bytes(rng.choice(others).read_bytes() if others else rng.randbytes(path.stat().st_size))


def folder(path: Path, rng: Rng) -> None:
    path.unlink()
    path.mkdir()


def unreadable(path: Path, rng: Rng) -> None:
    """For anybody but root."""
    path.chmod(0)


DAMAGES: tuple[Callable[[Path, Rng], None], ...] = (
    flip,
    cut,
    hole,
    empty,
    lost,
    longer,
    swapped_bytes,
    other_format,
    of_another,
    folder,
    unreadable,
)
# What whoever did it has to undo; it is said at each start.
LASTING = (folder, unreadable)


@dataclass
class Truth:
    """What a run reads, from the dataset itself and from the encoder.

    Attributes:
        path: the dataset.
        pristine: a copy of its caches.
        config: the run that filled them.
        modules: the dataset as the run config describes it.
        samples: by split.
        floors: the best constants.
        features: by the name of the folder of kept features, the split and what is kept of each of its samples.
        run: the run.
    """

    path: Path
    pristine: Path
    config: dict[str, Any]
    modules: dict[str, Any]
    samples: dict[str, list[Any]]
    floors: Any
    features: dict[str, tuple[str, list[CachedBatch]]]
    run: RunDir

    @property
    def caches(self) -> Path:
        return self.path / ".rslp-store"

    def files(self) -> list[Path]:
        """Every file of the caches, whatever it is for."""
        return sorted(path.relative_to(self.pristine) for path in self.pristine.rglob("*") if path.is_file())

    def put_back(self) -> None:
        shutil.rmtree(self.caches, ignore_errors=True)
        shutil.copytree(self.pristine, self.caches)


def kind_of(file: Path) -> str:
    """What a file is, as a word."""
    cache = "feature cache" if file.parts[0] == "features" else "sample cache"
    return f"{cache}, {file.suffix or file.name}"


def config_of(path: Path, *, epochs: int = 3, **data: Any) -> dict[str, Any]:
    config = run_config({NAME: (str(path), NAME)}, epochs=epochs, frozen_views=1, **data)
    config["trainer"] |= {"callbacks": [copy.deepcopy(FREEZE)], "enable_progress_bar": False}
    return config


def prepared(root: Path) -> Truth:
    """Fill the caches by a real run, let one record of each be found damaged and be made anew, and keep a copy."""
    path = write_dataset(root / "data" / NAME, NAME, train=3, val=2, test=1)
    config = config_of(path)
    run = write_run(root / "first", config)
    assert fit(run) == 0
    modules = build(run, training=False).datamodule.data_modules
    plain = MultiDatasetDataModule(modules, num_workers=0, store="off")
    samples = {split: [one.sample(i) for i in range(len(one))] for split, one in sources(plain).items()}
    floors = fit_baselines(plain.sources("train"))
    truth = Truth(path, root / "pristine", config, modules, samples, floors, {}, run)
    for split, source in sources(MultiDatasetDataModule(modules, num_workers=0)).items():
        for place in sorted(truth.caches.glob("features/*")):
            bank = opened(place, source)
            if bank.is_complete():
                found = [bank.read([(index, 0)]) for index in range(len(source))]
                truth.features[place.name] = (split, [one for one in found if one is not None])
            bank.close()
    assert sorted(split for split, _ in truth.features.values()) == ["train", "val"]
    for cache in (truth.caches, truth.caches / "features" / min(truth.features)):
        (segment, *_) = sorted(cache.glob("data/*.seg"))
        entry = next(
            e
            for path in sorted(cache.glob("*.cat"))
            for e in read_entries(path)[0]
            if e["segment"] == int(segment.stem, 16)
        )
        raw = bytearray(segment.read_bytes())
        raw[int(entry["offset"])] ^= 1
        segment.write_bytes(raw)
    for _ in range(3):
        said = start(truth)
    assert not said and len(list(truth.caches.rglob("*.bad"))) == 2
    shutil.copytree(truth.caches, truth.pristine)
    return truth


def sources(module: MultiDatasetDataModule) -> dict[str, SampleSource]:
    return {split: module.sources(split)[NAME] for split in ("train", "val")}


def opened(place: Path, source: SampleSource) -> FeatureCache:
    return FeatureCache(place, source=source, views=1)


@contextmanager
def heard() -> Iterator[list[str]]:
    """The lines that a person sees meanwhile."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("rslp")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def start(truth: Truth, *, direct: Callable[[], None] = lambda: None) -> list[str]:
    """Read everything as a run does, compare it, and make anew what is missing; the lines that were said.

    Args:
        truth: what is to be read.
        direct: called when the dataset itself is read for a sample.
    """
    read = upstream.read_inputs

    def noticed(*args: Any, **kwargs: Any) -> Any:
        direct()
        return read(*args, **kwargs)

    with heard() as lines, patch.object(upstream, "read_inputs", noticed):
        module = MultiDatasetDataModule(truth.modules, num_workers=0)
        module.cache_settings = module.cache_settings.__class__(workers=0)
        for split, source in sources(module).items():
            for index, expected in enumerate(truth.samples[split]):
                assert_same(source.sample(index), expected)
        assert fit_baselines(module.sources("train")) == truth.floors
        for name, (split, expected) in truth.features.items():
            read_features(truth.caches / "features" / name, sources(module)[split], expected)
    return lines


def read_features(place: Path, source: SampleSource, expected: list[CachedBatch]) -> None:
    """Read kept features; encode anew, for which their true values stand in, what is not kept."""
    try:
        bank = opened(place, source)
    except (OSError, RunError) as error:
        # What the stage of the frozen encoder says in one line; each batch is encoded as it comes.
        logging.getLogger("rslp.data.features").warning("dataset %r: %s", source.name, error)
        return
    keys = [(index, 0) for index in range(len(expected))]
    for again in (False, True):
        for key, one in zip(keys, expected, strict=True):
            found = bank.read([key])
            if found is not None:
                assert_same(found, one)
        if again or not bank.missing(keys):
            break
        writer = FeatureCacheWriter(bank)
        for (index, view), one in zip(keys, expected, strict=True):
            if (index, view) in bank.missing(keys):
                writer.add(index, view, CachedSample(one.features, one.inputs[0], one.targets[0], one.metadatas[0]))
        writer.publish()
        writer.close()
        bank = bank.reopened()
    bank.close()


def case(truth: Truth, file: Path, damage: Callable[[Path, Rng], None], rng: Rng) -> str:
    """Damage a file; what came of it, in a word.

    Raises:
        AssertionError: a value was wrong, or the caches were not whole again by the third start.
    """
    truth.put_back()
    damage(truth.caches / file, rng)
    try:
        first, second = start(truth), start(truth)
        straight: list[int] = []
        third = start(truth, direct=lambda: straight.append(1))
    except UserError as error:
        assert "\n" not in str(error) and str(truth.caches / file) in str(error), error
        return "stopped with one line"
    assert all(NAME in line and ".rslp-store" in line for line in first + second), first
    if damage in LASTING and third:
        assert len(third) <= 3, third
        return "read without it, said at each start"
    assert len(first + second) <= 1, first + second
    assert not third, third
    assert not straight, "the dataset itself is read for ever"
    return "made anew, one line" if first + second else "made anew without a line, or of no effect"


def cases(truth: Truth, count: int, *, seed: int) -> Iterator[tuple[Path, str, str]]:
    """File, damage and outcome of so many cases: each kind of damage to each kind of file, then flips and cuts.

    Args:
        truth: the caches.
        count: how many.
        seed: of all draws.
    """
    rng = Rng(seed)
    by_kind: dict[str, list[Path]] = {}
    for file in truth.files():
        by_kind.setdefault(kind_of(file), []).append(file)
    pairs = [(kind, damage) for damage in DAMAGES for kind in sorted(by_kind)]
    filled = [
        kind for kind, files in sorted(by_kind.items()) if any((truth.pristine / f).stat().st_size for f in files)
    ]
    while len(pairs) < count:
        pairs += [(kind, damage) for kind in filled for damage in (flip, cut)]
    for kind, damage in pairs[:count]:
        file = rng.choice(by_kind[kind])
        yield file, damage.__name__, case(truth, file, damage, rng)


def record(found: Iterable[tuple[Path, str, str]], *, seed: int) -> str:
    """The page with the counts."""
    outcomes: dict[str, Counter[str]] = {}
    for file, _, outcome in found:
        outcomes.setdefault(kind_of(file), Counter())[outcome] += 1
    columns = sorted({outcome for counter in outcomes.values() for outcome in counter})
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "numpy", "rslearn", "xxhash"))
    lines = [
        "# Damage to the caches",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, seed {seed}; Python {platform.python_version()}, {packages}. Written by",
        "`make test-long` (`tests/train/cache_damage.py`).",
        "",
        "A real run fills both caches. Each case damages one file and starts three times. Every value is compared bit",
        "for bit with what rslearn reads and the encoder gave; by the third start nothing is said, and nothing is read",
        "past the caches. Files without content (locks) are among those that may change without effect.",
        f"Damages: {', '.join(damage.__name__.replace('_', ' ') for damage in DAMAGES)}.",
        "",
        f"| file | cases | {' | '.join(columns)} | wrong values | tracebacks |",
        f"|---|{'---|' * (len(columns) + 3)}",
    ]
    total = sum(outcomes.values(), Counter())
    for kind, counter in [*sorted(outcomes.items()), ("all", total)]:
        numbers = " | ".join(str(counter[column]) for column in columns)
        lines.append(f"| {kind} | {sum(counter.values())} | {numbers} | 0 | 0 |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="the page to write")
    given = parser.parse_args()
    found = []
    for file, damage, outcome in cases(prepared(given.folder), given.cases, seed=given.seed):
        print(json.dumps([str(file), damage, outcome]), flush=True)  # noqa: T201
        found.append((file, damage, outcome))
    if given.record:
        given.record.write_text(record(found, seed=given.seed))


if __name__ == "__main__":
    main()
