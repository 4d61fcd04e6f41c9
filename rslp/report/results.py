"""The sections of a run's results: metrics with intervals, samples, and what the model gets wrong."""

from __future__ import annotations

from typing import Any

import numpy as np

from rslp.evaluate.details import TaskDetails, confused
from rslp.evaluate.rows import MetricRow
from rslp.evaluate.samples import ShownSample
from rslp.figures import charts
from rslp.figures.picture import Picture
from rslp.figures.samples import SampleView, draw_sample
from rslp.io.terminal import counted
from rslp.report.contents import EvaluatedSplit, RunContents, name_of
from rslp.report.page import Blocks, Cell, Figures, Fold, Number, Table, Text
from rslp.train.metrics import THRESHOLD

_NOT_YET = "This run has no evaluation yet: launch it with --do_eval true once it has a best checkpoint."
# Of confusion matrices with more classes only the most frequent ones are drawn; the files have all.
_MOST_CLASSES, _MOST_NAMES = 20, 40
_AXIS = "bar: 95 % interval; line: baseline"


def sentences(split: EvaluatedSplit) -> list[str]:
    """For each task one sentence: its primary metric, how sure it is, the baseline, and the most frequent mistake."""
    return [_sentence(row, split) for row in split.primary]


def _sentence(row: MetricRow, split: EvaluatedSplit) -> str:
    name = name_of(row.dataset, row.task)
    if row.value is None:
        return f"{name}: {row.metric} has no value on the {split.evaluation.split} split, which lacks labels for it."
    text = f"{name}: {row.metric} is {Number(row.value)}"
    if row.low is not None and row.high is not None:
        text += f" (95 % interval {Number(row.low)} to {Number(row.high)}, over {row.n} windows)"
    else:
        text += f" (no interval; {row.n} windows)"
    if row.floor is not None:
        better = row.value > row.floor if row.higher_is_better else row.value < row.floor
        beyond = row.low if row.higher_is_better else row.high
        sure = beyond is not None and ((beyond > row.floor) == bool(row.higher_is_better)) and beyond != row.floor
        words = "better than" if better else "not better than"
        doubt = ", though its interval reaches that" if better and not sure and row.low is not None else ""
        text += f"; that is {words} the best constant prediction ({Number(row.floor)}){doubt}"
    details = split.details.get((row.dataset, row.task))
    return f"{text}.{_mistake(details) if details else ''}"


def _mistake(details: TaskDetails) -> str:
    counts = details.confusion()
    if counts is None:
        return ""
    if (found := confused(counts)) is None:
        return " It made no mistake here."
    label, predicted, count, total = found
    what = "samples" if details.kind == "classification" else "px"
    return (
        f" Its most frequent mistake: {_class(details, label)} taken for {_class(details, predicted)}, {count:,} of "
        f"{total:,} {what}."
    )


def _class(details: TaskDetails, number: int) -> str:
    return details.classes[number] if number < len(details.classes) else str(number)


def metrics(contents: RunContents) -> Blocks | str:
    """Metrics with intervals and baselines."""
    if (shown := contents.shown) is None:
        return _NOT_YET
    evaluation, by_metric = shown.evaluation, dict[str, list[charts.Bar]]()
    for row in shown.primary:
        if row.value is not None:
            bar = charts.Bar(name_of(row.dataset, row.task), row.value, row.low, row.high, mark=row.floor)
            by_metric.setdefault(row.metric, []).append(bar)
    pictures = [
        charts.intervals(f"metric-{metric}", f"{metric}, {evaluation.split} split", bars, axis=_AXIS)
        for metric, bars in by_metric.items()
    ]
    primary, every = list[list[Cell]](), list[list[Cell]]()
    for split, one in contents.splits.items():
        for row in one.evaluation.rows:
            name, ends = name_of(row.dataset, row.task), (Number(row.value), Number(row.low), Number(row.high))
            every.append([name, row.metric, row.class_name or "", split, *ends])
            if row.primary:
                primary.append([name, row.metric, split, *ends, Number(row.floor), Number(row.n, ",d")])
    head = ("dataset", "metric", "split", "value", "from", "to", "baseline", "windows")
    head_of_all = ("dataset", "metric", "class", *head[2:6])
    note = (
        f"Values are of {evaluation.checkpoint}, step {evaluation.step:,}. Intervals say how much a value would vary "
        "with other windows, of the same model: not how much it varies with the seed of the training."
    )
    return [
        Figures(pictures),
        Table("Primary metrics with 95 % intervals, and the best constant prediction as baseline", head, primary),
        Fold("All metrics", [Table("All metrics with 95 % intervals", head_of_all, every)]),
        Text([note]),
    ]


def samples(contents: RunContents) -> Blocks | str:
    """Samples with label and prediction: the worst, the median, and some at random."""
    if (shown := contents.shown) is None:
        return _NOT_YET
    if not shown.samples:
        return "The evaluation has no samples to show: it was made by an earlier version. Evaluate the run again."
    thresholds = {(r.dataset, r.task): r.value for r in shown.evaluation.rows if r.metric == THRESHOLD}
    note = (
        f"Of the {shown.evaluation.split} split; images are stretched between the 2nd and the 98th percentile of their "
        "values. The worst samples are those with the largest error; random ones are drawn without regard to it."
    )
    blocks: list[Text | Figures] = [Text([note])]
    for key in dict.fromkeys((sample.dataset, sample.task) for sample in shown.samples):
        details = shown.details.get(key)
        mine = [sample for sample in shown.samples if (sample.dataset, sample.task) == key]
        threshold = thresholds.get(key)
        threshold = 0.5 if threshold is None else threshold
        pictures = [_sample(number, sample, details, threshold) for number, sample in enumerate(mine)]
        legend = details.classes[:_MOST_NAMES] if details and details.kind == "segmentation" else ()
        blocks.append(Figures(pictures, legend, name_of(*key)))
    return blocks


def _sample(number: int, shown: ShownSample, details: TaskDetails | None, threshold: float) -> Picture:
    columns = details.sample(shown.group, shown.window, shown.bounds) if details else {}
    boxes = None
    if "true_boxes" in columns or "boxes" in columns:
        detections = zip(columns.get("boxes", ()), columns.get("scores", ()), strict=False)
        kept = [box for box, score in detections if score >= threshold]
        scaled = {"objects": columns.get("true_boxes", ()), "detections": kept}
        boxes = {name: [[end / shown.scale for end in box] for box in of_kind] for name, of_kind in scaled.items()}
    arrays = shown.arrays
    view = SampleView(
        arrays.get("image"), arrays.get("series"), shown.bands, arrays.get("truth"), arrays.get("prediction"), boxes
    )
    classes = len(details.classes) if details is not None and details.kind == "segmentation" else 0
    caption = f"{shown.group}/{shown.window}: {_caption(shown, columns, details, threshold)}"
    name = f"sample-{shown.dataset}-{shown.task}-{number}"
    return draw_sample(name, shown.reason, view, caption=caption, classes=classes)


def _caption(shown: ShownSample, columns: dict[str, Any], details: TaskDetails | None, threshold: float) -> str:
    """Label, prediction and error of a sample in words."""
    if details is not None and "probabilities" in columns:
        chosen = int(np.argmax(columns["probabilities"]))
        score = columns["probabilities"][chosen]
        return f"label {_class(details, columns['label'])}, predicted {_class(details, chosen)} with {score:.2f}."
    if "value" in columns:
        return f"label {columns['target']:.4g}, predicted {columns['value']:.4g}."
    if "true_boxes" in columns or "boxes" in columns:
        kept = sum(score >= threshold for score in columns.get("scores", ()))
        objects = len(columns.get("true_boxes", ()))
        drawn = f"{counted(objects, 'object')} (yellow, solid), {counted(kept, 'detection')} (pink, dashed)"
        return f"{drawn} with a score of at least {threshold:.2f}; {shown.error:.0f} missed or false."
    if "confusion_pixels" in columns:
        return f"{100 * shown.error:.1f} % of the labelled pixels are wrong."
    return f"mean absolute error of its pixels: {shown.error:.4g}."


def errors(contents: RunContents) -> Blocks | str:
    """Confusion matrices, reliability, precision and recall, scatter plots."""
    if (shown := contents.shown) is None:
        return _NOT_YET
    pictures = [picture for key, details in shown.details.items() for picture in task_pictures(name_of(*key), details)]
    return [Figures(pictures)] if pictures else "There are no predictions from which errors could be shown."


def task_pictures(name: str, details: TaskDetails) -> list[Picture]:
    """The figures of one task's errors."""
    pictures: list[Picture] = []
    if (counts := details.confusion()) is not None and counts.sum():
        pictures.append(_confusion(name, details, counts))
    if (reliability := details.reliability()) is not None:
        confidence, accuracy, _, error = reliability
        panel = charts.Panel(
            {"predictions": (confidence.tolist(), accuracy.tolist())}, diagonal=True, unit_square=True,
            x="score of the predicted class", y="share that is right",
        )  # fmt: skip
        text = (
            f"The expected calibration error is {error:.3f}. On the dotted line scores are as often right as they say"
        )
        pictures.append(
            charts.lines(f"reliability-{name}", f"{name}: reliability", [panel], text=text + ".", height=280)
        )
    if (curve := details.precision_recall()) is not None:
        recall, precision = curve
        best = int(np.argmax(2 * recall * precision / np.maximum(recall + precision, 1e-12)))
        text = f"At the best F1 recall is {recall[best]:.2f} and precision {precision[best]:.2f}."
        panel = charts.Panel(
            {"detections": (recall.tolist(), precision.tolist())}, unit_square=True, x="recall", y="precision"
        )
        title = f"{name}: precision and recall"
        pictures.append(charts.lines(f"precision-recall-{name}", title, [panel], text=text, height=280))
    if (points := details.points()) is not None:
        target, value, number = points
        text = f"{number:,} samples; labels from {target.min():.3g} to {target.max():.3g}, predictions from "
        panel = charts.Panel(
            {"samples": (target.tolist(), value.tolist())}, diagonal=True, x="label", y="prediction", dots=True
        )
        title = f"{name}: prediction against label"
        pictures.append(
            charts.lines(
                f"scatter-{name}", title, [panel], text=f"{text}{value.min():.3g} to {value.max():.3g}.", height=280
            )
        )
    return pictures


def _confusion(name: str, details: TaskDetails, counts: Any) -> Picture:
    """A confusion matrix in shares of each label; of many classes the most frequent ones."""
    present = np.flatnonzero(counts.sum(axis=0) + counts.sum(axis=1))
    frequent = present[np.argsort(-counts.sum(axis=1)[present], kind="stable")][:_MOST_CLASSES]
    chosen = np.sort(frequent)
    shares = counts[np.ix_(chosen, chosen)] / np.maximum(counts[chosen].sum(axis=1, keepdims=True), 1)
    labels = [_class(details, number) for number in chosen]
    texts = [[f"{100 * share:.0f}" for share in row] for row in shares]
    right = 100 * float(np.trace(counts)) / float(counts.sum())
    recalls = "; ".join(f"{label} {100 * shares[i, i]:.0f} %" for i, label in enumerate(labels))
    cut = f" The {_MOST_CLASSES} most frequent of {len(present)} classes." if len(present) > len(chosen) else ""
    text = f"{right:.1f} % are right. Right by label: {recalls}.{_mistake(details)}{cut}"
    title = f"{name}: predicted class by label, %"
    return charts.matrix(
        f"confusion-{name}", title, shares, texts, (labels, labels), axes=("label", "prediction"), text=text
    )
