"""Standard streams that are closed, full, or read by nobody: one line or nothing, and a run goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rslp.rundir import RunDir
from tests.forks import ROOT, Forks
from tests.tiny import run_config, write_dataset

HERE = "tests.runtime.test_streams"
STDOUT, STDERR = 1, 2
NAMES = {STDOUT: "stdout", STDERR: "stderr"}
# What is done to a stream, as a shell does it before a program starts: `>&-`, `> /dev/full`, `| true`.
WAYS = ("closed", "full", "unread")


def spoil(way: str, number: int) -> None:
    """Do it to a stream of this process."""
    if way == "closed":
        os.close(number)
        setattr(sys, NAMES[number], None)
        setattr(sys, f"__{NAMES[number]}__", None)
    elif way == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)
    else:
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, number)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """A folder with a multi-dataset config, a run that is done, and one that is still to come."""
    folder = tmp_path_factory.mktemp("streams")
    config = run_config({"classify": (str(write_dataset(folder / "classify", "classify")), "classify")}, epochs=1)
    for name in ("done", "new"):
        run = RunDir.of(folder, "tests", name)
        run.path.mkdir(parents=True)
        run.config.write_text(yaml.safe_dump(config))
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    dataset = {"model": config["model"], "data": config["data"]["init_args"]["data_modules"]["classify"]}
    (folder / "classify.yaml").write_text(yaml.safe_dump(dataset))
    base = {key: config[key] for key in ("model", "trainer")}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    maker = {"base_cfg": "base.yaml", "dataset_cfgs": ["classify.yaml"], "output_path": "OUT.yaml"}
    (folder / "maker.yaml").write_text(yaml.safe_dump(maker))
    said = folder / "said"
    assert forks.run("run", "--run_dir", str(RunDir.of(folder, "tests", "done").path), output=said) == 0, (
        said.read_text()
    )
    return folder


# Words, and whether what is printed is the result: then it is an error that it could not be.
WORKFLOWS = {
    "--help": (["--help"], True),
    "make_multidataset_config": (["make_multidataset_config", "--cfg", "{place}/maker.yaml"], False),
    "check": (["check", "--config_paths+={place}/run.yaml"], False),
    "pack": (["pack", "--config_paths+={place}/run.yaml"], False),
    "launch_finetune": (
        [
            "launch_finetune",
            "--config_paths+={place}/run.yaml",
            "--experiment_id",
            "x",
            "--local",
            "true",
            "--dry_run",
            "true",
            "--check",
            "false",
        ],
        True,
    ),
    "jobs": (["jobs"], True),
    "logs": (["logs", "--experiment_id", "none"], True),
    "cancel": (["cancel", "--experiment_id", "none"], False),
    "fit": (["run", "--run_dir", "{place}/projects/tests/new"], False),
    "test": (["run", "--run_dir", "{place}/projects/tests/done", "--mode", "test"], False),
    "predict": (["run", "--run_dir", "{place}/projects/tests/done", "--mode", "predict"], False),
}


_LONG = ("check", "pack", "fit", "test", "predict")
_EVERY = tuple((way, number) for way in WAYS for number in NAMES)


@pytest.mark.parametrize(
    ("name", "spoilt"),
    [
        *((name, (("closed", STDOUT), ("full", STDERR))) for name in ("check", "fit")),
        *((name, _EVERY) for name in WORKFLOWS if name not in _LONG),
        *(pytest.param(name, _EVERY, marks=pytest.mark.slow) for name in _LONG),
    ],
)
def test_each_workflow_ends_as_it_would_have_and_says_one_line_or_nothing(
    tmp_path: Path, place: Path, forks: Forks, name: str, spoilt: tuple[tuple[str, int], ...]
) -> None:
    given, fingerprints = WORKFLOWS[name]
    words = [word.format(place=place) for word in given]
    variables = {"RSLP_PREFIX": str(place)}
    new = RunDir.of(place, "tests", "new")
    codes, wrong = {}, []
    for way, number in [("", 0), *spoilt]:
        new.done_marker.unlink(missing_ok=True)
        for path in new.checkpoints.glob("*"):
            path.unlink()
        said = tmp_path / f"{way}{number}"
        first = (f"{HERE}:spoil", way, number) if way else ()
        code = codes[way, number] = forks.wait(forks.start(*words, output=said, first=first, variables=variables))
        text = said.read_text()
        expected = codes["", 0] or int(fingerprints and (way, number) == ("full", STDOUT))
        if code != expected or "Traceback" in text or "Exception" in text:
            wrong.append(f"{way} {NAMES.get(number)}: exit code {code}, {expected} expected: {text}")
        if (way, number) == ("full", STDOUT) and code == 1:
            assert text.splitlines()[-1] == "error: standard output can't be written: No space left on device"
        if name == "fit" and new.done() is None:
            wrong.append(f"{way} {NAMES.get(number)}: it did not train")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("end", [">&-", "> /dev/full", "2> /dev/full", "| head -1", ">&- 2>&- <&-"])
def test_a_real_shell(place: Path, end: str) -> None:
    line = f"set -o pipefail; {sys.executable} -m rslp.main helios jobs {end}"
    variables = {"RSLP_PREFIX": str(place), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", line], env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == int(end == "> /dev/full"), done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") <= 1


FOLLOW = """
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from rslp.cli import jobs
from rslp.launch.processes import tail
from rslp.runtime import streams
streams.guard()
jobs.find_run = lambda *_: nullcontext()
jobs.find_record = lambda *_: SimpleNamespace(engine="")
jobs.engine = lambda _: SimpleNamespace(log=lambda *_, **__: tail(Path(sys.argv[1]), ended=lambda: False))
sys.exit(jobs.logs("x", follow=True))
"""


def test_following_a_log_ends_with_its_reader(tmp_path: Path) -> None:
    """`logs --follow true | head -1`: it does not wait for the end of the run."""
    (tmp_path / "log").write_text("one\n" * 100_000)
    line = f'set -o pipefail; {sys.executable} -c "$0" "$1" | head -1'
    words = ["bash", "-c", line, FOLLOW, str(tmp_path / "log")]
    variables = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "one\n", "")
