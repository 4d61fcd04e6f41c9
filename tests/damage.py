"""Damage to every file of a run directory, and what the commands that read the file make of it.

``python -m tests.damage FOLDER --cases 250 --seed 0`` makes a small run, finds out which file each command reads, and
then, again and again, spoils one file of a copy (a flipped bit, a cut, …) and runs the commands that read it, in this
process. No case may end in a traceback, and none may have another outcome than the undamaged run without a line that
names the file.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

from rslp.cli.main import main
from rslp.errors import UserError
from rslp.io import dump_yaml, read_json, with_checksum
from rslp.launch.record import SubmissionRecord, write_record
from rslp.rundir import RunDir
from rslp.train.checkpoints import read_checkpoint
from tests.tiny import run_config, write_dataset
from tests.train.starts import digest_of

WORDS = ("--rslp_project", "tests", "--experiment_id", "tiny")
# What is shown as it stands, to a person.
SHOWN = ("logs",)
# What builds no model.
CHEAP = ("jobs", "logs", "cancel", "launch", "launch untrained")


@dataclass(frozen=True)
class Place:
    """A folder with a dataset and a run that was trained on it."""

    folder: Path

    @property
    def run(self) -> RunDir:
        return RunDir(self.folder / "projects" / "tests" / "tiny")

    @property
    def source(self) -> Path:
        """The config that the run is launched with."""
        return self.folder / "OUT.yaml"


def make(folder: Path) -> Place:
    """A run that was trained for one epoch of the two that its config asks for now, evaluated, and partly predicted."""
    place = Place(folder)
    data = str(write_dataset(folder / "data", "classify", train=4, val=2, test=2))
    config = run_config({"classify": (data, "classify")}, epochs=2, store=str(folder / "caches"))
    config["trainer"]["enable_progress_bar"] = False
    saving = {"run_dir": str(place.run.path), "every_n_steps": 1}
    config["trainer"]["callbacks"] = [{"class_path": "rslp.train.checkpoints.RunCheckpoints", "init_args": saving}]
    place.source.write_text(dump_yaml(config))
    place.run.path.mkdir(parents=True)
    first = {**config, "trainer": {**config["trainer"], "max_epochs": 1}}
    place.run.config.write_text(with_checksum(dump_yaml(first)))
    place.run.logs.mkdir()
    (place.run.logs / "fit.log").write_text("going on\n")
    for name in ("resume", "evaluate"):
        assert run_command(name, place).code == 0
    assert run_command("launch", place).code == 0
    write_record(place.run, _record(place))
    shutil.copyfile(place.run.config, place.run.prediction_config)
    with mock.patch("rslp.evaluate.prediction.write_atomic", side_effect=KeyboardInterrupt):
        assert run_command("predict", place).code == 130
    return place


def write_twin(place: Place) -> None:
    """A second run beside it."""
    shutil.copytree(place.run.path, place.run.path.with_name("twin"))


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit code, what it printed, what it left; None for a traceback."""

    code: int | None
    out: str
    said: str
    left: Any = None


def _launched(place: Place) -> int:
    words = ["--config_paths+=" + str(place.source), *WORDS, "--local", "true"]
    passed = subprocess.CompletedProcess[bytes]((), 0)
    # The check, which is a process of its own, finds nothing; and this process does not become the job.
    with (
        mock.patch("rslp.launch.engines.local.LocalEngine.submit", return_value=(_record(place),)),
        mock.patch("rslp.launch.check_gate.subprocess.run", return_value=passed),
    ):
        return main(["helios", "launch_finetune", *words])


def _record(place: Place) -> SubmissionRecord:
    now, log = datetime.now(UTC).isoformat(), str(place.run.logs / "fit.log")
    return SubmissionRecord(engine="local", id="1@elsewhere@1", mode="fit", submitted=now, plan="", log=log)


def _job(*words: str) -> Callable[[Place], int]:
    return lambda place: main(["helios", "run", "--run_dir", str(place.run.path), *words])


def _settled(run: RunDir) -> Any:
    return run.config.read_text(), (read_json(run.check) or {}).get("passed")


def _trained(run: RunDir) -> Any:
    checkpoint = read_checkpoint(run.last)
    parts = {part: digest_of(checkpoint[part]) for part in ("state_dict", "optimizer_states", "epoch", "global_step")}
    return parts, run.metrics.read_text()


def _evaluated(*folders: str | None) -> Callable[[RunDir], Any]:
    def found(run: RunDir) -> Any:
        splits = ("val", "test") if "best" in folders else ("val",)
        rows = [json.loads(run.evaluation(split, folder).read_text()) for split in splits for folder in folders]
        return [{key: value for key, value in one.items() if key != "checkpoint_sha256"} for one in rows]

    return found


def _predicted(run: RunDir) -> Any:
    files = {str(path.relative_to(run.path)): path.read_text() for path in run.predictions.rglob("*.geojson")}
    told = json.loads(run.prediction_marker.read_text())
    return files, {key: value for key, value in told.items() if key != "checkpoint_sha256"}


def _without_last(act: Callable[[Place], int]) -> Callable[[Place], int]:
    def done(place: Place) -> int:
        if place.run.last.is_file():
            place.run.last.unlink()
        return act(place)

    return done


def _evaluated_otherwise(place: Place) -> int:
    return _job("--mode", "validate", "--checkpoint", str(place.run.best("classify")))(place)


COMMANDS: dict[str, tuple[Callable[[Place], int], Callable[[RunDir], Any]]] = {
    "resume": (_job(), _trained),
    "resume without last.ckpt": (_without_last(_job()), _trained),
    "evaluate": (_job("--mode", "test"), _evaluated("best", None)),
    "evaluate another": (_evaluated_otherwise, _evaluated("best-classify")),
    "predict": (_job("--mode", "predict"), _predicted),
    "launch": (_launched, _settled),
    "launch untrained": (_without_last(_launched), _settled),
    "jobs": (lambda _: main(["helios", "jobs"]), lambda _: None),
    "logs": (lambda _: main(["helios", "logs", *WORDS]), lambda _: None),
    "cancel": (lambda _: main(["helios", "cancel", *WORDS]), lambda _: None),
}


def run_command(name: str, place: Place) -> Outcome:
    """Run a command in this process, as its process would run."""
    act, left = COMMANDS[name]
    out, said, code = io.StringIO(), io.StringIO(), None
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(said),
        mock.patch.dict(os.environ, {"RSLP_PREFIX": str(place.folder)}),
    ):
        try:
            code = act(place)
        except BaseException:  # noqa: BLE001 - it is told, and counted
            traceback.print_exc()
    _listening.clear()
    printed = out.getvalue()
    if name == "jobs":
        # Without the age of the state.
        printed = "\n".join(" ".join(line.split()[:7]) for line in printed.splitlines())
    try:
        made = left(place.run) if code == 0 else None
    except (OSError, ValueError, UserError) as error:
        made = repr(error)
    return Outcome(code, printed, said.getvalue(), made)


_listening: list[set[str]] = []


def _note_open(event: str, arguments: Any) -> None:
    if event == "open" and _listening and isinstance(arguments[0], str | os.PathLike):
        mode, flags = arguments[1], arguments[2]
        reads = "r" in mode or "a" in mode if mode else not flags & (os.O_WRONLY | os.O_CREAT)
        if reads:
            _listening[0].add(os.fspath(arguments[0]))


sys.addaudithook(_note_open)


@contextlib.contextmanager
def copied(place: Place, folder: Path) -> Iterator[Place]:
    """The place, which is copied back afterwards: paths in files stay true."""
    aside = folder / "aside"
    shutil.copytree(place.run.path, aside)
    try:
        yield place
    finally:
        shutil.rmtree(place.run.path)
        aside.rename(place.run.path)


def readers(place: Place, folder: Path) -> tuple[dict[str, Outcome], dict[str, list[str]]]:
    """The outcome of each command on the undamaged run, and for each file of it the commands that open it."""
    names = [str(path.relative_to(place.run.path)) for path in sorted(place.run.path.rglob("*")) if path.is_file()]
    outcomes, found = {}, {name: list[str]() for name in names}
    for command in COMMANDS:
        with copied(place, folder):
            _listening.append(opened := set[str]())
            outcomes[command] = run_command(command, place)
        for name in names:
            if str(place.run.path / name) in opened:
                found[name].append(command)
    return outcomes, found


def flip(path: Path, rng: random.Random) -> str:
    raw = bytearray(path.read_bytes())
    if not raw:
        return ""
    at, bit = rng.randrange(len(raw)), rng.randrange(8)
    raw[at] ^= 1 << bit
    path.write_bytes(raw)
    return f"bit {bit} of byte {at}"


def cut(path: Path, rng: random.Random) -> str:
    size = path.stat().st_size
    os.truncate(path, at := rng.randrange(size)) if size else None
    return f"cut at byte {at}" if size else ""


def empty(path: Path, rng: random.Random) -> str:
    os.truncate(path, 0)
    return "empty"


def folder_there(path: Path, rng: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return "a folder"


def other_type(path: Path, rng: random.Random) -> str:
    path.write_text("[1, 2]\n")
    return "a list"


def no_text(path: Path, rng: random.Random) -> str:
    path.write_bytes(b"\xff\xfe\x00" + path.read_bytes())
    return "not UTF-8"


DAMAGES: tuple[Callable[[Path, random.Random], str], ...] = (flip, cut, empty, folder_there, other_type, no_text)


@dataclass
class Tally:
    """What came of the cases.

    Attributes:
        cases: damages of a file; each is followed by all commands that read the file.
        verdicts: how the commands ended, by kind of file: ``noticed``, ``no effect``.
        faults: what must not be: tracebacks, and other outcomes without a word.
    """

    cases: Counter[str] = field(default_factory=Counter)
    verdicts: dict[str, Counter[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def verdict(sound: Outcome, got: Outcome, name: str) -> str:
    """How a command took the damage of a file."""
    if got.code is None or "Traceback" in got.said:
        return "traceback"
    if Path(name).name in got.said:
        wrong = got.code == 0 and isinstance(got.left, tuple) and got.left[0] != sound.left[0]
        return "went on to other results" if wrong else "noticed"
    same = (got.code, got.out, got.left) == (sound.code, sound.out, sound.left)
    return "no effect" if same else "silent"


def damaged(place: Place, folder: Path, *, cases: int, seed: int, costly: float = 1.0) -> Tally:
    """Damage files of a run, and run what reads them.

    Args:
        place: of the run.
        folder: an empty folder to work in.
        cases: how many; each file gets its share of each kind of damage.
        seed: of the draws.
        costly: the share of the cases in which commands that build a model run, too.
    """
    rng, tally = random.Random(seed), Tally()
    sound, found = readers(place, folder)
    read = [name for name, commands in found.items() if commands and not name.startswith(SHOWN)]
    plan = [(name, damage) for damage in DAMAGES for name in read]
    for number in range(cases):
        # Half of all cases are flipped bits.
        name, damage = plan[number // 2 % len(plan)] if number % 2 else (read[number // 2 % len(read)], flip)
        commands = found[name] if rng.random() < costly else [c for c in found[name] if c in CHEAP]
        tally.cases[name] += 1
        for command in commands:
            with copied(place, folder):
                state = rng.getstate()
                what = damage(place.run.path / name, rng)
                after = rng.getstate()
                if command != commands[-1]:
                    # The same damage for each command.
                    rng.setstate(state)
                got = run_command(command, place)
            rng.setstate(after if command == commands[-1] else state)
            judged = verdict(sound[command], got, name)
            tally.verdicts.setdefault(name, Counter())[judged] += 1
            if judged not in ("noticed", "no effect"):
                tally.faults.append(f"{name}, {what}: {command}: {judged}: {got.said[-2000:]} {got.out[-300:]}")
    return tally


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    (given.folder / "work").mkdir(parents=True)
    done = damaged(make(given.folder / "place"), given.folder / "work", cases=given.cases, seed=given.seed)
    sys.stdout.write(json.dumps({"cases": done.cases, "verdicts": done.verdicts, "faults": done.faults}) + "\n")
