"""The code travels whole, without secrets and data, and is the same zip wherever it is made."""

from __future__ import annotations

import io
import json
import os
import subprocess
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rslp.errors import LaunchError
from rslp.launch.snapshot import (
    MANIFEST,
    Snapshot,
    Tree,
    code_tree,
    find_secret,
    is_secret_name,
    redact,
    secret_values,
    send,
    take_snapshot,
)
from rslp.rundir import RunDir

# Put together here: the snapshot of this checkout must not find secrets in its own tests.
VALUE = "".join(("s3cr3t", "-value-", "42"))
PRIVATE = "-----BEGIN " + "OPENSSH PRIVATE KEY-----"


def git(root: Path, *words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    subprocess.run(["git", "-C", str(root), *who, *words], check=True, capture_output=True, env=clean)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with tracked, untracked, ignored and deleted files."""
    root = tmp_path / "checkout"
    files = {
        "rslp/__init__.py": "", "rslp/deleted.py": "", "pyproject.toml": PROJECT, "constraints.txt": "numpy==2.4.6\n",
        ".gitignore": "ignored/\nproject_data/\n", "übung mit raum.py": "x = 1\n", ".github/a.yml": "a: 1\n",
    }  # fmt: skip
    for name, text in files.items():
        write(root, name, text)
    git(tmp_path, "init", "-q", str(root))
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    (root / "rslp/deleted.py").unlink()
    for name in ("new.py", "ignored/a.py", ".env", "deploy.key", "big.tif", "sub/data/windows/w/a.json", "run/a.log"):
        write(root, name, "text")
    (root / "run/checkpoints").mkdir()
    (root / "outside").symlink_to(tmp_path)
    (root / "link.py").symlink_to("new.py")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    return root


PROJECT = '[project]\nname = "rslp"\nrequires-python = ">=3.11"\ndependencies = ["numpy>=1"]\n'


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def names(snapshot: Snapshot) -> list[str]:
    return zipfile.ZipFile(io.BytesIO(snapshot.content)).namelist()


def test_what_travels_and_what_stays(checkout: Path) -> None:
    tree = code_tree(checkout / "rslp")
    travels = {
        ".github/a.yml", ".gitignore", "constraints.txt", "link.py", "new.py", "pyproject.toml", "rslp/__init__.py",
        "übung mit raum.py",
    }  # fmt: skip
    assert set(tree.names) == travels
    assert {".env", "deploy.key", "big.tif", "sub/data/windows/w/a.json", "run/a.log", "outside"} <= set(tree.left_out)
    assert set(names(take_snapshot(tree))) == {*travels, MANIFEST}
    assert tree.commit is not None and "deleted.py" in tree.diff


def test_the_same_code_is_the_same_zip_wherever_it_lies(checkout: Path, tmp_path: Path) -> None:
    first = take_snapshot(code_tree(checkout / "rslp"))
    (checkout / "new.py").touch()
    (checkout / "new.py").chmod(0o755)
    moved = checkout.rename(tmp_path / "moved")
    again = take_snapshot(code_tree(moved / "rslp"))
    assert again.digest == first.digest
    write(moved, "new.py", "changed")
    assert take_snapshot(code_tree(moved / "rslp")).digest != first.digest


def test_too_much_is_refused_by_name(checkout: Path) -> None:
    write(checkout, "weights.bin", "x" * 20_000)
    with pytest.raises(LaunchError, match=r"0\.0 MB, more than .* the largest: weights.bin \(0.0 MB\)"):
        take_snapshot(code_tree(checkout / "rslp"), max_bytes=10_000)


@pytest.mark.parametrize(
    ("where", "planted", "kind"),
    [
        ("environment", VALUE, "the value of a secret"),
        ("env file", VALUE, "the value of a secret"),
        ("remote", VALUE, "the value of a secret"),
        ("nowhere", PRIVATE, "a private key"),
        ("nowhere", "AKIA" + "ABCDEFGHIJKLMNOP", "an AWS access key"),
        ("nowhere", "ghp_" + "a" * 36, "a GitHub token"),
    ],
)
def test_a_file_with_a_secret_stops_everything_and_the_message_does_not_show_it(
    checkout: Path, where: str, planted: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "environment":
        monkeypatch.setenv("MY_API_TOKEN", planted)
    elif where == "env file":
        write(checkout, ".env", f"export MY_SECRET='{planted}'\n")
    elif where == "remote":
        git(checkout, "remote", "add", "origin", f"https://user:{planted}@example.org/a.git")
    write(checkout, "rslp/oops.py", f"key = '{planted}'\n")
    with pytest.raises(LaunchError, match=f"rslp/oops.py holds {kind}") as caught:
        take_snapshot(code_tree(checkout / "rslp"))
    assert planted not in str(caught.value)


def test_the_record_of_the_code_hides_what_was_taken_out(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(checkout, "rslp/oops.py", f"key = '{VALUE}'\nurl = 'https://me:pass{VALUE}@host/x'\n")
    git(checkout, "add", "-A", "rslp")
    git(checkout, "commit", "-qm", "oops")
    write(checkout, "rslp/oops.py", "key = None\n")
    monkeypatch.setenv("MY_API_TOKEN", VALUE)
    snapshot = take_snapshot(code_tree(checkout / "rslp"))
    record = json.loads(snapshot.record())
    assert VALUE not in snapshot.record() and "***" in record["diff"]
    assert record["dirty"] and record["snapshot"] == snapshot.digest and len(record["commit"]) == 40


def test_an_installed_package_travels_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, "rslp/__init__.py", "")
    write(tmp_path, "rslp/_data/helios/base.yaml", "a: 1")
    write(tmp_path, "rslp/__pycache__/x.pyc", "")
    write(tmp_path, "other/__init__.py", "")
    tree = code_tree(tmp_path / "rslp")
    assert tree.names == ("rslp/__init__.py", "rslp/_data/helios/base.yaml") and tree.commit is None
    content = zipfile.ZipFile(io.BytesIO(take_snapshot(tree).content))
    manifest = json.loads(content.read(MANIFEST))
    assert any(line.startswith("torch") for line in manifest["requirements"])
    assert any(line.startswith("torch==") for line in manifest["constraints"])


def test_it_is_sent_once_and_a_torn_one_again(tmp_path: Path) -> None:
    snapshot = Snapshot(b"content", Tree(tmp_path, ()), frozenset())
    send(snapshot, RunDir(tmp_path))
    where = tmp_path / snapshot.name
    assert where == tmp_path / "code" / f"{snapshot.digest}.zip"
    before = where.stat().st_mtime_ns
    send(snapshot, RunDir(tmp_path))
    assert where.stat().st_mtime_ns == before
    # The second is of the same size: each job would refuse it, and sending it again would mend nothing.
    for damaged in (b"con", b"confent"):
        where.write_bytes(damaged)
        send(snapshot, RunDir(tmp_path))
        assert where.read_bytes() == b"content"


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        (".env", True), (".env.production", True), (".env.example", False), ("a/.aws/config", True),
        ("id_ed25519", True), ("id_ed25519.pub", False), ("keys.py", False), ("tls/server.pem", True),
        ("my-service-account-1.json", True),
        ("rslp/launch/snapshot.py", False), ("secrets/a.txt", True), (".github/workflows/ci.yml", False),
    ],
)  # fmt: skip
def test_names(name: str, secret: bool) -> None:
    assert is_secret_name(name) is secret


def test_what_is_no_secret_is_left_alone() -> None:
    found = secret_values({"A_TOKEN": "true", "B_TOKEN": "/etc/key.json", "C_SECRET": "short", "PATH": VALUE})
    assert found == frozenset()
    assert find_secret(b"plain text", ["x" * 12]) is None


@given(st.text(), st.text(alphabet="abcdefghijk0123456789", min_size=10), st.text())
def test_no_known_secret_survives(before: str, secret: str, after: str) -> None:
    known = secret_values({"TOKEN": secret + "x1"})
    assert all(value not in redact(before + value + after, known) for value in known)
