"""Tables: plain aligned lines away from a terminal, nothing that a terminal would act on, warnings that are seen."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from graphopt.backend import BenchResult
from graphopt.base import Skip
from graphopt.files.stored import Storage
from graphopt.report import summary, tables, text
from graphopt.report.data import Accuracy, Fidelity, Latency, Report


def printed(report: Report, *, terminal: bool = False) -> str:
    stream = io.StringIO()
    out = Console(file=stream, force_terminal=True, markup=False, width=200) if terminal else tables.console(stream)
    tables.print_report(out, report)
    return stream.getvalue()


def test_plain_lines_without_a_terminal(report: Report) -> None:
    shown = printed(report)
    assert shown.isprintable() or all(char == "\n" or char.isprintable() for char in shown)
    assert not set(shown) & set("│┃━─╭╰"), "frames are for people"
    row = next(line for line in shown.splitlines() if line.startswith("latency"))
    assert row.split() == ["latency", "0.411", "ms", "0.17", "ms", "0.413x", "(0.4..0.425)"]


def test_names_cannot_act_on_a_terminal(report: Report) -> None:
    shown = printed(report, terminal=True)
    assert "\\x1b[31m\\u202e" in shown
    assert "\u202e" not in shown
    assert "[red]" in shown, "markup in a name is text"


def test_verdict(report: Report) -> None:
    assert summary.verdict(report) == "61% smaller, 2.42x as fast, top1 99.26% -> 99.07%"
    slow = replace(report, latency=Latency(1.2, 1.1, 1.3, 1.0, 1.2), accuracy=None)
    assert summary.verdict(slow) == "61% smaller, 1.20x SLOWER, output fidelity 0.9987"
    noise = replace(report, latency=Latency(0.98, 0.9, 1.05, 1.0, 0.98), accuracy=None, fidelity=None)
    assert summary.verdict(noise) == "61% smaller, no faster"


def test_a_headline_makes_nothing_of_nothing(report: Report) -> None:
    bytes_ = report.input.bytes
    tiny = replace(report, output=replace(report.input, bytes=bytes_ - 64), latency=None, accuracy=None, fidelity=None)
    assert summary.verdict(tiny) == "nothing changed"
    small = replace(tiny, output=replace(report.input, bytes=round(bytes_ * 0.996)))
    assert summary.verdict(small) == "0.4% smaller"


def test_an_unchanged_model_is_said_to_be_one(report: Report) -> None:
    fidelity = Fidelity(1.0, "none", reason="the model is unchanged")
    idle = replace(report, passes=[replace(report.passes[0], status="unchanged")], fidelity=fidelity)
    assert summary.verdict(idle) == "nothing to do, the model is unchanged"
    assert next(row.change for row in summary.rows(idle) if row.label == "fidelity") == "the model is unchanged"
    undone = replace(idle, passes=[replace(report.passes[0], status="undone")])
    assert summary.verdict(undone) == "the model is unchanged"
    assert summary.verdict(replace(idle, dry_run=True)) == "planned, nothing was run"


def test_unknown_macs_say_why(report: Report) -> None:
    unknown = replace(report.input, macs=None, macs_unknown="the size of dimension 2 of tensor t is not known")
    record = replace(report.passes[0], before=replace(unknown, parameters=400), after=unknown)
    shown = printed(replace(report, input=unknown, output=unknown, passes=[record]))
    assert shown.count("MACs are unknown: the size of dimension 2 of tensor t is not known") == 1
    assert "()" not in shown
    shown = printed(replace(report, input=unknown))
    assert "MACs of the input model are unknown: the size of dimension 2" in shown


def test_notes_are_told_when_a_run_begins_and_not_again(report: Report) -> None:
    assert "-O1 is" not in printed(replace(report, notes=["-O1 is --passes 'fold'"]))


@pytest.mark.parametrize(
    ("accuracy", "change", "tone"),
    [
        (Accuracy("top1", True, 0.9, 0.8), "-10.00 points", "bad"),
        (Accuracy("mse", False, 2.0, 3.0), "+1", "bad"),
        (Accuracy("mse", False, 3.0, 2.0), "-1", "good"),
        (Accuracy("cosine", True, 0.5, 0.5), "", "neutral"),
    ],
)
def test_tone_follows_the_direction_of_the_metric(report: Report, accuracy: Accuracy, change: str, tone: str) -> None:
    row = summary.rows(replace(report, accuracy=accuracy))[-1]
    assert (row.label, row.change, row.tone) == (accuracy.metric, change, tone)


def test_what_was_not_measured_says_why(report: Report) -> None:
    rows = summary.rows(replace(report, latency=Latency(None, reason="no device"), fidelity=Fidelity(None, "random")))
    assert [row.after for row in rows if row.label in ("latency", "fidelity")] == ["not measured"] * 2
    assert next(row.change for row in rows if row.label == "latency") == "no device"


def test_a_long_reason_stands_below_the_table(report: Report) -> None:
    long = "nothing that is installed lowers to its backend or measures there; " * 2
    told = replace(report, latency=Latency(None, reason=long), fidelity=Fidelity(None, "random", reason="no device"))
    rows = summary.rows(told)
    assert [row.change for row in rows if row.label in ("latency", "fidelity")] == ["", "no device"]
    assert f"latency was not measured: {long.strip()}" in [note.strip() for note in summary.notes(told)]


def test_skips_are_grouped_by_reason() -> None:
    groups = summary.group_skips([Skip("a", "x"), Skip("b", "y"), Skip("c", "y")])
    assert [(group.reason, group.nodes) for group in groups] == [("y", ["b", "c"]), ("x", ["a"])]


def test_warnings_of_passes_are_told_once(report: Report) -> None:
    assert summary.warnings(report)[1:] == ["prune: few samples"]
    again = replace(report, warnings=["prune: few samples"])
    assert summary.warnings(again) == ["prune: few samples"]


def test_warnings_are_lines_of_their_own() -> None:
    stream = io.StringIO()
    tables.print_warnings(tables.console(stream), ["one", "two\nlines"])
    assert stream.getvalue() == "warning: one\nwarning: two\\nlines\n"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("plain", "plain"),
        ("a\tb", "a\\tb"),
        ("\x1b]0;x\x07", "\\x1b]0;x\\x07"),
        ("\u2066é\U000e0001", "\\u2066é\\U000e0001"),
    ],
)
def test_clean(given: str, shown: str) -> None:
    assert text.clean(given) == shown


def test_clean_cuts_the_middle() -> None:
    assert len(text.clean("x" * 10_000, 50)) <= 50
    assert text.clean("a" * 100 + "b" * 100, 21) == "aaaaaaaaa...bbbbbbbbb"


def test_numbers() -> None:
    assert (text.size(0), text.size(999), text.size(1_528_168)) == ("0 B", "999 B", "1.53 MB")
    assert (text.short(None), text.short(23_914_560), text.count(1234567)) == ("unknown", "23.9 M", "1,234,567")
    assert (text.change(200, 100), text.change(0, 5), text.change(1, 1), text.change(None, 1)) == (
        "-50.0%",
        "+5",
        "",
        "",
    )
    assert (text.change(1_000_000, 999_990), text.change(1000, 1010)) == ("<0.1%", "+1.0%")
    assert (text.duration(0.0123), text.duration(83.2), text.duration(130)) == ("12.3 ms", "83.2 s", "2 min 10 s")


@pytest.mark.parametrize(
    ("ratio", "low", "high", "words"),
    [
        (0.5, 0.48, 0.52, "2.00x as fast"),
        (1.25, 1.2, 1.3, "1.25x SLOWER"),
        (0.9, 0.8, 1.1, "no faster"),
        (0.997, 0.995, 0.999, "no faster"),
        (0.1, 0.05, 0.4, "2.5x to 20.0x as fast (unsteady timings: repeat on a quiet machine)"),
        (3.0, 1.5, 4.0, "1.5x to 4.0x SLOWER (unsteady timings: repeat on a quiet machine)"),
    ],
)
def test_speed_claims_no_more_than_the_quartiles_support(ratio: float, low: float, high: float, words: str) -> None:
    assert summary._speed(ratio, low, high) == words


def test_compressed_weights_are_listed_and_summed_up(report: Report) -> None:
    shown = printed(report)
    (row,) = (line.split() for line in shown.splitlines() if line.startswith("layer0 "))
    assert row == ["layer0", "float32", "64x32", "2:4", "along", "axis", "1", "8,192", "4,352", "53.1%", "106.2%"]
    assert "31 weights are compressed to 53.1% of their bytes, all weights together to 54.2%" in shown
    assert "and 7 smaller ones" in shown
    (row,) = (line.split() for line in shown.splitlines() if line.startswith("stored weights"))
    assert row[2:] == ["1.53", "MB", "140", "kB", "-90.8%"]
    nothing = Storage(100, 100, notes=["opset 9 cannot"])
    assert "no weight is compressed; opset 9 cannot" in printed(replace(report, storage=nothing))
    assert "compressed" not in printed(replace(report, storage=None))


@pytest.mark.parametrize(("high", "told"), [(1.1, False), (2.9, True)])
def test_a_bench_on_a_busy_machine_says_so(high: float, told: bool) -> None:
    stream = io.StringIO()
    found = BenchResult((1.0, 0.9), (1.0, 0.9), (1.0, 0.88), (1.0, high), rounds=9, threads=1)
    tables.print_bench(tables.console(stream), ["a.onnx", "b.onnx"], found)
    assert ("unsteady timings" in stream.getvalue()) == told
