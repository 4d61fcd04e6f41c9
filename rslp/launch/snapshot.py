"""The snapshot: the code of this machine as one zip, named by its content, for a job that runs elsewhere."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tomllib
import zipfile
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from rslp.errors import LaunchError
from rslp.files import Store, full_disk, is_remote, write_atomic
from rslp.launch.secrets import find_secret
from rslp.launch.software import code_record
from rslp.launch.tree import Tree, code_tree, known_secrets

MANIFEST = "snapshot.json"
MAX_BYTES = 50_000_000
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Snapshot:
    """The code, ready to be sent.

    Attributes:
        content: the zip's bytes; the same code gives the same bytes on every machine.
        tree: where it came from.
        secrets: values that must not be written anywhere.
    """

    content: bytes
    tree: Tree
    secrets: frozenset[str]

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the content, hex."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def name(self) -> str:
        """Where it lies in a run directory."""
        return f"code/{self.digest}.zip"

    def record(self) -> str:
        """What the run directory keeps of it as ``code.json``."""
        return code_record(self.tree, self.secrets, snapshot=self.digest)


def take_snapshot(tree: Tree | None = None, *, max_bytes: int = MAX_BYTES) -> Snapshot:
    """Make the snapshot of the code.

    Args:
        tree: the code; that of this process when None.
        max_bytes: how large all files together may be.

    Raises:
        LaunchError: the files are too large, or one of them holds a secret.
    """
    tree = tree or code_tree()
    sizes = {name: (tree.root / name).stat().st_size for name in tree.names}
    if sum(sizes.values()) > max_bytes:
        largest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:5]
        listed = ", ".join(f"{name} ({sizes[name] / 1e6:.1f} MB)" for name in largest)
        raise LaunchError(
            f"the code in {tree.root} is {sum(sizes.values()) / 1e6:.1f} MB, more than the {max_bytes / 1e6:.0f} MB "
            f"that travel with a job; the largest: {listed}. Move data out of the checkout, or list it in .gitignore"
        )
    files = {name: (tree.root / name).read_bytes() for name in tree.names}
    secrets = known_secrets(tree)
    held = [f"{name} holds {what}" for name, content in files.items() if (what := find_secret(content, secrets))]
    if held:
        raise LaunchError(f"the code can't be sent: {'; '.join(held[:5])}. Remove it, or list the file in .gitignore")
    manifest = json.dumps(_manifest(tree), indent=1, sort_keys=True).encode() + b"\n"
    return Snapshot(_zip({**files, MANIFEST: manifest}), tree, secrets)


def send(snapshot: Snapshot, run_location: str, *, patience: float = 600) -> str:
    """Put the snapshot into a run directory, unless it is there.

    Two that send the same code write the same bytes under the same name; an upload that is cut off leaves nothing.

    Args:
        snapshot: the code.
        run_location: the run directory, a folder or a URL.
        patience: how long to go on trying while the store can't be reached, s.

    Returns:
        where it lies.

    Raises:
        StoreError: the store can't be reached.
        LaunchError: the folder can't be written.
    """
    if is_remote(run_location):
        store = Store(run_location, patience=patience)
        # Looked at whole, not by its size: one that is damaged would be refused by each job.
        if store.read(snapshot.name) != snapshot.content:
            store.write(snapshot.name, snapshot.content)
        return store.url(snapshot.name)
    target = Path(run_location) / snapshot.name
    try:
        if not target.is_file() or target.read_bytes() != snapshot.content:
            write_atomic(target, snapshot.content)
    except OSError as error:
        raise full_disk(error, target) or LaunchError(f"{target} can't be written: {error.strerror}") from error
    return str(target)


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    # Stored: what compression makes of the same content differs between versions of zlib.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            archive.writestr(entry, files[name])
    return buffer.getvalue()


def _manifest(tree: Tree) -> dict[str, Any]:
    """What the job needs to know before it can import anything: Python and packages that the code wants."""
    project = tree.root / "pyproject.toml"
    if project.is_file() and "pyproject.toml" in tree.names:
        table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        python, wanted = table["requires-python"], table["dependencies"]
        extras = table.get("optional-dependencies", {})
    else:
        about = metadata.metadata("rslp")
        python, lines = about["Requires-Python"] or ">=3.11", metadata.requires("rslp") or []
        wanted = [line for line in lines if "extra ==" not in line]
        extras = {name: _of_extra(lines, name) for name in ("s3", "gs")}
    constraints = tree.root / "constraints.txt"
    tested = constraints.read_text(encoding="utf-8").split("\n") if "constraints.txt" in tree.names else _installed()
    return {
        "schema": 1,
        "python": python,
        "requirements": sorted(wanted),
        "extras": {name: sorted(extras.get(name, [])) for name in ("s3", "gs")},
        "constraints": sorted(line for line in map(str.strip, tested) if line and not line.startswith("#")),
    }


def _of_extra(lines: list[str], extra: str) -> list[str]:
    return [line.partition(";")[0].strip() for line in lines if re.search(rf"extra == ['\"]{extra}['\"]", line)]


def _installed() -> list[str]:
    """The versions in this environment, as constraints."""
    return sorted({f"{dist.name}=={dist.version}" for dist in metadata.distributions() if dist.name != "rslp"})
