"""The command line answers at once, in words, and without the training stack."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rslp.cli.main import load_workflow, main
from rslp.helios import workflows

LAUNCH = ("helios", "launch_finetune")
HEAVY = ("torch", "lightning", "rslearn", "rasterio", "beaker", "olmoearth_pretrain_minimal")


def test_the_bare_command_lists_projects_and_workflows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr().out
    assert "launch_finetune" in shown
    assert "Fine-tune on the datasets of a run config" in shown


def test_the_original_projects_later_name_has_the_same_workflows(capsys: pytest.CaptureFixture[str]) -> None:
    for project in ("helios", "olmoearth_pretrain"):
        with pytest.raises(SystemExit):
            main([project, "launch_finetune", "--help"])
    first, second = capsys.readouterr().out.split("usage: ")[1:]
    assert second.split() == first.replace(" helios ", " olmoearth_pretrain ", 1).split()
    assert main(["olmoearth_pretrain"]) == 2
    assert "helios or olmoearth_pretrain:\n" in capsys.readouterr().out
    both = ["--helios_checkpoint_path", "/a", "--olmoearth_checkpoint_path", "/b"]
    assert main(["helios", "check", "--config_paths+=x.yaml", *both]) == 2
    assert "are the same; keep one" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["helios", "--help"], ["helios"]])
def test_help_is_for_people(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == (0 if "--help" in argv else 2)
    assert "make_multidataset_config" in capsys.readouterr().out


@pytest.mark.parametrize("workflow", sorted(workflows))
def test_a_workflows_help_names_its_purpose_once_and_each_option_once(
    workflow: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["helios", workflow, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "Args:" not in shown and "type:" not in shown
    function = load_workflow(workflows[workflow])
    assert shown.count((inspect.getdoc(function) or "").partition(" ")[0] + " ") == 1
    typed = re.findall(r"^  --([\w.]+)", shown, re.MULTILINE)
    assert len(typed) == len(set(typed))
    names = {name.partition(".")[0] for name in typed}
    assert names == {"help", *inspect.signature(function).parameters}


def test_a_workflows_options_stand_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["helios", "launch_finetune", "--help"])
    shown = capsys.readouterr().out
    assert "usage: python -m rslp.main helios launch_finetune --experiment_id EXPERIMENT_ID" in shown
    assert "  --config_paths+=CONFIG_PATH\n" in shown and "(required)" in shown
    # What no group names stands at the end: a new option of this workflow is given a group.
    assert shown.endswith("\noptions:\n  --help                  show this help message and exit\n")
    assert "  --priority {low,normal,high,urgent}\n" in shown and "(default: high)" in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["heliso", "run"], "unknown project 'heliso'; did you mean helios?"),
        (["helios", "lauch_finetune"], "did you mean launch_finetune?"),
        ([*LAUNCH, "--experimnt_id", "x"], "unknown option --experimnt_id; did you mean --experiment_id?"),
        ([*LAUNCH, "--experiment_id", "x", "--local", "maybe"], "--local must be true or false; got maybe"),
        ([*LAUNCH, "--experiment_id", "x", "--cpus", "many"], "--cpus must be a whole number; got many"),
        ([*LAUNCH, "--experiment_id", "x", "--profiler", "my own"], "--profiler must be simple, advanced; got my own"),
        ([*LAUNCH, "--experiment_id", "x", "--priority", "soon"], "--priority must be low, normal, high, urgent; got"),
        ([*LAUNCH, "--local", "true"], "experiment_id"),
        ([*LAUNCH, "--experiment_id", "x", "--local", "true"], "config_paths"),
        ([*LAUNCH, "--experiment_id", "x", "--config_paths+=/no/a.yaml", "--local", "true"], "a.yaml: no such file"),
        ([*LAUNCH, "--experiment_id", "a/b", "--config_paths+=x.yaml", "--local", "true"], "experiment name 'a/b'"),
        ([*LAUNCH, "--experiment_id", "x", "--config_paths+=x.yaml", "--cluster+=ai2/jupiter"], "x.yaml: no such"),
        (["helios", "jobs", "--rslp_project", "../.."], "project name '../..' can't be used"),
        (["helios", "jobs", "--rslp_project", ""], "project name '' can't be used"),
        (["helios", "run", "--run_dir", "weka://bucket/projects/a/b"], "and give the path that it is mounted at"),
        (["helios", "check", "--config_paths+=weka://bucket/a.yaml"], "and give the path that it is mounted at"),
        (["helios", "run", "--run_dir", "/no/such/run"], "/no/such/run/config.yaml does not exist"),
        (["helios", "run", "--run_dir", "/no/such/run", "--mode", "fitt"], "fitt"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert len(error) < 400


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["helios", "--help"],
        ["helios", "launch_finetune", "--help"],
        ["helios", "make_multidataset_config", "--help"],
        ["helios", "make_example", "--help"],
        ["helios", "run", "--help"],
        ["helios", "check", "--help"],
        ["helios", "run_ranks", "--help"],
        ["helios", "run_slurm", "--run_dirs+=x"],
        ["helios", "jobs"],
        ["helios", "logs", "--experiment_id", "none"],
        ["helios", "cancel", "--experiment_id", "none"],
        ["helios", "lauch_finetune"],
    ],
)
def test_answers_need_no_training_stack(words: list[str]) -> None:
    code = (
        "import sys; from rslp.main import main\n"
        f"try: main({words!r})\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_a_run_config_of_another_kind_is_recognised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "multi.yaml"
    config.write_text("dataset_cfgs: [a.yaml]\noutput_path: OUT.yaml\npatch_size: 8\n")
    assert (
        main(["helios", "launch_finetune", "--experiment_id", "x", f"--config_paths+={config}", "--local", "true"]) == 2
    )
    assert "is a multi-dataset config; first run: python make_multidataset_config.py" in capsys.readouterr().err


@pytest.mark.parametrize("ends", ["at once", "as Lightning does"])
def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ends: str) -> None:
    def interrupted(_: list[str]) -> int:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if ends == "at once":
                raise
            sys.exit(1)

    monkeypatch.setattr("rslp.cli.main._run", interrupted)
    assert main(["helios", "run"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_another_exit_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rslp.cli.main._run", lambda _: sys.exit(3))
    with pytest.raises(SystemExit, match="3"):
        main(["helios", "run"])
