"""The check before a run: in a process of its own, once for each state of config and data."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rslp.config import pick
from rslp.errors import RunError
from rslp.io import dump_yaml, is_remote, paths_in, read_json, resolve_paths, with_checksum, write_json
from rslp.rundir import RunDir
from rslp.runtime.children import die_with_parent

_STACK = ("torch", "lightning", "rslearn")
_VERSIONED = ("rslp", "rslearn", "torch", "lightning", "jsonargparse")
_OPTIONS = {"CHECKPOINT_PATH": "helios_checkpoint_path"}
_INTERRUPTED = 130


def ensure_checked(
    config_paths: Sequence[str],
    *,
    config: Mapping[str, Any],
    run: RunDir,
    constants: Mapping[str, Any],
    here: bool,
    allow: Sequence[str] = (),
) -> None:
    """Check a run config and its data before a run, unless that was done.

    What was checked is kept in the run directory: the same config over data that looks the same is not checked again.
    Nor is a run that goes on, with the config that it was started with.

    Args:
        config_paths: the run configs as the user named them, so that faults are told at their places.
        config: what they say together, with paths as the run directory sees them.
        run: the run directory; nothing but the record of a check that passed is written, and only there.
        constants: values of placeholders, by their names in capitals.
        allow: ids of findings that are no errors.
        here: whether the job runs on this machine; elsewhere, data may be that this machine does not have.

    Raises:
        RunError: the check found errors (it has told them), or could not be done.
        ConfigError: an environment variable that a path needs is not set.
    """
    if _goes_on(run, config):
        return
    if lacking := [name for name in _STACK if importlib.util.find_spec(name) is None]:
        _say(f"the check is skipped: {', '.join(lacking)} not installed here")
        return
    resolved = resolve_paths(config, run.path)
    words = [f"--allow+={one}" for one in allow]
    if not here and (absent := [path for path in paths_in(resolved) if _is_absent(path)]):
        if set(absent) - set(_dataset_paths(resolved)):
            _say(f"the check is skipped: {absent[0]} is not on this machine; `helios check` can be run where it is")
            return
        _say(f"the check leaves out the data: {absent[0]} is not on this machine")
        words += ["--data", "false"]
    state = check_fingerprint(resolved, words=words)
    if _passed(run) == state:
        return
    if is_remote(run.location):
        # Where every word costs a journey, a run that is sent again is checked again.
        _run_check([*_named(config_paths, constants), *words])
        return
    _refuse_unwritable(run)
    _run_check([*_named(config_paths, constants), *words])
    write_json(run.check, {"passed": state, **_allowed(config)})


def check_fingerprint(config: Mapping[str, Any], *, words: Sequence[str] = ()) -> str:
    """Say in one word on what the outcome of a check depends, as far as can be told without reading data.

    That is the config, the versions of the libraries, and of every file and dataset that the config names size and time
    of change: of a dataset the ``config.json`` and the lists of its windows. What changed within a window is not seen.

    Args:
        config: the run config, its paths resolved.
        words: options of the check.
    """
    versions = {name: importlib.metadata.version(name) for name in _VERSIONED}
    stamps = {path: _stamp(Path(path)) for path in paths_in(config)}
    text = json.dumps([config, versions, stamps, list(words)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _stamp(path: Path) -> Any:
    """Size and time of change of a file; of a folder those of what lies in it, and of the groups of windows."""
    if not path.is_dir():
        return _size_and_time(path) if path.exists() else None
    # Libraries keep notes of their own in hidden files and journals; they say nothing of the data.
    listed = [one for one in sorted(path.iterdir()) if not one.name.endswith(("-wal", "-shm"))]
    if (windows := path / "windows").is_dir():
        listed += sorted(windows.iterdir())
    return {str(one.relative_to(path)): _size_and_time(one) for one in listed if not one.name.startswith(".")}


def _size_and_time(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        # A link that leads nowhere.
        return None
    return status.st_size, status.st_mtime_ns


def _goes_on(run: RunDir, config: Mapping[str, Any]) -> bool:
    """Whether there is a checkpoint to go on from, of this very config."""
    text = dump_yaml(config)
    same = run.config.is_file() and run.config.read_bytes() in (with_checksum(text).encode(), text.encode())
    return same and run.last.exists()


def _passed(run: RunDir) -> str | None:
    try:
        return str((read_json(run.check) or {}).get("passed"))
    except RunError as error:
        _say(f"warning: {error}; it is checked again")
        return None


def _refuse_unwritable(run: RunDir) -> None:
    """Nobody should wait for a check to hear that the run has no place.

    Raises:
        RunError: the run directory can't be made.
    """
    there = next(folder for folder in (run.path, *run.path.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        reason = "no folder" if not there.is_dir() else "no permission"
        raise RunError(f"{run.path} can't be written: {there}: {reason}; RSLP_PREFIX says where runs lie")


def _run_check(words: Sequence[str]) -> None:
    """Run the check in this terminal; it imports the training stack, which this process does without.

    Raises:
        RunError: it found errors, or came to no end.
    """
    sys.stdout.flush()
    _say("checking config and data")
    command = [sys.executable, "-m", "rslp.main", "helios", "check", *words]
    # The check is one process, also inside a job of several.
    environment = {name: value for name, value in os.environ.items() if name != "RSLP_RANKS"}
    code = subprocess.run(command, check=False, env=environment, preexec_fn=die_with_parent()).returncode
    if code in (_INTERRUPTED, -2):
        raise KeyboardInterrupt
    if code == RunError.exit_code:
        raise RunError("the check found errors, so nothing was started; `--check false` leaves it out")
    if code:
        raise RunError(f"the check itself failed (exit code {code}, see above); `--check false` leaves it out")


def _allowed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of findings that the run's config allows, by dataset, for the record."""
    allowed = pick(config, ("data", "init_args", "check_allow"))
    return {"allowed": allowed} if allowed else {}


def _named(config_paths: Sequence[str], constants: Mapping[str, Any]) -> list[str]:
    words = [f"--config_paths+={path}" for path in config_paths]
    return [*words, *(f"--{_OPTIONS.get(name, name.lower())}={value}" for name, value in constants.items())]


def _dataset_paths(config: Mapping[str, Any]) -> list[str]:
    modules = pick(config, ("data", "init_args", "data_modules"))
    found = [pick(module, ("init_args", "path")) for module in modules.values()] if isinstance(modules, Mapping) else []
    return [path for path in found if isinstance(path, str)]


def _is_absent(path: str) -> bool:
    return path.startswith("/") and not Path(path).exists()


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
