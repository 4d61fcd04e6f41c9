"""Copy a run directory between an object store and this machine, so that what lies in the store can always go on.

The order is the contract. A checkpoint knows the best scores so far and how far the log was: the log and the best
checkpoints go before it. The state follows, and the markers of success come last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rslp.errors import StoreError
from rslp.files import Store
from rslp.launch import lease

LAST, PREVIOUS = "checkpoints/last.ckpt", "checkpoints/previous.ckpt"
STATE, DONE, PREDICTED = "state.json", "DONE.json", "predictions.json"
_IN_ORDER = (LAST, STATE, DONE, PREDICTED)
_PREDICTIONS = "predictions/"
_STAY = frozenset({"lock", "predict.lock", lease.NAME, PREVIOUS})
_STAYING_FOLDERS = frozenset({"code"})

Signature = tuple[int, int, int]


def pull(store: Store, folder: Path, *, predictions: bool = False) -> None:
    """Get a run from the store: its config, checkpoints, log, evaluations; not the code.

    Args:
        store: the run directory.
        folder: where the copy is made.
        predictions: whether what was predicted is wanted, too.

    Raises:
        StoreError: the store can't be reached, or an object does not arrive whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in sorted(store.sizes().items()):
        if name != PREVIOUS and not _travels(name):
            continue
        if name.startswith(_PREDICTIONS) and not predictions:
            continue
        target = folder / name
        try:
            store.download(name, target)
        except FileNotFoundError:
            # Replaced or removed since the listing; what a run needs is never removed.
            continue
        if target.stat().st_size != size and store.sizes().get(name) != target.stat().st_size:
            raise StoreError(f"{store.url(name)} did not arrive whole")


@dataclass
class Pusher:
    """Sends what has changed in a run directory to the store.

    Attributes:
        folder: the run directory on this machine.
        sent: what lies in the store already, by name.
    """

    folder: Path
    sent: dict[str, Signature] = field(default_factory=dict)

    def nothing_new(self) -> None:
        """Take all that is here now for sent, as it is after a pull."""
        self.sent = {name: _signature(self.folder / name) for name in self._names()}

    def push(self, store: Store) -> int:
        """Send what has changed since the last time.

        Returns:
            how many files were sent.

        Raises:
            StoreError: the store can't be reached; what did not go stays unsent.
        """
        before = dict(self.sent)
        done = (self.folder / DONE).exists()
        if not done and self.sent.pop(DONE, None) is not None:
            store.delete(DONE)
        self._forget_predictions(store)
        # A second name for the checkpoint that is the last one now: what is sent before it is at least as new.
        last = self._staged_last()
        for name in self._names():
            if name not in _IN_ORDER:
                self._send(store, name, self.folder / name)
        if last is not None:
            self._send_last(store, last)
        for name in (STATE, *((DONE,) if done else ()), PREDICTED):
            self._send(store, name, self.folder / name)
        return sum(before.get(name) != signature for name, signature in self.sent.items())

    def _forget_predictions(self, store: Store) -> None:
        """Remove from the store what a new prediction has removed here: windows of two would lie side by side."""
        for name in [name for name in self.sent if name == PREDICTED or name.startswith(_PREDICTIONS)]:
            if not (self.folder / name).exists():
                store.delete(name)
                del self.sent[name]

    def _names(self) -> Iterator[str]:
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if _travels(name) and path.is_file():
                yield name

    def _staged_last(self) -> Path | None:
        staged = self.folder / ".sending" / "last.ckpt"
        staged.parent.mkdir(parents=True, exist_ok=True)
        staged.unlink(missing_ok=True)
        try:
            staged.hardlink_to(self.folder / LAST)
        except FileNotFoundError:
            return None
        return staged

    def _send_last(self, store: Store, staged: Path) -> None:
        if self.sent.get(LAST) != _signature(staged) and LAST in self.sent:
            store.copy(LAST, PREVIOUS)
        self._send(store, LAST, staged)

    def _send(self, store: Store, name: str, path: Path) -> None:
        try:
            signature = _signature(path)
            if self.sent.get(name) != signature:
                store.upload(path, name)
                self.sent[name] = signature
        except FileNotFoundError:
            # Removed meanwhile.
            return


def _travels(name: str) -> bool:
    parts = name.split("/")
    hidden = any(part.startswith(".") for part in parts)
    return not hidden and name not in _STAY and parts[0] not in _STAYING_FOLDERS


def _signature(path: Path) -> Signature:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
