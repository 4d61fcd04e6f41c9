"""With which software a run was made: Python, every package with its version, and the code's commit and changes."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from rslp.files import write_atomic
from rslp.launch.secrets import redact
from rslp.launch.tree import Tree, code_tree, known_secrets
from rslp.run import RunDir

# Set by what unpacks the code in a job.
CODE_VARIABLE = "RSLP_CODE"
_MAX_DIFF = 1_000_000


def record_software(run: RunDir) -> None:
    """Write ``environment.txt``, and ``code.json`` unless the launcher wrote it when it sent the code.

    Args:
        run: the run directory.
    """
    write_atomic(run.path / "environment.txt", freeze())
    if CODE_VARIABLE not in os.environ:
        tree = code_tree()
        write_atomic(run.path / "code.json", code_record(tree, known_secrets(tree)))


def freeze() -> str:
    """Python and the packages of this process, as ``pip freeze`` lists them; no environment variables."""
    head = f"# Python {platform.python_version()}, {platform.platform()}"
    return "\n".join([head, *sorted(_packages(), key=str.lower)]) + "\n"


def _packages() -> Iterator[str]:
    seen = set()
    for found in metadata.distributions():
        name, version = _name_and_version(found)
        # What comes first on the path is what is imported.
        if name is not None and name.lower() not in seen:
            seen.add(name.lower())
            yield _pinned(name, version, found)


def _name_and_version(found: metadata.Distribution) -> tuple[str | None, str | None]:
    """From the head of a package's description; reading hundreds of them whole would hold up each start."""
    head = (found.read_text("METADATA") or found.read_text("PKG-INFO") or "").partition("\n\n")[0]
    fields = dict(
        line.split(": ", 1) for line in reversed(head.splitlines()) if line.startswith(("Name: ", "Version: "))
    )
    return fields.get("Name"), fields.get("Version")


def _pinned(name: str, version: str | None, found: metadata.Distribution) -> str:
    text = found.read_text("direct_url.json")
    if text is None:
        return f"{name}=={version}"
    origin: Mapping[str, Any] = json.loads(text)
    if commit := origin.get("vcs_info", {}).get("commit_id"):
        return f"{name} @ {redact(origin['url'], ())}@{commit}"
    return f"{name}=={version}  # from a folder or file"


def code_record(tree: Tree, secrets: frozenset[str], *, snapshot: str | None = None) -> str:
    """What ``code.json`` holds: version, commit, what differs from it, the snapshot's hash.

    Args:
        tree: the code.
        secrets: values that must not be written.
        snapshot: SHA-256 of the snapshot; None when the code ran where it lies.
    """
    diff = redact(tree.diff, secrets)
    content = {
        "schema": 1,
        "version": metadata.version("rslp"),
        "commit": tree.commit,
        "dirty": bool(diff),
        "diff": diff[:_MAX_DIFF],
        "diff_cut": len(diff) > _MAX_DIFF,
        "snapshot": snapshot,
    }
    return json.dumps(content, indent=1) + "\n"
