"""Starts of runs that may differ in nothing that counts, and everything that they leave behind.

Each process has a ``PYTHONHASHSEED``, a time zone and a locale of its own, and lists directories in an order of its own
(``SHUFFLED``).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rslp.cli.main import main as rslp_main
from rslp.rundir import RunDir

SHUFFLED = "RSLP_TESTS_SHUFFLED"


def environment_of(seed: int) -> dict[str, str]:
    """What sets a process apart from those of other seeds: hashes of strings, order of directories, zone, locale."""
    zone, locale = (("UTC", "C.UTF-8"), ("Asia/Kathmandu", "C"), ("America/Caracas", "POSIX"))[seed % 3]
    apart = {"PYTHONHASHSEED": str(seed), SHUFFLED: str(seed), "TZ": zone, "LC_ALL": locale}
    return apart | {"OMP_NUM_THREADS": "1"}


def shuffle_listings(seed: str) -> None:
    """Have this process list every directory in an order of its own."""
    rng, listdir, scandir = random.Random(seed), os.listdir, os.scandir

    def shuffled(path: Any = ".") -> list[str]:
        return rng.sample(found := listdir(path), len(found))

    class Scan:
        def __init__(self, path: Any = ".") -> None:
            with scandir(path) as entries:
                found = list(entries)
            self._entries = iter(rng.sample(found, len(found)))

        def __iter__(self) -> Iterator[Any]:
            return self._entries

        def __next__(self) -> Any:
            return next(self._entries)

        def __enter__(self) -> Scan:
            return self

        def __exit__(self, *_: object) -> None:
            self.close()

        def close(self) -> None:
            self._entries = iter(())

    os.listdir, os.scandir = shuffled, Scan  # type: ignore[assignment]


def left_by_run(run: RunDir) -> dict[str, str]:
    """A digest of everything in a run directory that training and evaluation make, by name."""
    # Imported here, as all that takes long: a process that writes texts alone starts at once.
    from rslp.train.checkpoints import read_checkpoint

    found = {
        f"{path.name}: {part}": digest_of(value)
        for path in sorted(run.checkpoints.glob("*.ckpt"))
        for part, value in read_checkpoint(path).items()
        if part in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "epoch", "global_step")
    }
    found["metrics.csv"] = digest_of(run.metrics.read_text())
    for path in sorted(run.path.glob("eval/**/*.json")):
        content = json.loads(path.read_text())
        # The file holds paths, and so names the run's folder.
        del content["checkpoint_sha256"]
        found[path.name] = digest_of(content)
    return found


def left_in_caches(folder: Path) -> dict[str, str]:
    """A digest of each window index and of each record of samples and features, wherever in their files these lie."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".cat":
            found |= _records(path, folder)
        elif path.suffix == ".idx":
            # The rest of its name says when it was made.
            name = path.name.rpartition("-")[0]
            found[f"{path.parent.name.rpartition('-')[0]}/{name}.idx"] = digest_of(path.read_bytes())
    return found


def _records(path: Path, folder: Path) -> dict[str, str]:
    """The records that a catalogue lists, by what they depend on."""
    from rslp.data.cache.segments import SegmentReader, read_entries

    reader, place = SegmentReader(path.parent, dataset=""), path.relative_to(folder)
    # Each process that keeps features has a catalogue of its own; of samples there is one for each kind of input.
    name = place.parent if "features" in place.parts else place
    found = {}
    for entry in read_entries(path)[0]:
        at = tuple(int(entry[key]) for key in ("segment", "offset", "payload", "head", "checksum"))
        found[f"{name}: {entry['fingerprint'].tolist()}"] = digest_of([bytes(part) for part in reader.read(at)])  # type: ignore[arg-type]
    return found


def digest_of(value: Any) -> str:
    """Of values in any structure, in its order."""
    made = hashlib.sha256()
    for part in _parts(value):
        made.update(part)
    return made.hexdigest()[:16]


def _parts(value: Any) -> Iterator[bytes]:
    import numpy as np
    import torch

    if isinstance(value, Mapping):
        for key, item in value.items():
            yield repr(key).encode()
            yield from _parts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item)
    elif isinstance(value, torch.Tensor):
        yield value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"none"
    elif isinstance(value, np.ndarray):
        yield value.tobytes()
    else:
        yield value if isinstance(value, bytes) else repr(value).encode()


def unlike(starts: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Where starts (by name, see ``left_by``) differ from the first of them."""
    (first, wanted), *others = starts.items()
    return [
        f"{what}: {first} is not {name}"
        for name, found in others
        for what in dict.fromkeys((*wanted, *found))
        if wanted.get(what) != found.get(what)
    ]


def _write_tables() -> None:
    """The tables that are shipped, as ``make schema`` writes them."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
    from make_schema import json_schema
    from make_vocabulary import render, vocabulary

    Path("schema.json").write_text(json.dumps(json_schema(), indent=2))
    Path("vocabulary.json").write_text(render(vocabulary()))


if __name__ == "__main__":
    # Commands of rslp, each a line of words; "tables" makes the shipped ones.
    shuffle_listings(os.environ[SHUFFLED])
    for line in sys.argv[1:]:
        if line == "tables":
            _write_tables()
        elif code := rslp_main(line.split()):
            sys.exit(code)
