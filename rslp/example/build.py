"""Write the example folder, completely or not at all."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from rich.progress import Progress

from rslp.errors import UsageError, UserError
from rslp.example import bundle, oracle, preview, windows
from rslp.io import new_folder, replace_folder

STAMP = "example.json"
# Weight of the encoder and of the pictures in the progress bar, in windows.
_REST = 40


@dataclass(frozen=True, kw_only=True)
class ExampleSettings:
    """What the content of an example folder depends on; equal settings give the same bytes.

    Attributes:
        seed: seed of all random numbers.
        size: factor on the number of windows.
        version: version of the package.
    """

    seed: int
    size: float
    version: str


@dataclass(frozen=True, kw_only=True)
class Built:
    """The result of ``build``.

    Attributes:
        path: the folder.
        windows: number of windows written, 0 if the same example existed already.
        oracles: bounds and baselines, by dataset.
    """

    path: Path
    windows: int
    oracles: dict[str, oracle.Oracle]


def build(
    path: Path, *, size: float = 1.0, seed: int = 0, overwrite: bool = False, workers: int | None = None
) -> Built:
    """Write the example: four datasets, their configs, a small encoder, pictures.

    Args:
        path: the folder to write.
        size: factor on the number of windows, 0.01 to 100; 1 fits a few minutes of training on two cores.
        seed: seed of all random numbers, 0 or more.
        overwrite: replace an existing example with other settings.
        workers: worker processes, 0 to write in this one; by default one per core, at most 8.

    Raises:
        UsageError: if an argument is out of range.
        UserError: if the folder exists and is no example, or one with other settings.
    """
    _check(size, seed, workers)
    settings = ExampleSettings(seed=seed, size=float(size), version=version("rslp"))
    target = path.resolve()
    if _exists(path, settings, overwrite):
        return Built(path=path, windows=0, oracles=oracle.read(path))
    with new_folder(target) as half:
        count = _write(half, settings, workers if workers is not None else min(os.cpu_count() or 1, 8))
        oracles = oracle.read(half)
        replace_folder(target, half)
    return Built(path=path, windows=count, oracles=oracles)


def _check(size: float, seed: int, workers: int | None) -> None:
    if not 0.01 <= size <= 100:
        raise UsageError(f"size must be between 0.01 and 100, got {size}")
    if seed < 0:
        raise UsageError(f"seed must be 0 or more, got {seed}")
    if workers is not None and workers < 0:
        raise UsageError(f"workers must be 0 or more, got {workers}")


def _exists(path: Path, settings: ExampleSettings, overwrite: bool) -> bool:
    """Return whether a complete example with these settings exists; refuse to replace a folder that is no example."""
    stamp = path / STAMP
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return False
    if not stamp.is_file():
        raise UserError(f"{path}: exists and is no example; name another folder with --path")
    try:
        existing = ExampleSettings(**json.loads(stamp.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        existing = None
    if existing == settings:
        return True
    if overwrite:
        return False
    if existing is None:
        raise UserError(f"{stamp}: is broken; --overwrite true writes the example anew")
    raise UserError(
        f"{path}: is an example with size {existing.size:g} and seed {existing.seed} (version {existing.version}), "
        f"asked for was size {settings.size:g} and seed {settings.seed} (version {settings.version}); "
        "--overwrite true replaces it, --path names another folder"
    )


def _write(root: Path, settings: ExampleSettings, workers: int) -> int:
    """Write everything below ``root``; returns the number of windows."""
    entries: list[oracle.Entry] = []
    with Progress(transient=True) as progress:
        portions = windows.create(root, size=settings.size, seed=settings.seed)
        task = progress.add_task("Writing the example", total=sum(map(len, portions)) + _REST)
        for written in windows.write(root, portions, seed=settings.seed, workers=workers):
            entries.extend(written)
            progress.advance(task, len(written))
        oracle.write(root, entries)
        _copy_configs(root)
        bundle.write(root / "encoder", seed=settings.seed)
        progress.advance(task, _REST / 2)
        preview.draw(root)
        progress.advance(task, _REST / 2)
    (root / STAMP).write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")
    return len(entries)


def _copy_configs(root: Path) -> None:
    for source in sorted(files("rslp.example").joinpath("configs").iterdir(), key=lambda source: source.name):
        if source.name.endswith(".yaml"):
            (root / source.name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
