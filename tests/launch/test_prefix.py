"""Where runs lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from rslp.launch.runs import runs_prefix


@pytest.mark.parametrize(
    ("environment", "file", "remote", "expected"),
    [
        ({}, None, False, "HERE/project_data"),
        ({}, None, True, "gs://rslearn-eai"),
        ({"RSLP_PREFIX": "/runs"}, "RSLP_PREFIX=/other\n", True, "/runs"),
        ({"RSLP_PREFIX": "runs"}, None, False, "HERE/runs"),
        ({"RSLP_PREFIX": ""}, None, False, "HERE/project_data"),
        ({}, "# RSLP_PREFIX=/no\nWANDB=x\nRSLP_PREFIX=/from/file\n", False, "/from/file"),
        ({}, "export RSLP_PREFIX='/a b' # ours\n", False, "/a b"),
        ({}, 'RSLP_PREFIX = "s3://bucket"\n', False, "s3://bucket"),
        ({}, "RSLP_PREFIX=/a#b # ours\n", False, "/a#b"),
        ({}, "RSLP_PREFIX\n", False, "HERE/project_data"),
    ],
)
def test_the_prefix(tmp_path: Path, environment: dict[str, str], file: str | None, remote: bool, expected: str) -> None:
    if file is not None:
        (tmp_path / ".env").write_text(file)
    found = runs_prefix(remote=remote, environment=environment, folder=tmp_path)
    assert found == expected.replace("HERE", str(tmp_path))
