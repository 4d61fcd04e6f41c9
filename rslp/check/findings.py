"""Findings of a check: errors and warnings, each with an id and the key of the run config; options of a check."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rslp.errors import KeyPath
from rslp.suggest import did_you_mean

# Ids and meanings of all findings. An id never changes: configs name it, and docs/check.md lists it.
CONFIG = "config"
FINDING_IDS: Mapping[str, str] = {
    CONFIG: "the run config can't be run as it stands: keys, types, classes, optimiser, callbacks",
    "folder": "a dataset's folder or `config.json` is missing or broken, or its windows can't be listed",
    "stray": "what lies among the windows is no window, and is left out",
    "no-effect": "an argument has no effect in a joint run",
    "split-empty": "a split has no windows",
    "layer-lacking": "some windows lack a layer, and are left out",
    "tag-spelling": "windows are not chosen by a tag since their option is spelt another way",
    "layer": "the dataset has no such layer, or one of another type",
    "band": "a layer has no such band",
    "band-order": "the normalisation or the encoder takes other bands than the input gives, or in another order",
    "image-size": "crops, windows or padded images are no multiple of the encoder's patch size",
    "alignment": "a transform changes images and not labels, labels and no image, or some modalities only",
    "unreadable": "windows can't be read",
    "image-nodata": "much of the images is nodata",
    "units": "images are in other units than the normalisation or the encoder takes",
    "band-units": "a band is in other units than the normalisation takes",
    "offset-some": "some windows seem to carry the offset of Sentinel-2's baseline 04.00, others not",
    "offset-all": "all windows seem to carry that offset",
    "band-constant": "a band holds a single value",
    "no-targets": "a task gets no targets",
    "background": "objects have the class that the detector takes for background",
    "label-unknown": "labels are not among the configured classes",
    "label-lacking": "windows have no label",
    "label-elsewhere": "features lie outside of their windows",
    "label-parts": "features of several parts become one box each",
    "label-several": "windows have labels of several values, of which the first is taken",
    "label-range": "label pixels hold a class beyond the task's",
    "label-nodata": "all label pixels are nodata",
    "label-number": "labels are no finite number",
    "label-constant": "all labels are the same",
    "label-unseen": "a held-out split has classes that training lacks",
    "label-part": "label files cover only a part of the windows",
    "label-nowhere": "label files cover nothing of the windows",
    "label-declared": "label files declare a nodata value that the task does not name",
    "forward": "two samples don't go through transforms, model and loss",
    "overlap": "held-out windows lie on training windows",
    "no-locations": "most windows have the same bounds, so that overlaps can't be found",
}
# Ids that can't be allowed, since no run can start with these errors.
UNANSWERABLE = (CONFIG, "folder")


@dataclass(frozen=True)
class CheckOptions:
    """How much of a config and its data is checked.

    Attributes:
        images: windows of each split whose images are read.
        labels: windows of each split whose labels are read.
        max_overlap: share of the held-out windows that may lie on training windows; more is an error.
        threads: how many windows are read at a time.
        data: whether the datasets are checked, beside the config.
        forward: whether two samples of each dataset are sent through the model.
        allow: ids of errors that become warnings in all datasets; the config may allow more for single datasets.
    """

    images: int = 16
    labels: int = 500
    max_overlap: float = 0.01
    threads: int = min(16, 4 + (os.cpu_count() or 1))
    data: bool = True
    forward: bool = True
    allow: Sequence[str] = ()


@dataclass(frozen=True)
class Finding:
    """One error or warning about a run config or its data.

    Attributes:
        what: what is wrong, what was got, what would be right.
        at: key path in the run config; where the config lacks the key, the nearest key above it is shown.
        error: whether the run must not start; else it is a warning.
        id: one of ``FINDING_IDS``.
        allowed: whether it is a warning only because the config allows it.
    """

    what: str
    at: KeyPath = ()
    error: bool = True
    id: str = CONFIG
    allowed: bool = False


def warning(what: str, at: KeyPath = (), *, id: str = CONFIG) -> Finding:
    """Make a finding that does not stop the run."""
    return Finding(what, at, error=False, id=id)


def downgrade_allowed(finding: Finding, allow: Sequence[str]) -> Finding:
    """Turn an error whose id is allowed into a warning; others are returned as they are."""
    if finding.error and finding.id in allow and finding.id not in UNANSWERABLE:
        return replace(finding, error=False, allowed=True)
    return finding


def unknown_ids(allow: Sequence[str], at: KeyPath) -> list[Finding]:
    """Find ids in a list of allowed ones that no finding has, or that can't be allowed; ``at`` is the list's key."""
    findings = []
    for id_ in allow:
        if id_ in UNANSWERABLE:
            findings.append(Finding(f"{id_!r} can't be allowed: nothing can be run with it", at))
        elif id_ not in FINDING_IDS:
            hint = did_you_mean(id_, FINDING_IDS, otherwise="known")
            findings.append(Finding(f"no finding has the id {id_!r}{hint}", at))
    return findings


def listed(names: object, most: int = 6) -> str:
    """Join names for a message, cut after a few: ``a, b, c and 4 more``."""
    words = [str(name) for name in names] if isinstance(names, list | tuple | set | dict) else [str(names)]
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more
