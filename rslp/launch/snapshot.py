"""The code snapshot: the code's files, without secrets, as one zip named by its content; a run's software."""

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

import rslp
from rslp.errors import LaunchError
from rslp.io import ObjectStore, full_disk, is_remote, write_atomic
from rslp.rundir import RunDir

_NAMES = (
    *(
        ".env",
        ".env.*",
        "*.env",
        ".netrc",
        ".pypirc",
        ".npmrc",
        ".pgpass",
        ".git-credentials",
        ".htpasswd",
        ".dockercfg",
    ),
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "id_rsa*", "id_ecdsa*", "id_ed25519*"),
    *("*credentials*.json", "*service_account*.json", "*service-account*.json", "client_secret*.json", "kubeconfig"),
)
_FOLDERS = frozenset({".ssh", ".aws", ".gnupg", ".azure", ".gcloud", ".kube", ".docker", ".beaker", "secrets"})
_SAMPLES = ("*.example", "*.sample", "*.template", "*.pub")

# An environment variable of such a name holds a value that nobody else may see.
_SECRET_VARIABLE = re.compile(
    r"TOKEN|SECRET|PASSW|PASSPHRASE|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|(^|_)KEY$|CREDENTIAL|(^|_)PAT$", re.IGNORECASE
)
_SHORTEST = 8

# Forms that are keys wherever they stand, each with what it is. The texts are put together here so that this file
# itself is not taken for one.
_FORMS = {
    "a private key": re.compile(rb"-----" + rb"BEGIN (?:[A-Z]+ )*PRIVATE KEY" + rb"-----"),
    "an AWS access key": re.compile(rb"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    "a GitHub token": re.compile(rb"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60})"),
    "a Hugging Face token": re.compile(rb"\bhf_[A-Za-z0-9]{34}\b"),
    "a Google API key": re.compile(rb"\bAIza[A-Za-z0-9_-]{35}\b"),
    "a Slack token": re.compile(rb"\bxox[abprs]-[A-Za-z0-9-]{20,}"),
}
_IN_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/\s@'\"]+@")
HIDDEN = "***"


def is_secret_name(name: str) -> bool:
    """Whether a file's name says that it holds a secret; samples (``.env.example``) and public keys do not."""
    path = PurePosixPath(name)
    base = path.name.lower()
    if any(fnmatch.fnmatch(base, pattern) for pattern in _SAMPLES):
        return False
    return any(part in _FOLDERS for part in path.parts[:-1]) or any(
        fnmatch.fnmatch(base, pattern) for pattern in _NAMES
    )


def is_secret_variable(name: str) -> bool:
    """Whether the name of an environment variable says that its value is a secret."""
    return _SECRET_VARIABLE.search(name) is not None


def secret_values(
    environment: Mapping[str, str], *, texts: Iterable[str] = (), urls: Iterable[str] = ()
) -> frozenset[str]:
    """The secret values that this machine knows of.

    Args:
        environment: variables and their values; those whose name speaks of a secret count.
        texts: contents of ``.env`` files, whose lines are taken in the same way.
        urls: addresses that may carry a user's token, as git remotes do.

    Returns:
        the values. Short ones, switches and paths are left out: they would be found everywhere.
    """
    pairs = [*environment.items(), *(pair for text in texts for pair in _assignments(text))]
    found = {value for name, value in pairs if is_secret_variable(name)}
    for url in urls:
        parts = urlsplit(url)
        found |= {part for part in (parts.password, parts.username if parts.password is None else None) if part}
    return frozenset(value for value in found if _telling(value))


def _assignments(text: str) -> list[tuple[str, str]]:
    pairs = []
    for line in text.splitlines():
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        if equals and not name.startswith("#"):
            pairs.append((name.strip(), value.strip().strip("'\"")))
    return pairs


def _telling(value: str) -> bool:
    plain = value.startswith(("/", "~", "./", "${")) or "://" in value or re.fullmatch(r"[a-z]+|[A-Z]+|\d{1,11}", value)
    return len(value) >= _SHORTEST and not plain and not any(c.isspace() for c in value)


def find_secret(content: bytes, known: Iterable[str]) -> str | None:
    """What kind of secret a file holds, in words without the secret; None when none is found."""
    for what, form in _FORMS.items():
        if form.search(content):
            return what
    if any(value.encode() in content for value in known):
        return "the value of a secret of this machine's environment or .env"
    return None


def holds_login(text: str) -> bool:
    """Whether a URL in a text has a user or password in it."""
    return _IN_URL.search(text) is not None


def redact(text: str, known: Iterable[str]) -> str:
    """A text without known secrets, keys, and users and passwords in URLs."""
    for value in sorted(known, key=lambda value: (-len(value), value)):
        text = text.replace(value, HIDDEN)
    for form in _FORMS.values():
        text = re.sub(form.pattern.decode(), HIDDEN, text)
    return _IN_URL.sub(rf"\g<scheme>{HIDDEN}@", text)


# Data and results that lie around in a checkout untracked; code is never of these kinds.
_DATA = (
    *("*.tif", "*.tiff", "*.npy", "*.npz", "*.h5", "*.nc", "*.parquet", "*.ckpt", "*.pt", "*.pth", "*.safetensors"),
    *("*.zip", "*.tar", "*.gz", "*.zst"),
)
_RESULTS = frozenset(
    {"project_data", "wandb", "lightning_logs", "__pycache__", ".git", ".venv", "venv", "node_modules"}
)


@dataclass(frozen=True)
class Tree:
    """The code on this machine.

    Attributes:
        root: the folder that the names refer to.
        names: the files that travel, sorted, with ``/`` between folders.
        left_out: untracked files that do not, because they are secrets, data or results; sorted.
        commit: the commit of the checkout; None for an installed package.
        diff: what the tracked files differ from the commit by.
        remotes: the addresses of the checkout's remotes, as git has them, tokens and all; they are never written.
    """

    root: Path
    names: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    commit: str | None = None
    diff: str = ""
    remotes: tuple[str, ...] = ()


def code_tree(package: Path | None = None) -> Tree:
    """The code that runs here.

    Args:
        package: the folder of the package ``rslp``; that of this process when None.
    """
    package = package or Path(rslp.__file__).parent
    root = package.parent
    if (root / "pyproject.toml").is_file() and _git(root, "rev-parse", "--show-cdup") == "":
        return _checkout(root)
    names = [*_below(package, root), *_below(root / "data" / "helios", root, like="*.yaml")]
    return Tree(root, tuple(sorted(names)))


def known_secrets(tree: Tree) -> frozenset[str]:
    """The secret values of this machine's environment, of ``.env`` files in the tree, and of its remotes."""
    files = [path for like in (".env", ".env.*", "*.env") for path in sorted(tree.root.glob(like))]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files if path.is_file()]
    return secret_values(os.environ, texts=texts, urls=tree.remotes)


def _checkout(root: Path) -> Tree:
    tracked = _listed(root, "--cached")
    untracked = _listed(root, "--others", "--exclude-standard")
    travels = {name for name in tracked if not is_secret_name(name)}
    travels |= {name for name in untracked if not is_secret_name(name) and not _is_data(name, root)}
    names = sorted(name for name in travels if _is_code_file(root, name))
    return Tree(
        root=root,
        names=tuple(names),
        left_out=tuple(sorted({*tracked, *untracked} - set(names))),
        commit=_git(root, "rev-parse", "HEAD"),
        diff=_git(root, "diff", "HEAD", "--no-ext-diff", "--no-color", "--", ".") or "",
        remotes=tuple((_git(root, "config", "--get-regexp", r"^remote\..*\.url$") or "").split()[1::2]),
    )


def _listed(root: Path, *options: str) -> set[str]:
    return {name for name in (_git(root, "ls-files", "-z", *options) or "").split("\0") if name}


def _is_data(name: str, root: Path) -> bool:
    """Whether an untracked file is data or a result: by its kind, or because it lies in an rslearn dataset or a run."""
    parts = name.split("/")
    if _RESULTS.intersection(parts) or any(fnmatch.fnmatch(parts[-1].lower(), pattern) for pattern in _DATA):
        return True
    folders = [root.joinpath(*parts[:depth]) for depth in range(1, len(parts))]
    return any((folder / "windows").is_dir() or (folder / "checkpoints").is_dir() for folder in folders)


def _is_code_file(root: Path, name: str) -> bool:
    """A plain file that exists; a link counts if what it leads to is one and lies in the checkout."""
    path = root / name
    return path.is_file() and path.resolve().is_relative_to(root.resolve())


def _below(folder: Path, root: Path, *, like: str = "*") -> list[str]:
    found = (path for path in sorted(folder.rglob(like)) if path.is_file() and "__pycache__" not in path.parts)
    return [path.relative_to(root).as_posix() for path in found]


def _git(root: Path, *words: str) -> str | None:
    """What git says; None when there is no git, or no checkout."""
    # Variables of a git that calls us (a hook) would point it to another checkout.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        answer = subprocess.run(["git", "-C", str(root), *words], capture_output=True, check=True, env=environment)
    except (OSError, subprocess.CalledProcessError):
        return None
    text = answer.stdout.decode("utf-8", errors="surrogateescape")
    return text if words[0] in ("ls-files", "diff") else text.strip()


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
        store = ObjectStore(run_location, patience=patience)
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
