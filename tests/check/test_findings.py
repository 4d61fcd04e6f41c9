"""Each finding has an id that stays, is documented, and can be allowed; a run keeps what was allowed."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rslp.check import findings
from rslp.check.findings import CONFIG, FINDING_IDS, UNANSWERABLE, Finding, downgrade_allowed
from rslp.cli.check import check
from rslp.cli.launch_finetune import _allow_findings
from rslp.cli.main import main
from rslp.errors import ConfigError
from rslp.launch.check_gate import ensure_checked
from tests import children
from tests.check.small import Case, checked, edit_json, nothing, options, run_config_of
from tests.check.test_meaning import CASES
from tests.tiny import write_run

ROOT = Path(__file__).parents[2]
# What is wrong with the config itself.
OF_CONFIGS = {"config.py", "config_errors.py", "source_map.py", "findings.py"}
# Found by tests of their own: test_background, test_alignment, test_planted (forward), test_sound (stray),
# tests/arguments (no-effect), and below.
ELSEWHERE = {
    CONFIG,
    "background",
    "alignment",
    "forward",
    "overlap",
    "no-locations",
    "no-targets",
    "stray",
    "no-effect",
}


def calls() -> list[tuple[str, str | None]]:
    """File and id of each finding that the check can make."""
    found = []
    for file in sorted(Path(findings.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("Finding", "warning")
            ):
                ids = [k.value.value for k in node.keywords if k.arg == "id" and isinstance(k.value, ast.Constant)]
                found.append((file.name, ids[0] if ids else None))
    return found


def test_each_finding_has_an_id_and_each_id_a_finding() -> None:
    assert [file for file, id_ in calls() if id_ is None and file not in OF_CONFIGS and file != "check.py"] == []
    assert {id_ for _, id_ in calls() if id_} == set(FINDING_IDS) - {CONFIG}


def test_each_id_is_a_row_of_the_page() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (.*) \|$", (ROOT / "docs" / "check.md").read_text(), re.MULTILINE)
    assert {id_: what for id_, what in rows if not id_.startswith("-")} == dict(FINDING_IDS)


def test_each_id_has_data_that_have_it_and_data_that_look_like_it() -> None:
    have = {id_ for case in CASES for id_, _, _ in case.expected}
    assert have == set(FINDING_IDS) - ELSEWHERE
    assert len([case for case in CASES if not case.expected]) >= 15


@pytest.mark.parametrize("id_", FINDING_IDS)
def test_an_allowed_error_is_a_warning(id_: str) -> None:
    finding = Finding("x", id=id_)
    assert downgrade_allowed(finding, ["units-of-another"]) == finding
    assert downgrade_allowed(finding, [id_]).error == (id_ in UNANSWERABLE)
    assert downgrade_allowed(finding, [id_]).allowed == (id_ not in UNANSWERABLE)


def ids(config: dict[str, Any], **effort: Any) -> dict[str, bool]:
    """Whether each finding is an error."""
    return {finding.id: finding.error for finding in checked(config, **effort).findings}


def test_held_out_ground_and_missing_locations(tmp_path: Path) -> None:
    def apart(window: Path, number: int) -> None:
        bounds = [1000 * number, 0, 1000 * number + 8, 8]
        edit_json(window / "metadata.json", lambda content: content.update(bounds=bounds))

    def together(window: Path, number: int) -> None:
        edit_json(window / "metadata.json", lambda content: content.update(bounds=[0, 0, 8, 8]))

    def half_together(window: Path, number: int) -> None:
        apart(window, number if number < 6 else number - 6)

    cases = {change.__name__: change for change in (apart, together, half_together)}
    found = {
        name: ids(run_config_of([Case(name, "segment", change)], tmp_path / name), max_overlap=0.01)
        for name, change in cases.items()
    }
    assert "overlap" not in found["apart"]
    assert "no-locations" not in found["apart"]
    assert found["half_together"]["overlap"]
    assert "no-locations" not in found["half_together"]
    assert found["together"]["no-locations"] is False
    assert "overlap" not in found["together"]


def test_a_task_without_targets(tmp_path: Path) -> None:
    config = run_config_of([Case("lost", "classify", nothing)], tmp_path)
    assert "no-targets" not in ids(config)
    config["data"]["init_args"]["data_modules"]["lost"]["init_args"]["task"]["init_args"]["input_mapping"]["lost"] = {}
    assert ids(config)["no-targets"]


@pytest.fixture
def lacking(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A run config with an error: no window for validation."""
    config = run_config_of([Case("crops", "classify", options(split=["train"]))], tmp_path)
    return tmp_path, config


def test_what_a_config_allows_stops_nobody(
    lacking: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = lacking
    run = write_run(folder, config)
    words = [f"--config_paths+={run.config}", "--forward", "false"]
    assert main(["helios", "check", *words]) == 2
    assert "select 0 of 9; windows have split: 'train' [split-empty]" in capsys.readouterr().err
    assert main(["helios", "check", *words, "--allow+=split-empty"]) == 0
    assert re.search(r"^allowed: .* \[split-empty\]$", capsys.readouterr().err, re.MULTILINE)
    config["data"]["init_args"]["check_allow"] = {"crops": ["split-empty"]}
    run.config.write_text(yaml.safe_dump(config))
    assert check([str(run.config)], forward=False) == 0


@pytest.mark.parametrize(
    ("allow", "message"),
    [
        ({"crops": ["split-emty"]}, "no finding has the id 'split-emty'; did you mean split-empty?"),
        ({"crops": ["folder"]}, "'folder' can't be allowed: nothing can be run with it"),
        ({"corps": ["overlap"]}, "names the dataset 'corps', which is not among crops"),
    ],
)
def test_an_id_that_there_is_not_is_an_error(
    allow: dict[str, list[str]], message: str, lacking: tuple[Path, dict[str, Any]]
) -> None:
    folder, config = lacking
    config["data"]["init_args"]["check_allow"] = allow
    run = write_run(folder, config)
    with pytest.raises(ConfigError) as raised:
        check([str(run.config)], data=False)
    assert any(message in problem.what for problem in raised.value.problems)


def test_a_run_keeps_what_was_allowed(lacking: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", children.run_here)
    folder, config = lacking
    run = write_run(folder, config)
    launched = _allow_findings(config, ["split-empty"])
    assert launched["data"]["init_args"]["check_allow"] == {"crops": ["split-empty"]}
    assert _allow_findings(launched, ["split-empty", "units"])["data"]["init_args"]["check_allow"] == {
        "crops": ["split-empty", "units"]
    }
    assert _allow_findings(config, []) == config
    source = folder / "OUT.yaml"
    source.write_text(yaml.safe_dump(config))
    ensure_checked([str(source)], config=launched, run=run, constants={}, here=True, allow=["split-empty", "forward"])
    assert json.loads(run.check.read_text())["allowed"] == {"crops": ["split-empty"]}
