"""The first program of a job: fetch the code, make an environment where the image can't run it, and run it.

This file is sent as text and runs in an image without rslp, maybe with an older Python: it imports only the standard
library (and fsspec for object stores), and ends with one line and exit code 2 when the image can't run the code.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

CLIENTS = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs"}
EXTRAS = {"gs": "gs", "gcs": "gs", "s3": "s3"}
STORE_ERRORS = {
    "botocore.exceptions": "BotoCoreError",
    "aiohttp": "ClientError",
    "google.auth.exceptions": "GoogleAuthError",
}
# Seconds between attempts; None is the last one.
WAITS = (1, 2, 4, 8, 16, 30, 60, None)


def fail(message: str) -> NoReturn:
    """End the job with one line."""
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)


def say(message: str) -> None:
    """Write a line to the job's log."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def scheme_of(url: str) -> str:
    """The scheme of a URL, such as ``gs``; empty for a path."""
    return url.partition("://")[0] if "://" in url else ""


def client_for(url: str) -> Any:
    """The module fsspec, with the client of the URL's store; packages that the image lacks are installed beside it."""
    package = CLIENTS.get(scheme_of(url), "fsspec")
    try:
        importlib.import_module(package)
    except ImportError:
        folder = tempfile.mkdtemp(prefix="rslp-client-")
        install([sys.executable, "-m", "pip", "install", "-q", "--target", folder, package], name=package)
        sys.path.insert(0, folder)
        importlib.invalidate_caches()
        importlib.import_module(package)
    return importlib.import_module("fsspec")


def fetch(url: str, target: Path) -> None:
    """Copy the code from a store or a mounted folder, with retries while the store does not answer."""
    if not scheme_of(url):
        if not Path(url).is_file():
            fail(f"the code {url} is not there: is its folder mounted in the job?")
        shutil.copyfile(url, target)
        return
    fsspec = client_for(url)
    store_errors = [getattr(sys.modules.get(module), name, OSError) for module, name in STORE_ERRORS.items()]
    for wait in WAITS:
        try:
            with fsspec.open(url, "rb") as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
            return
        except FileNotFoundError:
            fail(f"the code {url} is not there")
        except (OSError, *store_errors) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if wait is None:
                fail(f"the code {url} can't be read: {reason}")
            say(f"the code can't be read yet ({reason}); trying again in {wait} s")
            time.sleep(wait)


def unpack(archive: Path, digest: str) -> Path:
    """Verify the hash of the code and unpack it to a new folder, which is returned."""
    actual = hashlib.sha256(archive.read_bytes()).hexdigest()
    if actual != digest:
        fail(f"the code is not what was sent: its SHA-256 is {actual}, not {digest}; submit the job again")
    folder = tempfile.mkdtemp(prefix="rslp-code-")
    with zipfile.ZipFile(archive) as content:
        content.extractall(folder)
    archive.unlink()
    return Path(folder)


def python_fits(required: str, version: tuple[int, ...]) -> bool:
    """Whether a version of Python meets a requirement such as ``>=3.11,<4``; other clauses are left to pip."""
    least = [(int(major), int(minor)) for major, minor in re.findall(r">=\s*(\d+)\.(\d+)", required)]
    below = [(int(major), int(minor or 0)) for major, minor in re.findall(r"<\s*(\d+)(?:\.(\d+))?", required)]
    return all(version >= bound for bound in least) and all(version < bound for bound in below)


def unmet(requirements: list[str]) -> list[str]:
    """The requirements that the image does not meet, each as a few words for a message."""
    try:
        parser: Any = importlib.import_module("packaging.requirements")
    except ImportError:
        parser = importlib.import_module("pip._vendor.packaging.requirements")
    lacking = []
    for requirement in map(parser.Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            lacking.append(f"no {requirement.name}")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            lacking.append(f"{requirement.name} {version}, the code requires {requirement.specifier}")
    return lacking


def fitting_python(required: str) -> str:
    """The path of this Python if it fits, else of another one in the image."""
    if python_fits(required, sys.version_info[:2]):
        return sys.executable
    for minor in range(30, 7, -1):
        path = shutil.which(f"python3.{minor}")
        if path and python_fits(required, (3, minor)):
            return path
    version = ".".join(map(str, sys.version_info[:2]))
    return fail(f"the image has Python {version}, the code requires {required}: use a newer image")


def install(command: list[str], name: str) -> None:
    """Run pip; when it fails, end the job with the line that gives pip's reason."""
    finished = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if finished.returncode:
        lines = [line for line in finished.stderr.decode(errors="replace").splitlines() if line.startswith("ERROR")]
        fail(f"{name} can't be installed: {(lines or ['pip gave no reason'])[-1]}")


def suitable_python(code: Path, scheme: str) -> str:
    """The interpreter for the code: the image's if it meets all requirements, else that of a new venv."""
    manifest = json.loads((code / "snapshot.json").read_text(encoding="utf-8"))
    requirements = manifest["requirements"] + manifest["extras"].get(EXTRAS.get(scheme, ""), [])
    python = fitting_python(manifest["python"])
    lacking = unmet(requirements) if python == sys.executable else ["another Python"]
    if not lacking:
        return python
    reason = "; ".join(lacking[:3])
    say(f"the image does not meet the code's requirements ({reason}): making a venv of tested versions")
    folder = Path(tempfile.mkdtemp(prefix="rslp-venv-"))
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(manifest["constraints"]) + "\n", encoding="utf-8")
    venv = subprocess.run([python, "-m", "venv", str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if venv.returncode:
        fail(f"the image lacks what the code requires ({reason}), and can't make a venv")
    python = str(folder / "bin" / "python")
    name = f"the image lacks what the code requires ({reason}), and it"
    install([python, "-m", "pip", "install", "-q", "--constraint", str(constraints), *requirements], name=name)
    return python


def filled(words: list[str]) -> list[str]:
    """Replace words of the form ``${NAME}`` by that variable of the job."""
    result = []
    for word in words:
        name = re.match(r"\$\{(\w+)\}\Z", word)
        if name and name.group(1) not in os.environ:
            fail(f"the variable {name.group(1)} is not set in the job")
        result.append(os.environ[name.group(1)] if name else word)
    return result


def main(argv: list[str]) -> NoReturn:
    """Fetch, verify and unpack the code; then its Python replaces this process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    parser = argparse.ArgumentParser()
    parser.add_argument("--code", required=True, help="path or URL of the zip")
    parser.add_argument("--sha256", required=True, help="SHA-256 of the zip")
    parser.add_argument("words", nargs="+", help="arguments of the code's Python, after --")
    arguments = parser.parse_args(argv)
    words = filled(arguments.words)
    archive = Path(tempfile.mkdtemp(prefix="rslp-zip-")) / "code.zip"
    fetch(arguments.code, archive)
    code = unpack(archive, arguments.sha256)
    python = suitable_python(code, scheme_of(arguments.code))
    inherited = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    say(f"code {arguments.sha256[:12]} on {python}")
    sys.stdout.flush()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(code), *inherited])}
    os.execve(python, [python, *words], {**environment, "RSLP_CODE": arguments.sha256})


if __name__ == "__main__":
    main(sys.argv[1:])
