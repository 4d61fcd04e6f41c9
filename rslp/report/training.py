"""The sections of a run's training: learning curves, mixture, windows, throughput and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rslp.figures import charts
from rslp.figures.picture import Picture
from rslp.report.contents import RunContents, Series
from rslp.report.page import Blocks, Cell, Figures, Number, Table, Text
from rslp.train.metrics import PRIMARY

_PRIMARY = {primary.name for primary, _ in PRIMARY.values()}
_GIB = 2**30
_ORDER = ("train", "val", "test")


def curves(contents: RunContents) -> Blocks | str:
    """For each dataset its losses and its primary metric over the steps."""
    pictures = [picture for name in contents.datasets() if (picture := _curves(contents, name)) is not None]
    if score := contents.series.get("val/score"):
        best = max(score[1])
        text = f"The score is best at step {score[0][score[1].index(best)]:,}, with {best:.3f}."
        panel = charts.Panel({"score": score}, "score on validation", x="step")
        pictures.insert(0, charts.lines("curve-score", "All datasets: mean score", [panel], text=text))
    if not pictures:
        return "Nothing is logged yet: the first epoch is not over."
    note = "Losses of different datasets are in different units. A score is 0 at the baseline and 1 at the best value."
    return [Text([note]), Figures(pictures)]


def _curves(contents: RunContents, dataset: str) -> Picture | None:
    series = contents.series
    names = {"training": f"train/{dataset}/loss", "validation": f"val/{dataset}/loss"}
    # Torchvision's detectors have no loss outside of the training.
    losses = {label: series[name] for label, name in names.items() if any(series.get(name, ([], []))[1])}
    if not losses:
        return None
    ends = [f"the {label} loss goes from {y[0]:.3g} to {y[-1]:.3g}" for label, (_, y) in losses.items()]
    panels = [charts.Panel(losses, "loss", x="step")]
    metrics = {
        name.split("/")[-1]: values
        for name, values in series.items()
        if name.startswith(f"val/{dataset}/") and name.count("/") == 3 and name.split("/")[-1] in _PRIMARY
    }
    if metrics:
        floor = _floor(contents, dataset, next(iter(metrics)))
        level = None if floor is None else ("baseline", floor)
        # One metric has the colour of the validation.
        named = metrics if len(metrics) > 1 else {"validation": next(iter(metrics.values()))}
        panels.append(charts.Panel(named, ", ".join(metrics), "step", level=level))
        ends += [f"{name} goes from {y[0]:.3g} to {y[-1]:.3g}" for name, (_, y) in metrics.items()]
    text = "; ".join(ends) + "."
    return charts.lines(f"curve-{dataset}", dataset, panels, text=text[0].upper() + text[1:])


def _floor(contents: RunContents, dataset: str, metric: str) -> float | None:
    evaluated = contents.splits.get("val")
    rows = evaluated.primary if evaluated else ()
    return next((row.floor for row in rows if (row.dataset, row.metric) == (dataset, metric)), None)


def mixture(contents: RunContents) -> Blocks | str:
    """How many samples of each dataset each epoch has drawn."""
    prefix, suffix = "train/", "/samples"
    drawn: dict[str, Series] = {
        name.removeprefix(prefix).removesuffix(suffix): values
        for name, values in contents.series.items()
        if name.startswith(prefix) and name.endswith(suffix)
    }
    if not drawn:
        return "There are no numbers of drawn samples yet: each epoch logs them at its end (earlier versions did not)."
    steps = sorted({step for values in drawn.values() for step in values[0]})
    by_step = {name: dict(zip(*values, strict=True)) for name, values in drawn.items()}
    counts = {name: [by_step[name].get(step, 0.0) for step in steps] for name in drawn}
    totals = {name: sum(values) for name, values in counts.items()}
    every = sum(totals.values()) or 1.0
    parts = ", ".join(f"{name} {100 * total / every:.1f} %" for name, total in totals.items())
    rows: list[list[Cell]] = [
        [name, Number(total, ",.0f"), Number(100 * total / every, ".1f")] for name, total in totals.items()
    ]
    epochs = list(range(1, len(steps) + 1))
    picture = charts.shares_over_time(
        "mixture", "Samples drawn in each epoch", epochs, counts, text=f"In all: {parts}."
    )
    table = Table("Samples that were drawn in the whole training", ("dataset", "samples", "%"), rows)
    return [Figures([picture]), table]


def windows(contents: RunContents) -> Blocks | str:
    """A map of each dataset's windows by split."""
    groups: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in contents.windows:
        groups.setdefault(row["dataset"], {}).setdefault(row["split"], []).append((row["lon"], row["lat"]))
    for split, evaluated in contents.splits.items():
        for (dataset, _), details in evaluated.details.items():
            groups.setdefault(dataset, {}).setdefault(split, details.places())
    pictures = [picture for name in sorted(groups) if (picture := _map(name, groups[name])) is not None]
    if not pictures:
        return "The places of the windows are not known yet: they are written at the end of the training."
    note = (
        "Middles of the windows, at most 1,000 of each split and dataset. Splits that lie apart measure more honestly."
    )
    return [Text([note]), Figures(pictures)]


def _map(dataset: str, splits: dict[str, list[tuple[float, float]]]) -> Picture | None:
    # A window beyond the reach of its projection has no place.
    located = {
        split: [(lon, lat) for lon, lat in splits.get(split, ()) if math.isfinite(lon + lat)] for split in _ORDER
    }
    points = {split: of_split for split, of_split in located.items() if of_split}
    if not points:
        return None
    lon, lat = ([place[i] for of_split in points.values() for place in of_split] for i in (0, 1))
    counted = ", ".join(f"{len(of_split):,} {split}" for split, of_split in points.items())
    text = f"{counted}; longitude {min(lon):.2f} to {max(lon):.2f}, latitude {min(lat):.2f} to {max(lat):.2f}."
    return charts.places(f"map-{dataset}", dataset, points, text=text)


def usage(contents: RunContents) -> Blocks | str:
    """Samples per second and memory over the time of the training."""
    nothing: list[list[float]] = []
    rows = contents.tried(contents.run.usage_rows, nothing)
    speeds = _speeds(rows)
    if not speeds:
        return "There are no times yet: they are written with each checkpoint (earlier versions did not)."
    minutes = [seconds / 60 for seconds, _ in speeds]
    memory = [row[1] / 60 for row in rows], [row[3] / _GIB for row in rows]
    panels = [
        charts.Panel({"": (minutes, [speed for _, speed in speeds])}, "samples per second", "minutes", from_zero=True),
        charts.Panel({"": memory}, "peak memory, GiB", "minutes", from_zero=True),
    ]
    whole = rows[-1][2] / rows[-1][1] if rows[-1][1] else 0.0
    text = f"{whole:.3g} samples per second over all, with validation; peak memory {rows[-1][3] / _GIB:.2f} GiB."
    picture = charts.lines("usage", "Over the time of the training", panels, text=text)
    return [Text([text]), Figures([picture])]


def _speeds(rows: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Seconds at the end, and samples per second, of each part of the training."""
    parts = zip([[0.0] * 4, *rows], rows, strict=False)
    return [(now[1], (now[2] - then[2]) / (now[1] - then[1])) for then, now in parts if now[1] > then[1]]
