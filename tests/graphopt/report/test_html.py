"""The page: everything is shown, no name becomes markup, nothing comes from elsewhere, and Chromium draws it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from graphopt.report.data import Latency, Report, Units
from graphopt.report.html import MOST_NAMES, render


class Page(HTMLParser):
    """The tags, attributes and visible text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += " ".join(data.split()) + " "


def test_names_from_a_model_stay_text(report: Report) -> None:
    source = render(report)
    page = Page(source)
    assert page.open == []
    assert {"script", "img", "iframe", "object", "link"}.isdisjoint(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "<script>alert('x')</script>" in page.text, "the name is shown, as text"
    assert "\x1b" not in source
    assert "\u202e" not in source, "a bidirectional override would reverse what follows it"


def test_nothing_is_loaded_and_nothing_may_run(report: Report) -> None:
    source = render(report)
    page = Page(source)
    policies = [value for name, value in page.attributes if name == "content" and value and "default-src" in value]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert not [value for name, value in page.attributes if name in ("src", "href", "srcset", "action")]
    assert "url(" not in source and "@import" not in source


def test_every_part_of_the_report_is_shown(report: Report) -> None:
    page = Page(render(report))
    for wanted in (
        "2 warnings",
        "slower than the input",
        "few samples",
        "99.26%",
        "99.07%",
        "0.413x (0.4..0.425)",
        "23.9 M",
        "9.1 M",
        "prune{macs=0.4}",
        "undone",
        "channel axis frozen",
        f"and {80 - MOST_NAMES} more",
        "78.8%",
        "operator has no rule",
        "31 weights are compressed to 53.1% of their bytes",
        "2:4 along axis 1",
        "QuantizeLinear" if report.output.ops.get("QuantizeLinear") else "BatchNormalization",
        "graphopt 0.1.0",
    ):
        assert wanted in page.text, wanted


def test_bars_are_in_proportion(report: Report) -> None:
    widths = re.findall(r'class="(old|new)" x="0" y="\d+" width="([\d.]+)"', render(report))
    by_card = [(float(old[1]), float(new[1])) for old, new in zip(widths[::2], widths[1::2], strict=True)]
    measured = [
        (report.input.macs, report.output.macs),
        (report.input.bytes, report.output.bytes),
        (report.input.bytes, 139_960),
        (0.411, 0.170),
        (0.9926, 0.9907),
    ]
    expected = [(100 * a / max(a, b), 100 * b / max(a, b)) for a, b in measured]
    np.testing.assert_allclose(by_card, expected, atol=0.01)


def test_a_report_with_nothing_measured_says_so(report: Report) -> None:
    bare = replace(
        report,
        passes=[],
        latency=Latency(None, reason="no such device"),
        fidelity=None,
        accuracy=None,
        units=Units(reason="too large"),
        input=replace(report.input, macs=None),
        warnings=[],
        notes=[],
    )
    page = Page(render(bare))
    assert "no such device" in page.text
    assert "unknown" in page.text
    assert "too large" in page.text
    assert "warning" not in page.text.lower()


def test_dry_run_shows_no_results(report: Report) -> None:
    page = Page(render(replace(report, dry_run=True)))
    assert "planned, nothing was run" in page.text
    assert "Before and after" not in page.text


@pytest.mark.parametrize("width", [1200, 500])
def test_chromium_draws_it(report: Report, tmp_path: Path, width: int) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    page, picture = tmp_path / "report.html", tmp_path / "page.png"
    page.write_text(render(report), encoding="utf-8")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2400"]
    address = page.as_uri()
    environment = {**os.environ, "HOME": str(tmp_path)}
    subprocess.run(
        [*command, f"--screenshot={picture}", address], check=True, capture_output=True, timeout=120, env=environment
    )
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 50_000, "an empty page compresses to less"
    done = subprocess.run(
        [*command, "--dump-dom", address], check=True, capture_output=True, timeout=120, env=environment, text=True
    )
    tree = Page(done.stdout)
    assert {"script", "img"}.isdisjoint(tree.tags), "the browser's own parser found markup in a name"
    assert tree.tags.count("svg") >= 6
