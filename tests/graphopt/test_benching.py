"""What measurements share: inputs for all models, and the report of times."""

from __future__ import annotations

import numpy as np
import pytest
from text_graph import graph

from graphopt.benching import batch_of, bench_result, feeds_for
from graphopt.errors import DataError
from graphopt.target import Target, other_processor, this_architecture
from graphopt.timing import Paired


def test_random_feeds_are_one_sample_that_all_models_take() -> None:
    one = graph("(float[N,4] x) => (float[N,4] y)", "y = Relu(x)")
    two = graph("(float[N,4] x) => (float[N,4] y)", "y = Abs(x)")
    assert feeds_for([one, two], None)["x"].shape == (1, 4)
    given = {"x": np.ones((3, 4), np.float32)}
    assert feeds_for([one], given)["x"] is given["x"]
    other = graph("(int64[N,4] x) => (int64[N,4] y)", "y = Abs(x)")
    with pytest.raises(DataError, match="different inputs"):
        feeds_for([one, other], None)


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [([(3, 2), (3,)], 3), ([(3, 2), (4,)], None), ([(3, 2), ()], None), ([()], None), ([], None)],
)
def test_a_batch_is_what_all_inputs_have_in_axis_0(shapes: list[tuple[int, ...]], expected: int | None) -> None:
    assert batch_of({str(i): np.zeros(shape) for i, shape in enumerate(shapes)}) == expected


def test_a_result_holds_times_sizes_and_machine() -> None:
    found = Paired((2.0, 1.0), (1.0, 0.5), (1.0, 0.4), (1.0, 0.6), 7, (True, False))
    result = bench_result(found, {"x": np.zeros((2, 3))}, threads=4, runtime="9.9")
    assert (result.milliseconds, result.ratios, result.low, result.high) == found_columns(found)
    assert (result.rounds, result.threads, result.batch) == (7, 4, 2)
    assert result.details["runtime"] == "9.9"
    assert result.details["within_noise"] == [True, False]
    assert result.details["shapes"] == {"x": [2, 3]}
    assert result.details["machine"]


def found_columns(found: Paired) -> tuple[tuple[float, ...], ...]:
    return found.milliseconds, found.ratios, found.low, found.high


def test_another_processor_is_named() -> None:
    assert other_processor(Target("here", "ort", arch=this_architecture())) is None
    assert "riscv64" in str(other_processor(Target("there", "ort", arch="riscv64")))
