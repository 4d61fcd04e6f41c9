"""Which files are the code: those of the checkout that git knows or would take, or those of the installed package."""

from __future__ import annotations

import fnmatch
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import rslp
from rslp.launch.secrets import is_secret_name, secret_values

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
