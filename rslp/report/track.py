"""Send the figures of an evaluation's errors to the trackers of a run."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image

from rslp.report.contents import RunContents, name_of
from rslp.report.results import task_pictures
from rslp.rundir import RunDir
from rslp.train.trackers import CLASSES


def send_figures(run: RunDir, names: Sequence[str]) -> None:
    """Send confusion matrices, reliability, precision over recall and scatter plots of the best checkpoint.

    Args:
        run: the run.
        names: its trackers.
    """
    contents = RunContents.read(run)
    trackers = [CLASSES[name](str(run.path)) for name in names]
    for split, one in contents.splits.items():
        for key, details in one.details.items():
            for picture in task_pictures(name_of(*key), details):
                image = Image.open(io.BytesIO(picture.png())).convert("RGB")
                for tracker in trackers:
                    tracker.show(f"{split}/{picture.name}", image, one.evaluation.step)
    for tracker in trackers:
        tracker.finalize("success")
