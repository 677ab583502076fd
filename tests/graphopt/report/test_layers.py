"""The table of errors by layer: worst first, bounded, and what to paste."""

from __future__ import annotations

import io
import math

from graphopt.diagnosis.layers import LayerError, LayerErrors
from graphopt.diagnosis.matching import Unmatched
from graphopt.diagnosis.sums import Error
from graphopt.report import tables
from graphopt.report.layers import MOST_LAYERS, print_layers


def layer(name: str, db: float) -> LayerError:
    error = Error(db, 0.99, 0.5)
    return LayerError(name, f"/{name}/Conv", "Conv", (1, 8, 4, 4), name, "name", error, error, math.inf, 0, name)


def printed(found: LayerErrors) -> list[str]:
    stream = io.StringIO()
    print_layers(tables.console(stream), found)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def test_table_is_golden() -> None:
    missing = [Unmatched("c\x1b[31m", "bn", "Conv", "went into bn of B")]
    found = LayerErrors([layer("a", 7.0), layer("b", math.inf)], missing, ("a",), "quantize{exclude=(a)}", None, 64)
    assert printed(found) == [
        "2 tensors matched, 1 not, over 64 samples; worst layers first",
        "layer    operator  shape    added SQNR dB  cosine    largest  inherited  "
        "total SQNR dB  total cosine  to exclude",
        "/a/Conv  Conv      1x8x4x4  7.0            0.990000  0.5      inf        7.0            0.990000      a",
        "not matched: c\\x1b[31m: went into bn of B",
        "to leave in float what stands out: quantize{exclude=(a)}",
    ]


def test_long_tables_are_cut_and_say_so() -> None:
    found = LayerErrors([layer(f"l{i}", 30.0) for i in range(MOST_LAYERS + 3)], [], (), None, layer("log", 3.0), 1)
    shown = printed(found)
    assert sum(line.startswith("/l") and "amplifies" not in line for line in shown) == MOST_LAYERS
    assert "and 3 layers that add less (--json has every tensor)" in shown
    assert "/log/Conv (Conv) amplifies the error, from inf to 3.0 dB: what it reads needs more precision" in shown[-2]
    assert shown[-1].startswith("no layer stands out")


def test_exact_models_say_so() -> None:
    assert "no layer adds an error" in printed(LayerErrors([layer("a", math.inf)], [], (), None, None, 1))
