"""A choice of formats as text: back and forth, exceptions, ambiguous names, and what cannot be followed."""

from __future__ import annotations

import itertools
import random

import pytest

from graphopt.errors import UsageError
from graphopt.quantization.formats import Candidate
from graphopt.quantization.search.replay import entries, resolve

ALL = ("float", "int8", "int8-dynamic")


def layer(key: str, label: str, op: str = "Conv", formats: tuple[str, ...] = ALL) -> Candidate:
    reasons = {f: "no kernel" for f in ALL if f not in formats}
    return Candidate(key, label, op, "layer", False, formats, reasons)  # type: ignore[arg-type]


LAYERS = [
    layer("a", "conv1"), layer("b", "conv2"), layer("c", "conv[2]"), layer("d", "twin"), layer("e", "twin"),
    layer("f", "product", "MatMul"), layer("g", "op:Conv", "Gemm"), layer("h", "out:a", "Gemm"),
]  # fmt: skip


def test_what_is_written_is_read_back() -> None:
    draw = random.Random(0)
    for _ in range(200):
        chosen = {c.key: draw.choice(ALL) for c in LAYERS}
        assert resolve(LAYERS, entries(LAYERS, chosen)) == chosen  # type: ignore[arg-type]


def test_every_pair_of_formats_of_nodes_of_one_name() -> None:
    for first, second in itertools.product(ALL, ALL):
        chosen = dict.fromkeys("abcfgh", "float") | {"d": first, "e": second}
        assert resolve(LAYERS, entries(LAYERS, chosen)) == chosen  # type: ignore[arg-type]


def test_few_words_where_layers_are_alike() -> None:
    chosen = dict.fromkeys("abcde", "int8") | {"f": "int8-dynamic", "g": "float", "h": "float"}
    assert entries(LAYERS, chosen) == ("op:Conv=int8", "op:MatMul=int8-dynamic")  # type: ignore[arg-type]
    chosen["c"] = "float"
    assert entries(LAYERS, chosen)[-1] == "conv[[]2]=float"  # type: ignore[arg-type]


def test_layers_that_were_not_chosen_for_are_in_float() -> None:
    assert resolve(LAYERS, entries(LAYERS, {"a": "int8"})) == dict.fromkeys("bcdefgh", "float") | {"a": "int8"}


def test_the_last_entry_that_fits_counts() -> None:
    found = resolve(LAYERS, ["*=int8", "conv?=int8-dynamic", "out:b=float"])
    assert found["a"] == "int8-dynamic" and found["b"] == "float" and found["f"] == "int8"


def test_nodes_that_cannot_be_what_a_glob_asks_for_are_passed_over() -> None:
    layers = [layer("a", "conv1"), layer("b", "conv2", formats=("float", "int8"))]
    assert resolve(layers, ["*=int8", "conv*=int8-dynamic"]) == {"a": "int8-dynamic", "b": "int8"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("conv1", "'conv1' is not WHAT=FORMAT"),
        ("=int8", "is not WHAT=FORMAT"),
        ("conv1=int3", "is not WHAT=FORMAT; write a glob over names of nodes"),
        ("nothing=int8", "'nothing=int8' fits no layer"),
        ("op:LSTM=int8", "fits no layer"),
        ("conv1=int4-weights", "conv1 cannot be int4-weights"),
    ],
)
def test_what_cannot_be_followed_is_refused(entry: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("*", ".")):
        resolve(LAYERS, [entry])
