"""The check before a run: in a process of its own, and not again while config and data are unchanged."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rslp.config import pick
from rslp.errors import INTERRUPTED, RunError
from rslp.io import dump_yaml, is_remote, paths_in, read_json, resolve_paths, with_checksum, write_json
from rslp.io.terminal import print_message
from rslp.rundir import RunDir
from rslp.runtime.children import die_with_parent

_TRAINING_STACK = ("torch", "lightning", "rslearn")
_VERSIONED_PACKAGES = ("rslp", "rslearn", "torch", "lightning", "jsonargparse")
_OPTION_NAMES = {"CHECKPOINT_PATH": "helios_checkpoint_path"}


def ensure_checked(
    config_paths: Sequence[str],
    *,
    config: Mapping[str, Any],
    run: RunDir,
    constants: Mapping[str, Any],
    here: bool,
    allow: Sequence[str] = (),
) -> None:
    """Check a run config and its data before a run, unless the same check has passed before.

    The fingerprint of a passed check is written to the run directory. A run that resumes with an unchanged config is
    not checked.

    Args:
        config_paths: the run configs as the user named them: messages name their files and lines.
        config: the merged config; its relative paths start from the run directory.
        run: the run directory; only the record of a passed check is written there.
        constants: values of placeholders, by their names in capitals.
        here: whether the job sees this machine's files, as on SLURM; otherwise data may be missing on this one alone.
        allow: ids of findings that are no errors.

    Raises:
        RunError: the check found errors, which it has printed, or it failed itself.
        ConfigError: an environment variable in a path is not set.
    """
    if _resumes(run, config):
        return
    if missing := [name for name in _TRAINING_STACK if importlib.util.find_spec(name) is None]:
        print_message(f"the check is skipped: {', '.join(missing)} not installed here")
        return
    resolved = resolve_paths(config, run.path)
    options = [f"--allow+={finding_id}" for finding_id in allow]
    if not here and (absent := [path for path in paths_in(resolved) if _is_absent(path)]):
        if set(absent) - set(_dataset_paths(resolved)):
            print_message(
                f"the check is skipped: {absent[0]} is not on this machine; `helios check` can be run where it is"
            )
            return
        print_message(f"the check leaves out the data: {absent[0]} is not on this machine")
        options += ["--data", "false"]
    fingerprint = check_fingerprint(resolved, options=options)
    if _passed(run) == fingerprint:
        return
    options = [*_config_options(config_paths, constants), *options]
    if is_remote(run.location):
        # There is no record of it in the store: a run that is submitted again is checked again.
        _run_check(options)
        return
    _ensure_writable(run)
    _run_check(options)
    # For the record, also the ids of findings that the config allows, by dataset.
    allowed = pick(config, ("data", "init_args", "check_allow"))
    write_json(run.check, {"passed": fingerprint, **({"allowed": allowed} if allowed else {})})


def check_fingerprint(config: Mapping[str, Any], *, options: Sequence[str] = ()) -> str:
    """Hash what the outcome of a check depends on, without reading data.

    That is the config, the versions of the libraries, and size and time of change of every file that the config names;
    of a dataset, those of ``config.json`` and of the folders of its windows. Changes within a window are not noticed.

    Args:
        config: the run config, its paths resolved.
        options: options of the check.
    """
    versions = {name: importlib.metadata.version(name) for name in _VERSIONED_PACKAGES}
    stamps = {path: _stamp(Path(path)) for path in paths_in(config)}
    text = json.dumps([config, versions, stamps, list(options)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _stamp(path: Path) -> Any:
    """Size and time of change of a file; of a folder, those of its entries and of its groups of windows."""
    if not path.is_dir():
        return _size_and_time(path) if path.exists() else None
    # Hidden files and journals of databases are the libraries' own, and change without the data.
    entries = [entry for entry in sorted(path.iterdir()) if not entry.name.endswith(("-wal", "-shm"))]
    if (windows := path / "windows").is_dir():
        entries += sorted(windows.iterdir())
    return {str(entry.relative_to(path)): _size_and_time(entry) for entry in entries if not entry.name.startswith(".")}


def _size_and_time(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        # A broken link.
        return None
    return status.st_size, status.st_mtime_ns


def _resumes(run: RunDir, config: Mapping[str, Any]) -> bool:
    """Whether the run has a checkpoint to resume from, and the same config."""
    text = dump_yaml(config)
    same = run.config.is_file() and run.config.read_bytes() in (with_checksum(text).encode(), text.encode())
    return same and run.last.exists()


def _passed(run: RunDir) -> str | None:
    """The fingerprint of the last check that has passed."""
    try:
        return str((read_json(run.check) or {}).get("passed"))
    except RunError as error:
        print_message(f"warning: {error}; it is checked again")
        return None


def _ensure_writable(run: RunDir) -> None:
    """Raise ``RunError`` if the run directory can't be made, before the check, which takes longer."""
    existing = next(folder for folder in (run.path, *run.path.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        reason = "no folder" if not existing.is_dir() else "no permission"
        raise RunError(f"{run.path} can't be written: {existing}: {reason}; RSLP_PREFIX says where runs lie")


def _run_check(options: Sequence[str]) -> None:
    """Run the check as a process, since it imports the training stack; raise ``RunError`` if it ends with errors."""
    sys.stdout.flush()
    print_message("checking config and data")
    command = [sys.executable, "-m", "rslp.main", "helios", "check", *options]
    # The check is one process, also inside a job of several.
    environment = {name: value for name, value in os.environ.items() if name != "RSLP_RANKS"}
    code = subprocess.run(command, check=False, env=environment, preexec_fn=die_with_parent()).returncode
    if code in (INTERRUPTED, -signal.SIGINT):
        raise KeyboardInterrupt
    if code == RunError.exit_code:
        raise RunError("the check found errors, so nothing was started; `--check false` leaves it out")
    if code:
        raise RunError(f"the check itself failed (exit code {code}, see above); `--check false` leaves it out")


def _config_options(config_paths: Sequence[str], constants: Mapping[str, Any]) -> list[str]:
    """The options of the check that name the configs and the values of their placeholders."""
    options = [f"--config_paths+={path}" for path in config_paths]
    return [*options, *(f"--{_OPTION_NAMES.get(name, name.lower())}={value}" for name, value in constants.items())]


def _dataset_paths(config: Mapping[str, Any]) -> list[str]:
    modules = pick(config, ("data", "init_args", "data_modules"))
    paths = [pick(module, ("init_args", "path")) for module in modules.values()] if isinstance(modules, Mapping) else []
    return [path for path in paths if isinstance(path, str)]


def _is_absent(path: str) -> bool:
    return path.startswith("/") and not Path(path).exists()
