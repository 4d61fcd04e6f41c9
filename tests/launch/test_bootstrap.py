"""What a job runs first: in an image that may be older than the code, or hold none of it."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from rslp.launch import bootstrap

SOURCE = Path(bootstrap.__file__).read_text(encoding="utf-8")
FITS = {"python": ">=3.11", "requirements": ["numpy>=1"], "extras": {}, "constraints": []}


def code_zip(folder: Path, manifest: dict[str, Any]) -> tuple[Path, str]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("hello.py", "import sys; print('hello from the code', *sys.argv[1:]); sys.exit(7)")
        archive.writestr("snapshot.json", json.dumps(manifest))
    path = folder / "code.zip"
    path.write_bytes(buffer.getvalue())
    return path, hashlib.sha256(buffer.getvalue()).hexdigest()


def start(code: Path, digest: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """As an image's Python gets it, with nothing of this checkout on its path."""
    command = [sys.executable, "-I", "-c", SOURCE, "--code", str(code), "--sha256", digest, "--", *words]
    variables = {"PATH": "/usr/bin:/bin", "TMPDIR": str(code.parent), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=variables)


def test_the_code_runs_and_its_exit_code_is_the_jobs(tmp_path: Path) -> None:
    code, digest = code_zip(tmp_path, FITS)
    done = start(code, digest, "-m", "hello", "--n", "${RANK}", "$HOME", RANK="3")
    assert done.stdout == "hello from the code --n 3 $HOME\n"
    assert done.returncode == 7
    assert f"code {digest[:12]} on {sys.executable}" in done.stderr


@pytest.mark.parametrize(
    ("manifest", "digest", "words", "message"),
    [
        (FITS, "0" * 64, ("-m", "hello"), "the code is not what was sent: its SHA-256 is "),
        (FITS, None, ("-m", "hello", "${NO_SUCH}"), "the variable NO_SUCH is not set in the job"),
        ({**FITS, "python": ">=3.99"}, None, ("-m", "hello"), "the code requires >=3.99: use a newer image"),
        (
            {**FITS, "requirements": ["numpy>=99"], "constraints": ["numpy==99.0"]},
            None,
            ("-m", "hello"),
            "the image lacks what the code requires (numpy ",
        ),
    ],
)
def test_what_cannot_run_ends_in_one_line(
    manifest: dict[str, Any], digest: str | None, words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    code, true = code_zip(tmp_path, manifest)
    # No index: pip must not go and look for numpy 99.
    done = start(code, digest or true, *words, PIP_NO_INDEX="1")
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1] and done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr


def test_code_that_is_not_there(tmp_path: Path) -> None:
    done = start(tmp_path / "none.zip", "0" * 64, "-m", "hello")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "is its folder mounted in the job?" in done.stderr


def test_an_older_image_gets_a_venv_of_the_tested_versions(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "wheels", "rslp_probe", "2.0")
    wanted = {"requirements": ["rslp-probe>=2"], "constraints": ["rslp-probe==2.0"]}
    code, digest = code_zip(tmp_path, {**FITS, **wanted})
    done = start(code, digest, "-c", "import rslp_probe, sys; print(rslp_probe.version, sys.prefix != sys.base_prefix)",
                 PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheel.parent))  # fmt: skip
    assert done.stdout == "2.0 True\n", done.stderr
    assert "does not meet the code's requirements (no rslp-probe)" in done.stderr


def make_wheel(folder: Path, name: str, version: str) -> Path:
    folder.mkdir()
    path, about = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", f"version = {version!r}\n")
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    return path


def test_it_needs_nothing_but_the_standard_library() -> None:
    code = "import sys; before = set(sys.modules); sys.argv = ['-', '--help']\n"
    code += (
        f"try: exec(compile({SOURCE!r}, 'bootstrap', 'exec'), {{'__name__': '__main__'}})\nexcept SystemExit: pass\n"
    )
    code += "print({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("wanted", "version", "fits"),
    [
        (">=3.11", (3, 11), True),
        (">=3.11", (3, 10), False),
        (">=3.11,<4", (3, 12), True),
        (">=3.8,<3.11", (3, 11), False),
    ],
)
def test_versions_of_python(wanted: str, version: tuple[int, int], fits: bool) -> None:
    assert bootstrap.python_fits(wanted, version) is fits
