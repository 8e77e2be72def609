"""Reports: the screen and the page of compare_runs.py."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import statistics
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from run_folders import ALIGN, NCE, cut_log, make_measure, make_run

from moco.checkpoint import write_checkpoint
from moco.run_files import FORMAT_VERSION
from moco.runs import report
from scripts import compare_runs, expected_curves


class Page(HTMLParser):
    """What a page says and loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded, self.tags, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name.split(":")[-1] in ("src", "href", "data", "srcset"):
                self.loaded.append(value)
            assert not name.startswith("on"), f"{tag} {name}"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def reported(call, tmp_path):
    """reported(*paths) -> what compare_runs.py prints, and its page."""

    def reported(*paths: Path) -> tuple[str, str]:
        out = tmp_path / "report.html"
        words = shlex.join(map(str, [*paths, "--out", out]))
        status, screen = call(compare_runs.main, words)
        assert status == 0, screen
        return screen, out.read_text(encoding="utf-8")

    return reported


def test_screen_and_page_say_the_same(two_objectives, reported, tmp_path) -> None:
    make_run(tmp_path / "other", NCE, 0, lr=0.06)
    cut_log(make_run(tmp_path / "bad", seed=1))
    with open(two_objectives / "a0" / "log.jsonl", "a") as log:
        log.write('{"kind": "knn", "step": 8, "top1": 30.0}\n')
    screen, page = reported(two_objectives, tmp_path / "other", tmp_path / "bad")
    shown = "".join(Page(page).text)
    deviation = statistics.stdev([50, 52, 57])
    for text in (ALIGN, NCE, f"53.00 ± {deviation:.2f}", "67.69", "cited", "lr 0.06, not 0.03",
                 "1 − 2", str(tmp_path / "bad"), "is unfinished: step 16 of 20"):  # fmt: skip
        assert text in shown and text in screen, text
    assert "alignment +1.00 (+1.00 to +1.00), uniformity -1.00 (-1.00 to -1.00) (6 runs;" in shown
    assert "knn top1" in shown, "a curve"
    assert reported(two_objectives, tmp_path / "other", tmp_path / "bad")[1] == page


def test_what_cannot_be_reported_is_refused(call, tmp_path) -> None:
    make_run(tmp_path / "a")
    cut_log(make_run(tmp_path / "bad"))
    (tmp_path / "file").touch()
    for words, expected, message in (
        ("a --out r.txt", 2, "--out must end in .html, got r.txt"),
        ("a --out none/r.html", 1, "none/r.html"),
        ("bad missing", 2, "no finished run to compare: missing is no folder; bad is unfinished"),
        ("missing file", 2, "missing is no folder; file is a file, expected a run folder"),
    ):
        words = [str(tmp_path / w) if (tmp_path / w).exists() else w for w in words.split()]
        status, text = call(compare_runs.main, shlex.join(words))
        assert status == expected and message in text.replace(f"{tmp_path}/", ""), text
        assert len(text.splitlines()) == 1


def test_without_matplotlib_there_are_tables(two_objectives, reported, monkeypatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] in ("matplotlib", "align_uniform")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    screen, page = reported(two_objectives)
    assert "no charts: pip install matplotlib" in screen
    assert "svg" not in Page(page).tags and "53.00 ± 3.61" in page
    monkeypatch.delitem(sys.modules, "scripts.expected_curves")
    with pytest.raises(SystemExit, match="figures need matplotlib: pip install matplotlib"):
        importlib.import_module("scripts.expected_curves")


def test_page_is_self_contained_and_harmless(two_objectives, reported, tmp_path) -> None:
    nasty = "<script>alert(1)</script> & $\\frac | `x`"
    run = make_run(tmp_path / "<b>bad & $x_</b>", nasty, arch="<img src=x>")
    make_measure(run, 0.2, -1.0)
    make_run(tmp_path / "cut" / "<i>", images=8000)
    screen, text = reported(tmp_path)
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "b", "i", "object"} & set(page.tags)
    assert {"svg", "table", "style"} <= set(page.tags)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.loaded)
    addresses = re.findall(r"\w+://[\w.]+", re.sub(r"base64,[^\"]*", "", text))
    assert set(addresses) <= {"http://www.w3.org"}, "names of XML, not loaded"
    assert "url(http" not in text and "@import" not in text
    assert nasty in "".join(page.text), "shown as it is"
    for line in screen.splitlines():
        assert "<script" not in line
        assert not line.startswith("|") or line.endswith("|")


def test_numbers_are_told_from_text_that_begins_with_one() -> None:
    for text in ("43.65 ± 0.31", "-3.47", "+0.5 ± 0.1", "0.25", "1.82e-12", "–", "16 (of 2)"):
        assert report.cell_kind(text) == "number", text
    for text in (NCE, ALIGN, "0, 1, 2", "1 − 2", "", "ResNet-50", "67.5 as cited"):
        assert report.cell_kind(text) == "", text


def test_long_logs_make_short_curves() -> None:
    thinned = report.thinned([float(i) for i in range(100_000)])
    assert 200 < len(thinned) <= 400
    assert thinned[0] == statistics.fmean(range(250)) and thinned == sorted(thinned)
    assert report.thinned([3.0, 1.0]) == [3.0, 1.0]


def test_published_figures_have_sources() -> None:
    rows = report.published_rows(compare_runs.PUBLISHED)
    assert len(rows) > 20
    for row in rows[1:]:
        cells = dict(zip(rows[0], row, strict=True))
        assert cells["cited from"] and "–" != cells["objective"]
        accuracies = [cells["linear top-1"], cells["k-NN top-1"]]
        assert any(re.match(r"\d+\.\d", value) for value in accuracies), row
    assert any(row[6] == "67.69" and row[0] == "ImageNet" for row in rows)


def test_expected_curves_are_drawn_from_runs_that_are_there(tmp_path, monkeypatch, call) -> None:
    runs = [make_run(tmp_path / f"run-{i}", seed=i) for i in range(len(expected_curves.RUNS))]
    for i, run in enumerate(runs):
        (run / "checkpoint_0015.pth.tar").symlink_to(run / "log.jsonl")  # finished
        with open(run / "log.jsonl", "a") as log:
            for step in range(1, 21):
                values = {"kind": "metrics", "step": step, "alignment": 0.5, "uniformity": -1 - i}
                log.write(json.dumps(values) + "\n")
            log.write('{"kind": "knn", "step": 20, "top1": 12.25}\n')
    words = ["expected_curves.py", "--data", str(tmp_path), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    status, text = call(lambda _: expected_curves.main(), "")
    assert status == 2 and "run-0" in text and "checkpoint_0015.pth.tar cannot be read" in text
    for run in runs:
        (run / "checkpoint_0015.pth.tar").unlink()
        write_checkpoint(run / "checkpoint_0015.pth.tar", {"version": FORMAT_VERSION})
    status, text = call(lambda _: expected_curves.main(), "")
    assert status == 0, text
    assert re.search(r"^dead: --lr 1e-6 +3.050 +0.500 +-4.000 +12.250$", text, re.M)
    assert (tmp_path / "expected_curves.png").stat().st_size > 10_000
