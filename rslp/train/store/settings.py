"""What a person can choose about the sample store."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StoreSettings:
    """What a person can choose.

    Attributes:
        store: ``auto``, ``off``, or a folder for the stores of all datasets.
        limit: bytes that one dataset's store may take, besides half of the free disk; None means no other limit.
        workers: processes that pack; None means one per processor.
        check_all: check every window at the start, also of a large dataset.
        read_timeout: seconds that a packer may read an input of a window; None means for ever.
    """

    store: str = "auto"
    limit: int | None = None
    workers: int | None = None
    check_all: bool = False
    read_timeout: float | None = None
