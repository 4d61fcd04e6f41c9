"""Put a run's config in its place: only if it can be used, only if nobody trains with another, and else nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from rslp.class_paths import refuse_untrusted
from rslp.compose import merge_configs, refuse_unrunnable
from rslp.errors import RunError, UsageError
from rslp.files import dump_yaml, full_disk, read_yaml, relativise_paths, with_checksum, write_atomic
from rslp.launch.job import Mode
from rslp.run import RunDir


def merged_config(config_paths: Sequence[str], *, run: RunDir, constants: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the run, with paths as its directory sees them.

    Args:
        config_paths: the configs, later ones over earlier ones.
        run: the run directory.
        constants: what fills placeholders.

    Raises:
        ConfigError: a config is missing or broken, or is none that a run can be started with.
    """
    if not config_paths:
        raise UsageError("--config_paths is empty: name the run config that make_multidataset_config wrote")
    documents = [read_yaml(path) for path in config_paths]
    notes: list[str] = []
    merged = relativise_paths(merge_configs(documents, constants, notes=notes), run.location)
    sys.stderr.writelines(f"note: {note}\n" for note in notes)
    refuse_unrunnable(merged, name=", ".join(document.name for document in documents))
    refuse_untrusted(merged, documents)
    return {**merged, "rslp_project": run.project, "rslp_experiment": run.experiment}


@contextmanager
def settled(run: RunDir, config: Mapping[str, Any], *, mode: Mode = "fit") -> Iterator[None]:
    """Give a run its config while it is submitted; if that fails, everything is as before.

    Args:
        run: the run directory; it is locked, so that a training in it keeps its config.
        config: the config.
        mode: what the run is submitted for; a prediction has a config and a lock of its own.

    Raises:
        RunError: another process trains in this directory, or it can't be written.
    """
    made = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
    locks = [path for path in (run.lock, run.prediction_lock) if not path.exists()]
    target = run.config_of(mode)
    try:
        with ExitStack() as stack:
            former = _write(run, config, mode=mode, stack=stack)
            try:
                yield
            except BaseException:
                _restore(target, former)
                raise
    except BaseException:
        _remove(made, locks=locks)
        raise


def _write(run: RunDir, config: Mapping[str, Any], *, mode: Mode, stack: ExitStack) -> bytes | None:
    """Lock the run and write its config; what was there before."""
    target = run.config_of(mode)
    try:
        stack.enter_context(run.locked(mode))
        former = target.read_bytes() if target.exists() else None
        write_atomic(target, with_checksum(dump_yaml(config)))
    except OSError as error:
        what = f"{run.path} can't be written: {error.strerror}; RSLP_PREFIX says where runs lie"
        raise full_disk(error, target) or RunError(what) from error
    return former


def _restore(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink(missing_ok=True)
    else:
        write_atomic(path, content)


def _remove(folders: Sequence[Path], *, locks: Sequence[Path]) -> None:
    """Take away what was made, as far as nobody else has put something there."""
    with suppress(OSError):
        for lock in locks:
            lock.unlink(missing_ok=True)
        for folder in folders:
            folder.rmdir()
