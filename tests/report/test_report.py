"""The report: its numbers are those of the files, it says what is missing, and a browser shows it as it should."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rslearn.train.model_context import RasterImage

import rslp
from rslp.cli.main import main
from rslp.evaluate.evaluation import evaluate
from rslp.evaluate.samples import _image, choose, read_samples, sample_error
from rslp.figures.samples import SampleView, draw_sample
from rslp.io import ObjectStore
from rslp.rundir import RunDir
from rslp.study.comparison import ArmResult, Cost, compare
from rslp.train.fit import fit
from tests.report.browser import PROGRAM, Browser, needs_browser
from tests.stores import BUCKET, store_server
from tests.study.made import write_evaluation
from tests.tiny import KINDS, four_datasets, run_config, write_run

RUN_SECTIONS = (
    *(
        "overview",
        "results",
        "samples",
        "errors",
        "curves",
        "mixture",
        "windows",
        "usage",
        "data",
        "config",
        "software",
    ),
)
STUDY_SECTIONS = ("overview", "found", "values", "differences", "transfer", "influence", "cost", "runs", "config")


class Reader(HTMLParser):
    """Tables by caption, sections with their text, and the descriptions of figures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.sections: dict[str, str] = {}
        self.figures: list[str] = []
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self._section = self._caption = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self._open.append(tag)
        if tag == "section":
            self._section = str(given["id"])
            self.sections[self._section] = ""
        elif tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        elif tag == "data":
            # The exact value stands for its text.
            self._rows[-1:] and self._rows[-1].__setitem__(-1, str(given["value"]))
        elif tag == "svg":
            assert given["role"] == "img"
            self.figures.append(str(given["aria-label"]))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass
        if tag == "table":
            self.tables[self._caption] = self._rows[1:]

    def handle_data(self, data: str) -> None:
        if self._section:
            self.sections[self._section] += data
        if "caption" in self._open:
            self._caption += data
        elif self._open and self._open[-1] in ("td", "th"):
            self._rows[-1][-1] += data.strip()


def read(page: str | Path) -> Reader:
    return Reader(Path(page).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("report")
    config = run_config(four_datasets(folder / "data", train=4, val=3, test=6), epochs=2)
    config["trainer"]["enable_progress_bar"] = False
    run = write_run(folder, config)
    assert fit(run) == 0
    evaluate(run, splits=("val", "test"))
    # A report needs nothing but the run directory.
    shutil.rmtree(folder / "data")
    return run


@pytest.fixture(scope="module")
def page(run: RunDir) -> Reader:
    return read(rslp.report(run))


@pytest.fixture(scope="module")
def begun(run: RunDir, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    begun = RunDir(tmp_path_factory.mktemp("begun") / "p" / "begun")
    begun.path.mkdir(parents=True)
    shutil.copy(run.config, begun.config)
    return begun


@pytest.fixture(scope="module")
def pages(run: RunDir, page: Reader, study: Path) -> dict[str, Path]:
    """The pages of the run and the study, which are there."""
    rslp.report(study)
    return {"run": run.report, "study": study / "report.html"}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arms, folder = tmp_path_factory.mktemp("arms"), tmp_path_factory.mktemp("studies") / "p" / "s"
    folder.mkdir(parents=True)
    qualities = {
        "single": {"crops": 0.5, "water": 0.5},
        "joint": {"crops": 0.95, "water": 0.5},
        "pair:crops+water": {"crops": 0.7, "water": 0.4},
        "without:crops": {"water": 0.4},
    }
    results = [
        ArmResult(name, seed, (write_evaluation(arms / str(number) / str(seed), of_arm, seed=seed, windows=40),), cost)
        for number, (name, of_arm) in enumerate(qualities.items())
        for seed in range(2)
        for cost in [Cost(1_000_000, 4800, 600, 123.4)]
    ]
    comparison = compare(results, reference="single", missing=[("joint", 2)])
    (folder / "comparison.json").write_text(json.dumps(comparison))
    runs = {f"s.{r.arm}.s{r.seed}": {"state": "done", "arm": r.arm, "seed": r.seed} for r in results}
    runs["s.joint.s2"] = {"state": "failed", "arm": "joint", "seed": 2, "reason": "memory <ran> out"}
    (folder / "arms.json").write_text(json.dumps({"study": "s", "runs": runs}))
    (folder / "study.yaml").write_text("arms: [joint, single]\n")
    return folder


def test_numbers_of_metrics_are_those_of_the_rows(run: RunDir, page: Reader) -> None:
    rows = [
        (split, row)
        for split in ("test", "val")
        for row in json.loads(run.evaluation(split, "best").read_text())["rows"]
    ]
    shown = next(table for caption, table in page.tables.items() if caption.startswith("All metrics"))
    text = lambda value: "" if value is None else repr(float(value))  # noqa: E731
    assert [tuple(row) for row in shown] == [
        (
            row["dataset"],
            row["metric"],
            row["class"] or "",
            split,
            *(text(row[end]) or "none" * False for end in ("value", "low", "high")),
        )
        for split, row in rows
    ]
    primary = next(table for caption, table in page.tables.items() if caption.startswith("Primary"))
    assert [row[6:] for row in primary] == [[text(r["floor"]), str(r["n"])] for _, r in rows if r["primary"]]


def test_errors_are_those_of_the_predictions(run: RunDir, page: Reader) -> None:
    table = pq.read_table(run.evaluation("test", "best").with_suffix(".parquet")).to_pandas()
    crops = table[table["dataset"] == "classify"]
    right = np.mean([np.argmax(p) == y for p, y in zip(crops["probabilities"], crops["label"], strict=True)])
    figure = next(text for text in page.figures if text.startswith("classify: predicted class by label"))
    assert f"{100 * right:.1f} % are right" in figure
    scatter = next(text for text in page.figures if text.startswith("regress: prediction against label"))
    assert f"{table['target'].min():.3g} to {table['target'].max():.3g}" in scatter
    assert any(text.startswith("classify: reliability") for text in page.figures)


def test_the_mixture_is_what_was_drawn_and_the_usage_is_recorded(run: RunDir, page: Reader) -> None:
    drawn: Counter[str] = Counter()
    with run.metrics.open(newline="") as handle:
        for row in csv.DictReader(handle):
            if row["name"].startswith("train/") and row["name"].endswith("/samples"):
                drawn[row["name"].split("/")[1]] += float(row["value"])
    assert dict(drawn) == dict.fromkeys(KINDS, 8.0), "two epochs of four windows"
    shown = next(table for caption, table in page.tables.items() if caption.startswith("Samples that were drawn"))
    assert {name: float(count) for name, count, _ in shown} == dict(drawn)
    steps, seconds, samples, memory = run.usage_rows()[-1]
    assert (steps, samples) == (16, 32) and seconds > 0 and memory > 2**27
    assert "samples per second over all" in page.sections["usage"]


def test_after_a_resume_usage_has_each_step_once(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for step in (10, 20, 30, 15, 25):
        run.append_usage(step=step, seconds=step, samples=step, memory=1)
    with run.usage.open("a") as log:
        log.write("35,1")
    assert [row[0] for row in run.usage_rows()] == [10, 15, 25]


def test_samples_are_chosen_by_their_error(run: RunDir) -> None:
    shown = read_samples(run.evaluation("test", "best").with_suffix(".npz"))
    assert Counter((one.dataset, one.reason) for one in shown) == {
        (kind, reason): count for kind in KINDS for reason, count in (("worst", 2), ("median", 1), ("random", 2))
    }
    for kind in KINDS:
        errors = {
            reason: [s.error for s in shown if (s.dataset, s.reason) == (kind, reason)]
            for reason in ("worst", "median")
        }
        assert min(errors["worst"]) >= errors["median"][0]
    segments = [one for one in shown if one.dataset == "segment"]
    for one in segments:
        wrong = (one.arrays["truth"] != one.arrays["prediction"]).mean()
        assert wrong == pytest.approx(one.error) and one.arrays["image"].shape == (8, 8)
    names = [f"w{number}" for number in range(9)]
    values = [0.1, float("nan"), 0.9, 0.3, 0.3, 0.2, 0.8, None, 0.5]
    chosen = {names[i]: reason for i, reason in choose(values, names)}
    assert chosen == {names[::-1][i]: reason for i, reason in choose(values[::-1], names[::-1])}, "in any order"
    assert {n for n, reason in chosen.items() if reason == "worst"} == {"w2", "w6"} and "w1" not in chosen


def test_a_window_of_one_pixel_is_shown_as_its_series() -> None:
    values = torch.arange(12, dtype=torch.float32).reshape(2, 6, 1, 1)
    bands, arrays = _image({"s1": RasterImage(values)}, {"s1": ["vv", "vh"]})
    assert bands == ("vv", "vh") and arrays["series"].tolist() == values[:, :, 0, 0].T.tolist()
    image = torch.rand(4, 3, 8, 8)
    bands, arrays = _image({"s1": RasterImage(values), "s2": RasterImage(image)}, {"s2": ["B02", "B03", "B04", "B08"]})
    assert bands == ("B04", "B03", "B02") and arrays["image"].shape == (8, 8, 3), "red, green and blue first"
    view = SampleView(None, values[:, :, 0, 0].T.numpy(), ("vv", "vh"))
    picture = draw_sample("a", "worst", view, caption="$x$ <b> 作物", classes=0)
    svg = picture.inline()
    assert 'aria-label="worst. $x$ &lt;b&gt; 作物"' in svg and "var(--ink)" in svg and "var(--s2)" in svg


def test_a_sample_without_image_is_shown_in_words(tmp_path: Path) -> None:
    assert _image({"vector": object()}, {}) == ((), {})
    entry = {
        "dataset": "d",
        "task": "t",
        "reason": "worst",
        "error": 1.0,
        "group": "g",
        "window": "w",
        "bounds": [0] * 4,
    }
    np.savez(tmp_path / "a.npz", index=np.array(json.dumps([entry])))
    (shown,) = read_samples(tmp_path / "a.npz")
    view = SampleView(shown.arrays.get("image"), shown.arrays.get("series"), shown.bands)
    assert "<svg" in draw_sample("a", shown.reason, view, caption="label a", classes=0).inline()


def test_the_error_of_a_detection_counts_what_is_missed_and_what_is_false() -> None:
    columns = {"scores": [0.9, 0.6, 0.2], "state_hits": [1.0, 0.0, 1.0], "true_labels": [1, 1, 1]}
    assert sample_error(columns, threshold=0.5) == 3, "two objects are missed, one detection is false"
    assert sample_error(columns, threshold=0.1) == 2
    assert sample_error({}) is None


def test_each_section_of_a_run_is_there_or_says_why_not(
    run: RunDir, page: Reader, begun: RunDir, tmp_path: Path
) -> None:
    assert tuple(page.sections) == RUN_SECTIONS
    assert "Label" not in page.sections["samples"] and "label low, predicted" in page.sections["samples"]
    # A run that goes on, without an evaluation.
    going = RunDir(tmp_path / "p" / "going")
    shutil.copytree(
        run.path, going.path, ignore=shutil.ignore_patterns("eval", "DONE.json", "windows.parquet", "*.ckpt")
    )
    going.write_state(**{**run.read_state(), "state": "running"})
    shown = read(rslp.report(going))
    assert tuple(shown.sections) == RUN_SECTIONS
    for section in ("results", "samples", "errors"):
        assert "no evaluation yet" in shown.sections[section]
    assert "written at the end of the training" in shown.sections["windows"]
    assert "The training is not finished" in shown.sections["overview"]
    assert any(text.startswith("classify. The training loss") for text in shown.figures)
    # A run that has only begun, and one by an earlier version.
    shown = read(rslp.report(begun))
    assert tuple(shown.sections) == RUN_SECTIONS and "not started" in Path(begun.report).read_text()
    assert "Nothing is logged yet" in shown.sections["curves"]


def test_damaged_files_are_named_and_the_rest_is_shown(run: RunDir, tmp_path: Path) -> None:
    copy = RunDir(tmp_path / "p" / "e")
    shutil.copytree(run.path, copy.path, ignore=shutil.ignore_patterns("*.ckpt", "metrics.csv", "val.*"))
    best = copy.evaluation("test", "best")
    damaged = (copy.done_marker, copy.state, copy.windows, best.with_suffix(".npz"), best.with_suffix(".parquet"))
    for path in damaged:
        path.write_bytes(b"PK\x03\x04 <broken>")
    text = Path(rslp.report(copy)).read_text()
    for path in damaged:
        assert re.search(rf'<p class="note"[^>]*>[^<]*{re.escape(str(path))}', text), path
    assert tuple(Reader(text).sections) == RUN_SECTIONS
    best.write_text("{")
    assert "evaluation rows" in Path(rslp.report(copy)).read_text()


def test_numbers_of_a_study_are_those_of_its_comparison(study: Path, pages: dict[str, Path]) -> None:
    shown = read(pages["study"])
    assert tuple(shown.sections) == STUDY_SECTIONS
    comparison = json.loads((study / "comparison.json").read_text())
    table = next(table for caption, table in shown.tables.items() if caption.startswith("Differences to single"))
    expected = [
        [task["dataset"], arm, task["metric"], *(repr(one[name]) for name in ("value", "low", "high", "p_holm"))]
        for task in comparison["tasks"]
        for arm, one in task["differences"].items()
    ]
    assert [row[:7] for row in table] == expected
    found = " ".join(shown.sections["found"].split())
    one = next(task for task in comparison["tasks"] if task["dataset"] == "crops")["differences"]["joint"]
    assert "crops: joint is better than single. balanced_accuracy is" in found and f"{one['low']:+.3f} to" in found
    assert "water: no evidence of a difference" in found
    transfer = next(table for caption, table in shown.tables.items() if caption.startswith("Transfer"))
    assert [row[:3] for row in transfer] == [
        [c["dataset"], c["with"], repr(c["value"])] for c in comparison["transfer"]
    ]
    assert "memory <ran> out" in shown.sections["runs"] and "joint seed 2" in shown.sections["overview"]


def test_a_study_without_comparison_says_how_far_it_is(study: Path, tmp_path: Path) -> None:
    copy = tmp_path / "p" / "s"
    shutil.copytree(study, copy, ignore=shutil.ignore_patterns("comparison.json", "report.html"))
    shown = read(rslp.report(copy))
    assert tuple(shown.sections) == STUDY_SECTIONS
    assert "no comparison yet" in shown.sections["overview"] and "8 of 9 runs are done" in shown.sections["overview"]


def test_the_command_writes_the_page_and_the_figures(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, figures = tmp_path / "a.html", tmp_path / "figures"
    plain = RunDir(tmp_path / "p" / "plain")
    shutil.copytree(run.path, plain.path, ignore=shutil.ignore_patterns("eval", "*.ckpt"))
    words = ["helios", "report", "--run", str(plain.path), "--output", str(output), "--figures", str(figures)]
    assert main(words) == 0 and capsys.readouterr().out == f"{output}\n"
    text = output.read_text()
    assert len(text) < 10_000_000 and "<script" not in text
    assert len(list(figures.glob("*.svg"))) == len(list(figures.glob("*.png"))) == len(Reader(text).figures)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in figures.glob("*.png"))


def test_the_page_of_a_run_on_an_object_store_lies_there(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with store_server("gs", monkeypatch):
        url = f"gs://{BUCKET}/projects/tests/tiny"
        store = ObjectStore(url, patience=5)
        kept = ("config.yaml", "usage.csv")
        for name in (*kept, *(f"eval/best/test.{ending}" for ending in ("json", "parquet", "npz"))):
            store.write(name, (run.path / name).read_bytes())
        assert main(["helios", "report", "--run", url]) == 0
        assert capsys.readouterr().out == f"{url}/report.html\n"
        shown = Reader((store.read("report.html") or b"").decode())
    assert tuple(shown.sections) == RUN_SECTIONS
    assert any(text.startswith("classify: reliability") for text in shown.figures)
    assert any(text.startswith("worst") for text in shown.figures) and "samples per second" in shown.sections["usage"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of --run and --study"),
        (["--run", "a/b", "--study", "c"], "give one of --run and --study"),
        (["--run", "p/nothing"], "there is no run at"),
        (["--study", "p/nothing"], "there is no study at p/nothing"),
        (["--study", "{tmp}"], "is no directory of a study"),
        (["--run", "{run}", "--output", "{run}/config.yaml/a.html"], "a.html can't be written: Not a directory"),
        (["--run", "{run}", "--output", "{tmp}/a.html", "--figures", "{run}/config.yaml"], "config.yaml can't be"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str],
    message: str,
    begun: RunDir,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RSLP_PREFIX", str(tmp_path))
    assert main(["helios", "report", *(word.format(run=begun.path, tmp=tmp_path) for word in words)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser | None]:
    if PROGRAM is None:
        yield None
        return
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


# The least contrast of any text with what lies behind it, and that text. Large text counts as other text.
CONTRAST = """(() => {
  const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  let worst = [99, ''];
  for (const e of document.querySelectorAll('body *')) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || !e.getClientRects().length) continue;
    const style = getComputedStyle(e);
    const colour = parse(e.ownerSVGElement ? style.fill : style.color);
    const pair = [light(colour), light(behind(e))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < worst[0]) worst = [ratio, e.tagName + ': ' + e.textContent.slice(0, 60)];
  }
  return worst;
})()"""
# Elements without the name, or the role, that a screen reader says; ids that occur twice; links that lead nowhere.
UNNAMED = """[
  ...[...document.querySelectorAll('a, summary, [tabindex="0"], svg, nav, section')].filter(e =>
    !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.textContent.trim())),
  ...document.querySelectorAll('svg:not([role=img][aria-label])'),
  ...[...document.querySelectorAll('[id]')].filter(e => document.querySelectorAll('#' + CSS.escape(e.id)).length > 1),
  ...[...document.querySelectorAll('a[href^="#"]')].filter(e => !document.getElementById(e.hash.slice(1))),
  ...[...document.querySelectorAll('[aria-labelledby]')].filter(e =>
    !document.getElementById(e.getAttribute('aria-labelledby'))),
].map(e => e.outerHTML.slice(0, 100))"""
HEADINGS = "[...document.querySelectorAll('h1, h2, h3')].map(e => Number(e.tagName[1]))"
CUT = """[...document.querySelectorAll('.scroll, pre')].filter(e => e.scrollWidth > e.clientWidth + 1)
  .map(e => e.textContent.slice(0, 80))"""


@needs_browser
@pytest.mark.parametrize("kind", ["run", "study"])
def test_a_browser_shows_it_on_any_screen(kind: str, pages: dict[str, Path], browser: Browser) -> None:
    page = pages[kind]
    for width, dark in ((1280, False), (390, True), (390, False), (1280, True)):
        browser.open(page, width=width, dark=dark)
        assert browser.complaints() == []
        assert browser.value("document.documentElement.scrollWidth") <= width
        assert browser.value("[...document.querySelectorAll('section')].map(e => e.id)") == list(
            RUN_SECTIONS if kind == "run" else STUDY_SECTIONS
        )
        assert browser.value(UNNAMED) == []
        browser.value("document.querySelectorAll('details').forEach(e => { e.open = true })")
        ratio, text = browser.value(CONTRAST)
        assert ratio >= 4.5, (text, ratio, width, dark)
        levels = browser.value(HEADINGS)
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(b - a <= 1 for a, b in pairwise(levels))


@needs_browser
def test_the_keyboard_reaches_everything(pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages["run"], width=1280)
    expected = browser.value("document.querySelectorAll('a, summary, .scroll, details[open] pre').length")
    reached: list[Any] = []
    for _ in range(expected + 30):
        browser.press("Tab")
        name = browser.value("document.activeElement.outerHTML.slice(0, 80)")
        if name in reached or name.startswith("<body"):
            break
        reached.append(name)
    assert "skip" in reached[0]
    # Tables that are folded can't be reached.
    folded = browser.value("document.querySelectorAll('details:not([open]) .scroll').length")
    assert len(reached) == expected - folded


@needs_browser
@pytest.mark.parametrize("kind", ["run", "study"])
def test_nothing_is_cut_on_paper(kind: str, pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages[kind], width=720, dark=True, media="print")
    assert browser.value(CUT) == []
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert len(browser.call("Page.printToPDF", printBackground=False)["data"]) > 10_000


def test_the_page_of_the_docs_says_what_runs(
    begun: RunDir, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    prefix = tmp_path / "project_data"
    (prefix / "projects").mkdir(parents=True)
    shutil.copytree(begun.path, prefix / "projects/demo/first")
    shutil.copytree(study, prefix / "studies/studies/study")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RSLP_PREFIX", raising=False)
    for command in re.findall(r"^    python -m rslp.main (.*)$", text, re.MULTILINE):
        assert main(command.split()) == 0
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, {})
    written = capsys.readouterr().out.split()
    assert len(written) == 3 and all(Path(path).is_file() for path in written) and list(Path("figures").glob("*.svg"))
    # The tables name the sections of the pages.
    titles = [title for row in re.findall(r"^\| ([A-Z][^|]*) \|", text, re.MULTILINE) for title in row.split(", ")]
    pages = [Path(written[0]).read_text(), Path(written[1]).read_text()]
    headings = [heading for page in pages for heading in re.findall(r"<h2[^>]*>([^<]*)</h2>", page)]
    assert titles == headings
