"""Writes the example folder: all of it, or nothing."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from rich.progress import Progress

from rslp.errors import UsageError, UserError
from rslp.example import bundle, oracle, preview, windows

STAMP = "example.json"
# Weight of the encoder and of the pictures in the progress bar, in windows.
_REST = 40


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What an example folder was made from; the same recipe gives the same bytes.

    Attributes:
        seed: seed of everything random.
        size: factor on the number of windows.
        version: version of the package.
    """

    seed: int
    size: float
    version: str


@dataclass(frozen=True, kw_only=True)
class Built:
    """What became of a request for an example folder.

    Attributes:
        path: the folder.
        windows: number of windows written, 0 if the folder was there already.
        oracles: bounds and floors, by dataset.
    """

    path: Path
    windows: int
    oracles: dict[str, oracle.Oracle]


def build(
    path: Path, *, size: float = 1.0, seed: int = 0, overwrite: bool = False, workers: int | None = None
) -> Built:
    """Write the example: four datasets, their configs, a small encoder, pictures.

    Args:
        path: the folder to make.
        size: factor on the number of windows, 0.01 to 100; 1 fits a few minutes of training on two cores.
        seed: seed of everything random, 0 or more.
        overwrite: replace an example that is there already and is another one.
        workers: worker processes, 0 to write in this one; by default one per core, at most 8.

    Returns:
        What was done.

    Raises:
        UsageError: if an argument is out of range.
        UserError: if the folder exists and is another example, or none.
    """
    _check(size, seed, workers)
    recipe = Recipe(seed=seed, size=float(size), version=version("rslp"))
    target = path.resolve()
    if _there(path, recipe, overwrite):
        return Built(path=path, windows=0, oracles=oracle.read(path))
    half = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        half.mkdir(parents=True)
        count = _write(half, recipe, workers if workers is not None else min(os.cpu_count() or 1, 8))
        oracles = oracle.read(half)
        _swap(half, target)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return Built(path=path, windows=count, oracles=oracles)


def _check(size: float, seed: int, workers: int | None) -> None:
    if not 0.01 <= size <= 100:
        raise UsageError(f"size must be between 0.01 and 100, got {size}")
    if seed < 0:
        raise UsageError(f"seed must be 0 or more, got {seed}")
    if workers is not None and workers < 0:
        raise UsageError(f"workers must be 0 or more, got {workers}")


def _there(path: Path, recipe: Recipe, overwrite: bool) -> bool:
    """Return whether a finished example of this recipe is there; refuse to touch what is no example."""
    stamp = path / STAMP
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return False
    if not stamp.is_file():
        raise UserError(f"{path}: exists and is no example; name another folder with --path")
    try:
        found = Recipe(**json.loads(stamp.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        found = None
    if found == recipe:
        return True
    if overwrite:
        return False
    if found is None:
        raise UserError(f"{stamp}: is broken; --overwrite true writes the example anew")
    raise UserError(
        f"{path}: is an example with size {found.size:g} and seed {found.seed} (version {found.version}), "
        f"asked for was size {recipe.size:g} and seed {recipe.seed} (version {recipe.version}); "
        "--overwrite true replaces it, --path names another folder"
    )


def _swap(half: Path, target: Path) -> None:
    """Put the finished folder in its place."""
    if not target.exists():
        half.rename(target)
        return
    old = half.with_suffix(".old")
    target.rename(old)
    half.rename(target)
    shutil.rmtree(old)


def _write(root: Path, recipe: Recipe, workers: int) -> int:
    """Write everything below ``root``; returns the number of windows."""
    entries: list[oracle.Entry] = []
    with Progress(transient=True) as progress:
        portions = windows.create(root, size=recipe.size, seed=recipe.seed)
        task = progress.add_task("Writing the example", total=sum(map(len, portions)) + _REST)
        for written in windows.write(root, portions, seed=recipe.seed, workers=workers):
            entries.extend(written)
            progress.advance(task, len(written))
        oracle.write(root, entries)
        _copy_configs(root)
        bundle.write(root / "encoder", seed=recipe.seed)
        progress.advance(task, _REST / 2)
        preview.draw(root)
        progress.advance(task, _REST / 2)
    (root / STAMP).write_text(json.dumps(asdict(recipe), indent=2) + "\n", encoding="utf-8")
    return len(entries)


def _copy_configs(root: Path) -> None:
    for source in sorted(files("rslp.example").joinpath("configs").iterdir(), key=lambda source: source.name):
        if source.name.endswith(".yaml"):
            (root / source.name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
