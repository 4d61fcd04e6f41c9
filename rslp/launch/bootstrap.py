"""What a job runs first, in the image as it is: fetch the code, see whether the image can run it, and run it.

This file is sent as text and runs where no rslp is installed yet, maybe on an older Python: it imports the standard
library alone (and fsspec for object stores), and ends with one line and exit code 2 when the image can't do it.
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
FAULTS = {
    "botocore.exceptions": "BotoCoreError",
    "aiohttp": "ClientError",
    "google.auth.exceptions": "GoogleAuthError",
}
WAITS = (1, 2, 4, 8, 16, 30, 60, None)


def fail(message: str) -> NoReturn:
    """End the job with one line."""
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)


def say(message: str) -> None:
    """A line for whoever reads the job's log."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def scheme_of(url: str) -> str:
    """``gs`` of ``gs://…``; empty for a path."""
    return url.partition("://")[0] if "://" in url else ""


def client_for(url: str) -> Any:
    """fsspec, with the client of the URL's store; what the image lacks is installed beside it."""
    wanted = CLIENTS.get(scheme_of(url), "fsspec")
    try:
        importlib.import_module(wanted)
    except ImportError:
        folder = tempfile.mkdtemp(prefix="rslp-client-")
        install([sys.executable, "-m", "pip", "install", "-q", "--target", folder, wanted], what=wanted)
        sys.path.insert(0, folder)
        importlib.invalidate_caches()
        importlib.import_module(wanted)
    return importlib.import_module("fsspec")


def fetch(url: str, target: Path) -> None:
    """Copy the code from a store or a mounted folder; a store that does not answer is asked again."""
    if not scheme_of(url):
        if not Path(url).is_file():
            fail(f"the code {url} is not there: is its folder mounted in the job?")
        shutil.copyfile(url, target)
        return
    fsspec = client_for(url)
    faults = [getattr(sys.modules.get(module), name, OSError) for module, name in FAULTS.items()]
    for wait in WAITS:
        try:
            with fsspec.open(url, "rb") as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
            return
        except FileNotFoundError:
            fail(f"the code {url} is not there")
        except (OSError, *faults) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if wait is None:
                fail(f"the code {url} can't be read: {reason}")
            say(f"the code can't be read yet ({reason}); trying again in {wait} s")
            time.sleep(wait)


def unpack(archive: Path, digest: str) -> Path:
    """Check the code and unpack it; the folder that it is in."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != digest:
        fail(f"the code is not what was sent: its SHA-256 is {found}, not {digest}; submit the job again")
    folder = tempfile.mkdtemp(prefix="rslp-code-")
    with zipfile.ZipFile(archive) as content:
        content.extractall(folder)
    archive.unlink()
    return Path(folder)


def python_fits(wanted: str, version: tuple[int, ...]) -> bool:
    """Whether a version of Python meets ``>=3.11,<4``; clauses of other kinds are left to pip."""
    least = [(int(major), int(minor)) for major, minor in re.findall(r">=\s*(\d+)\.(\d+)", wanted)]
    below = [(int(major), int(minor or 0)) for major, minor in re.findall(r"<\s*(\d+)(?:\.(\d+))?", wanted)]
    return all(version >= bound for bound in least) and all(version < bound for bound in below)


def unmet(requirements: list[str]) -> list[str]:
    """What the image lacks of what the code requires, each in a few words."""
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
            lacking.append(f"{requirement.name} {version}, the code wants {requirement.specifier}")
    return lacking


def fitting_python(wanted: str) -> str:
    """This Python if it fits, else another one of the image."""
    if python_fits(wanted, sys.version_info[:2]):
        return sys.executable
    for minor in range(30, 7, -1):
        found = shutil.which(f"python3.{minor}")
        if found and python_fits(wanted, (3, minor)):
            return found
    own = ".".join(map(str, sys.version_info[:2]))
    return fail(f"the image has Python {own}, the code wants {wanted}: use a newer image")


def install(words: list[str], what: str) -> None:
    """Run pip; the line with its reason when it fails."""
    done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.startswith("ERROR")]
        fail(f"{what} can't be installed: {(lines or ['pip gave no reason'])[-1]}")


def suitable_python(code: Path, scheme: str) -> str:
    """The interpreter for the code: the image's own if all that the code requires is in it, else one of a new venv."""
    manifest = json.loads((code / "snapshot.json").read_text(encoding="utf-8"))
    requirements = manifest["requirements"] + manifest["extras"].get(EXTRAS.get(scheme, ""), [])
    python = fitting_python(manifest["python"])
    lacking = unmet(requirements) if python == sys.executable else ["another Python"]
    if not lacking:
        return python
    reason = "; ".join(lacking[:3])
    say(f"the image is not of this code's age ({reason}): making a venv of the versions that the code was tested with")
    folder = Path(tempfile.mkdtemp(prefix="rslp-venv-"))
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(manifest["constraints"]) + "\n", encoding="utf-8")
    made = subprocess.run([python, "-m", "venv", str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if made.returncode:
        fail(f"the image lacks what the code requires ({reason}), and can't make a venv")
    own = str(folder / "bin" / "python")
    what = f"the image lacks what the code requires ({reason}), and it"
    install([own, "-m", "pip", "install", "-q", "--constraint", str(constraints), *requirements], what=what)
    return own


def filled(words: list[str]) -> list[str]:
    """Words of the form ``${NAME}`` replaced by that variable of the job."""
    result = []
    for word in words:
        name = re.match(r"\$\{(\w+)\}\Z", word)
        if name and name.group(1) not in os.environ:
            fail(f"the variable {name.group(1)} is not set in the job")
        result.append(os.environ[name.group(1)] if name else word)
    return result


def main(argv: list[str]) -> NoReturn:
    """Fetch, check, run; does not come back."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    parser = argparse.ArgumentParser()
    parser.add_argument("--code", required=True, help="where the zip lies")
    parser.add_argument("--sha256", required=True, help="of the zip")
    parser.add_argument("words", nargs="+", help="what to run with the code's Python, after --")
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
