"""The code snapshot, one zip without secrets that is named by its hash; and the record of a run's software."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import os
import platform
import re
import subprocess
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from dotenv import dotenv_values

import rslp
from rslp.errors import LaunchError
from rslp.io import write_atomic
from rslp.rundir import RUN_FILES, RunDir

# Files that hold secrets, by their names, and folders of such files; samples and public keys do not.
_SECRET_FILES = (
    *(".env", ".env.*", "*.env", ".netrc", ".pypirc", ".npmrc", ".pgpass", ".git-credentials", ".htpasswd"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "id_rsa*", "id_ecdsa*", "id_ed25519*"),
    *("*credentials*.json", "*service_account*.json", "*service-account*.json", "client_secret*.json"),
    *("kubeconfig", ".dockercfg"),
)
_SECRET_FOLDERS = frozenset({".ssh", ".aws", ".gnupg", ".azure", ".gcloud", ".kube", ".docker", ".beaker", "secrets"})
_NOT_SECRET = ("*.example", "*.sample", "*.template", "*.pub")

# Names of environment variables with secret values.
_SECRET_VARIABLE = re.compile(
    r"TOKEN|SECRET|PASSW|PASSPHRASE|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|(^|_)KEY$|CREDENTIAL|(^|_)PAT$", re.IGNORECASE
)
# Shorter values are not searched for. Characters.
_SHORTEST_SECRET = 8

# Patterns of keys and tokens, by their names in messages. The first one is split, so that it does not match this file.
_KEY_PATTERNS = {
    "a private key": re.compile(rb"-----" + rb"BEGIN (?:[A-Z]+ )*PRIVATE KEY" + rb"-----"),
    "an AWS access key": re.compile(rb"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    "a GitHub token": re.compile(rb"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60})"),
    "a Hugging Face token": re.compile(rb"\bhf_[A-Za-z0-9]{34}\b"),
    "a Google API key": re.compile(rb"\bAIza[A-Za-z0-9_-]{35}\b"),
    "a Slack token": re.compile(rb"\bxox[abprs]-[A-Za-z0-9-]{20,}"),
}
_LOGIN_IN_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/\s@'\"]+@")
HIDDEN = "***"


def is_secret_name(name: str) -> bool:
    """Whether a file with this name holds secrets; samples (``.env.example``) and public keys do not."""
    path = PurePosixPath(name)
    base = path.name.lower()
    if any(fnmatch.fnmatch(base, pattern) for pattern in _NOT_SECRET):
        return False
    in_folder = any(part in _SECRET_FOLDERS for part in path.parts[:-1])
    return in_folder or any(fnmatch.fnmatch(base, pattern) for pattern in _SECRET_FILES)


def is_secret_variable(name: str) -> bool:
    """Whether an environment variable with this name has a secret value."""
    return _SECRET_VARIABLE.search(name) is not None


def secret_values(
    environment: Mapping[str, str], *, texts: Iterable[str] = (), urls: Iterable[str] = ()
) -> frozenset[str]:
    """Collect secret values.

    Args:
        environment: environment variables; the values of those with the name of a secret are collected.
        texts: contents of ``.env`` files, of which the same holds.
        urls: URLs, such as those of git remotes; users and passwords in them are collected.

    Returns:
        the values, without short ones, plain words, numbers and paths, which would be found everywhere.
    """
    pairs = [
        *environment.items(),
        *(pair for text in texts for pair in dotenv_values(stream=io.StringIO(text)).items()),
    ]
    values = {value for name, value in pairs if value and is_secret_variable(name)}
    for url in urls:
        parts = urlsplit(url)
        values |= {part for part in (parts.password, parts.username if parts.password is None else None) if part}
    return frozenset(value for value in values if _is_distinctive(value))


def _is_distinctive(value: str) -> bool:
    plain = value.startswith(("/", "~", "./", "${")) or "://" in value or re.fullmatch(r"[a-z]+|[A-Z]+|\d{1,11}", value)
    return len(value) >= _SHORTEST_SECRET and not plain and not any(c.isspace() for c in value)


def find_secret(content: bytes, known: Iterable[str]) -> str | None:
    """The kind of secret that a file's content has in it, for messages; None when there is none."""
    for kind, pattern in _KEY_PATTERNS.items():
        if pattern.search(content):
            return kind
    if any(value.encode() in content for value in known):
        return "the value of a secret of this machine's environment or .env"
    return None


def holds_login(text: str) -> bool:
    """Whether a URL in a text has a user or password in it."""
    return _LOGIN_IN_URL.search(text) is not None


def redact(text: str, known: Iterable[str]) -> str:
    """Replace known secrets, keys, and users and passwords in URLs by ``***``."""
    for value in sorted(known, key=lambda value: (-len(value), value)):
        text = text.replace(value, HIDDEN)
    for pattern in _KEY_PATTERNS.values():
        text = re.sub(pattern.pattern.decode(), HIDDEN, text)
    return _LOGIN_IN_URL.sub(rf"\g<scheme>{HIDDEN}@", text)


# Untracked data and results, by their names; code is never of these kinds.
_DATA_FILES = (
    *("*.tif", "*.tiff", "*.npy", "*.npz", "*.h5", "*.nc", "*.parquet", "*.ckpt", "*.pt", "*.pth", "*.safetensors"),
    *("*.zip", "*.tar", "*.gz", "*.zst"),
)
_RESULT_FOLDERS = frozenset(
    {"project_data", "wandb", "lightning_logs", "__pycache__", ".git", ".venv", "venv", "node_modules"}
)


@dataclass(frozen=True)
class Tree:
    """The files of the code on this machine.

    Attributes:
        root: the folder that the names start from.
        names: the files of the snapshot, sorted, with ``/`` between folders.
        left_out: other files of a checkout: secrets, data and results; sorted.
        commit: the commit of the checkout; None for an installed package.
        diff: ``git diff`` of the tracked files against the commit.
        remotes: URLs of the checkout's remotes, maybe with tokens: they are never written anywhere.
    """

    root: Path
    names: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    commit: str | None = None
    diff: str = ""
    remotes: tuple[str, ...] = ()


def code_tree(package: Path | None = None) -> Tree:
    """List the files of the code: of a git checkout, or of an installed package.

    Args:
        package: the folder of the package ``rslp``; that of this process when None.
    """
    package = package or Path(rslp.__file__).parent
    root = package.parent
    if (root / "pyproject.toml").is_file() and _git(root, "rev-parse", "--show-cdup") == "":
        return _checkout(root)
    names = [*_files_below(package, root), *_files_below(root / "data" / "helios", root, pattern="*.yaml")]
    return Tree(root, tuple(sorted(names)))


def known_secrets(tree: Tree) -> frozenset[str]:
    """The secret values of the environment, of ``.env`` files in the tree's root, and of its remotes."""
    files = [path for pattern in (".env", ".env.*", "*.env") for path in sorted(tree.root.glob(pattern))]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files if path.is_file()]
    return secret_values(os.environ, texts=texts, urls=tree.remotes)


def _checkout(root: Path) -> Tree:
    tracked = _git_files(root, "--cached")
    untracked = _git_files(root, "--others", "--exclude-standard")
    selected = {name for name in tracked if not is_secret_name(name)}
    selected |= {name for name in untracked if not is_secret_name(name) and not _is_data(name, root)}
    names = sorted(name for name in selected if _is_code_file(root, name))
    return Tree(
        root=root,
        names=tuple(names),
        left_out=tuple(sorted({*tracked, *untracked} - set(names))),
        commit=_git(root, "rev-parse", "HEAD"),
        diff=_git(root, "diff", "HEAD", "--no-ext-diff", "--no-color", "--", ".") or "",
        remotes=tuple((_git(root, "config", "--get-regexp", r"^remote\..*\.url$") or "").split()[1::2]),
    )


def _git_files(root: Path, *options: str) -> set[str]:
    return {name for name in (_git(root, "ls-files", "-z", *options) or "").split("\0") if name}


def _is_data(name: str, root: Path) -> bool:
    """Whether an untracked file is data or a result, by its name or because it is in an rslearn dataset or a run."""
    parts = name.split("/")
    if _RESULT_FOLDERS.intersection(parts) or any(
        fnmatch.fnmatch(parts[-1].lower(), pattern) for pattern in _DATA_FILES
    ):
        return True
    folders = [root.joinpath(*parts[:depth]) for depth in range(1, len(parts))]
    return any((folder / "windows").is_dir() or (folder / "checkpoints").is_dir() for folder in folders)


def _is_code_file(root: Path, name: str) -> bool:
    """Whether a file exists and is in the checkout, after following links."""
    path = root / name
    return path.is_file() and path.resolve().is_relative_to(root.resolve())


def _files_below(folder: Path, root: Path, *, pattern: str = "*") -> list[str]:
    paths = (path for path in sorted(folder.rglob(pattern)) if path.is_file() and "__pycache__" not in path.parts)
    return [path.relative_to(root).as_posix() for path in paths]


def _git(root: Path, *words: str) -> str | None:
    """The output of a git command; None when there is no git, or no checkout."""
    # Within a git hook, these variables would point git to another checkout.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        finished = subprocess.run(["git", "-C", str(root), *words], capture_output=True, check=True, env=environment)
    except (OSError, subprocess.CalledProcessError):
        return None
    text = finished.stdout.decode("utf-8", errors="surrogateescape")
    return text if words[0] in ("ls-files", "diff") else text.strip()


# SHA-256 of the snapshot; set by bootstrap.py, which unpacks it in a job.
CODE_VARIABLE = "RSLP_CODE"
_MAX_DIFF = 1_000_000


def record_software(run: RunDir) -> None:
    """Write ``environment.txt`` to the run directory, and ``code.json`` unless the launcher has sent the code."""
    write_atomic(run.environment, freeze())
    if CODE_VARIABLE not in os.environ:
        tree = code_tree()
        write_atomic(run.code, code_record(tree, known_secrets(tree)))


def freeze() -> str:
    """Python and the packages of this process, as ``pip freeze`` lists them; no environment variables."""
    head = f"# Python {platform.python_version()}, {platform.platform()}"
    return "\n".join([head, *sorted(_packages(), key=str.lower)]) + "\n"


def _packages() -> Iterator[str]:
    names = set()
    for package in metadata.distributions():
        name, version = _name_and_version(package)
        # Of several with one name, the first on the path is imported.
        if name is not None and name.lower() not in names:
            names.add(name.lower())
            yield _pinned(name, version, package)


def _name_and_version(package: metadata.Distribution) -> tuple[str | None, str | None]:
    """Name and version from the head of a package's metadata: parsing all of it would take too long at each start."""
    head = (package.read_text("METADATA") or package.read_text("PKG-INFO") or "").partition("\n\n")[0]
    lines = [line for line in reversed(head.splitlines()) if line.startswith(("Name: ", "Version: "))]
    fields = dict(line.split(": ", 1) for line in lines)
    return fields.get("Name"), fields.get("Version")


def _pinned(name: str, version: str | None, package: metadata.Distribution) -> str:
    """A line of ``pip freeze``."""
    text = package.read_text("direct_url.json")
    if text is None:
        return f"{name}=={version}"
    origin: Mapping[str, Any] = json.loads(text)
    if commit := origin.get("vcs_info", {}).get("commit_id"):
        return f"{name} @ {redact(origin['url'], ())}@{commit}"
    return f"{name}=={version}  # from a folder or file"


def code_record(tree: Tree, secrets: frozenset[str], *, snapshot: str | None = None) -> str:
    """The content of ``code.json``: version, commit, difference from it, hash of the snapshot.

    Args:
        tree: the code.
        secrets: values that must not be written.
        snapshot: SHA-256 of the snapshot; None when the code runs without one.
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


MANIFEST = "snapshot.json"
MAX_BYTES = 50_000_000
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Snapshot:
    """The code as a zip.

    Attributes:
        content: the zip's bytes; the same code gives the same bytes on every machine.
        tree: the files.
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
        """The zip's path in a run directory."""
        return f"{RUN_FILES.snapshots.name}/{self.digest}.zip"

    def record(self) -> str:
        """The content of ``code.json``."""
        return code_record(self.tree, self.secrets, snapshot=self.digest)


def take_snapshot(tree: Tree | None = None, *, max_bytes: int = MAX_BYTES) -> Snapshot:
    """Make the snapshot of the code.

    Args:
        tree: the code; that of this process when None.
        max_bytes: largest size of all files together, bytes.

    Raises:
        LaunchError: the files are too large, or one of them has a secret in it.
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
    problems = [f"{name} holds {kind}" for name, content in files.items() if (kind := find_secret(content, secrets))]
    if problems:
        raise LaunchError(
            f"the code can't be sent: {'; '.join(problems[:5])}. Remove it, or list the file in .gitignore"
        )
    manifest = json.dumps(_manifest(tree), indent=1, sort_keys=True).encode() + b"\n"
    return Snapshot(_zip({**files, MANIFEST: manifest}), tree, secrets)


def send(snapshot: Snapshot, run: RunDir) -> None:
    """Write the snapshot to a run directory, a folder or on an object store, unless the same bytes are there."""
    # The bytes are compared, not the size: every job would refuse a damaged snapshot.
    if run.files().read(snapshot.name) != snapshot.content:
        run.files().write(snapshot.name, snapshot.content)


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    # Not compressed: versions of zlib compress the same content to different bytes.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            archive.writestr(entry, files[name])
    return buffer.getvalue()


def _manifest(tree: Tree) -> dict[str, Any]:
    """Python and packages that the code requires, for the job's bootstrap, which can't import the code yet."""
    project = tree.root / "pyproject.toml"
    if project.is_file() and "pyproject.toml" in tree.names:
        table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        python, requirements = table["requires-python"], table["dependencies"]
        extras = table.get("optional-dependencies", {})
    else:
        about = metadata.metadata("rslp")
        python, lines = about["Requires-Python"] or ">=3.11", metadata.requires("rslp") or []
        requirements = [line for line in lines if "extra ==" not in line]
        extras = {name: _requirements_of_extra(lines, name) for name in ("s3", "gs")}
    constraints = tree.root / "constraints.txt"
    tested = constraints.read_text(encoding="utf-8").split("\n") if "constraints.txt" in tree.names else _installed()
    return {
        "schema": 1,
        "python": python,
        "requirements": sorted(requirements),
        "extras": {name: sorted(extras.get(name, [])) for name in ("s3", "gs")},
        "constraints": sorted(line for line in map(str.strip, tested) if line and not line.startswith("#")),
    }


def _requirements_of_extra(lines: list[str], extra: str) -> list[str]:
    return [line.partition(";")[0].strip() for line in lines if re.search(rf"extra == ['\"]{extra}['\"]", line)]


def _installed() -> list[str]:
    """The packages of this environment, as constraints."""
    return sorted({f"{dist.name}=={dist.version}" for dist in metadata.distributions() if dist.name != "rslp"})
