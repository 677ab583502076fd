"""Values and positions instead of arrays with many equal elements: every bit comes back, and nothing grows."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.numerics import packing
from graphopt.numerics.packing import Choice, Groups, Mask, choose, pack, unpack
from graphopt.numerics.sparsity import patterns

RNG = np.random.default_rng(0)
DTYPES = (np.float32, np.float16, np.float64, ml_dtypes.bfloat16, np.int8, np.uint8, np.int16, np.int64)


def sparse(shape: tuple[int, ...], axis: int, keep: int, of: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    """Random values, none of them zero, of which N of every M along an axis stay."""
    lines = np.moveaxis(RNG.integers(1, 100, shape), axis, -1).copy()
    for start in range(0, lines.shape[-1], of):
        block = lines[..., start : start + of]
        block[RNG.random(block.shape).argsort(-1).argsort(-1) >= keep] = 0
    return np.ascontiguousarray(np.moveaxis(lines, -1, axis)).astype(dtype)


def round_trip(array: np.ndarray[Any, Any], choice: Choice) -> None:
    values, places = pack(array, choice)
    assert values.nbytes + places.nbytes == choice.nbytes
    back = unpack(values, places, choice.form, array.shape, choice.fill)
    assert back.dtype == array.dtype
    assert back.tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("keep", "of", "form", "share"),
    [
        (2, 4, "2:4 along axis 1", 0.5 + 1 / 16),
        (1, 4, "1:4 along axis 1", 0.25 + 1 / 32),
        (1, 2, "1:2 along axis 1", 0.5 + 1 / 32),
        (2, 8, "2:8 along axis 1", 0.25 + 1 / 16),
        (1, 16, "1:16 along axis 1", 1 / 16 + 1 / 64),
        (4, 8, "mask", 0.5 + 1 / 16),  # a bit for each element is less than three for each that stays
    ],
)
def test_sizes_in_float16(keep: int, of: int, form: str, share: float) -> None:
    array = sparse((64, 128, 3, 3), 1, keep, of, np.float16)
    found = choose(array, 4096, 0.1)
    assert found is not None
    assert str(found.form) == form
    assert found.nbytes / array.nbytes == pytest.approx(share, abs=4 / array.nbytes)
    round_trip(array, found)


def test_known_bytes() -> None:
    array = np.array([[0, 7, 0, 9], [5, 0, 0, 6]], np.int8)
    values, places = pack(array, Choice(Groups(2, 4, 1), np.int8(0), 4, 0))
    assert values.tolist() == [[7, 9], [5, 6]]
    assert places.tolist() == [1 | 3 << 2 | 0 << 4 | 3 << 6]
    values, places = pack(array, Choice(Mask(), np.int8(0), 4, 0))
    assert values.tolist() == [0, 7, 9, 5, 6]
    assert places.tolist() == [0b10011010]


@settings(max_examples=150, deadline=None)
@given(
    shape=st.lists(st.integers(1, 13), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    pattern=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (2, 8), (1, 16), (5, 16)]),
    axis=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_every_form_that_holds_an_array_gives_it_back(shape, dtype, pattern, axis, seed):
    """Ragged tails, lines shorter than a group, groups with fewer elements than places."""
    random, axis = np.random.default_rng(seed), axis % len(shape)
    array = sparse(tuple(shape), axis, *pattern, dtype)
    array = np.where(random.random(shape) < 0.2, np.zeros(1, dtype), array)
    count = int((array != 0).sum())
    form = Groups(*pattern, axis)
    size = int(np.prod(form.stored_shape(array.shape)))
    round_trip(array, Choice(form, np.zeros((), dtype)[()], count, size * array.itemsize + -(-size * form.bits // 8)))
    mask_bytes = (count + 1) * array.itemsize + -(-array.size // 8)
    round_trip(array, Choice(Mask(), np.zeros((), dtype)[()], count, mask_bytes))
    found = choose(array, 0, 0.0)
    if found is not None:
        assert found.nbytes <= array.nbytes
        assert found.nbytes <= mask_bytes * 65 / 64
        round_trip(array, found)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(4, 40),
    density=st.floats(0.05, 1),
    pattern=st.sampled_from(["2:4", "1:4", "4:8", "50%"]),
    seed=st.integers(0, 99),
)
def test_what_the_solvers_make_is_at_most_as_large_as_its_pattern(rows, columns, density, pattern, seed):
    weight = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    kept = patterns.mask(np.abs(weight), patterns.parse(pattern))
    found = choose(np.where(kept, weight, 0), 0, 0.0)
    count, groups = int(kept.sum()), -(-columns // 8) * rows
    if found is not None:
        assert found.nbytes <= (4 * (count + 2 * groups) + weight.size / 8 + 5) * 65 / 64


def test_bits_of_special_values_survive() -> None:
    array = np.zeros((64, 64), np.float32)
    array[::2, 5] = -0.0
    array[1::3, 7] = np.array([0x7FC00123], np.uint32).view(np.float32)  # a NaN with a payload
    array[3, 8:11] = [np.inf, -np.inf, np.float32(1e-45)]
    found = choose(array, 0, 0.0)
    assert found is not None
    assert found.count == int((array.view(np.uint32) != 0).sum())
    round_trip(array, found)


def test_the_zero_point_of_a_quantised_weight_is_its_filler() -> None:
    array = (sparse((64, 64), 0, 2, 4, np.int16) + 128).astype(np.uint8)
    found = choose(array, 0, 0.1)
    assert found is not None
    assert found.fill == 128
    assert str(found.form) == "2:4 along axis 0"
    assert found.nbytes / array.nbytes == 0.5 + 1 / 8
    round_trip(array, found)


@pytest.mark.parametrize(
    "array",
    [np.ones((64, 64), np.float32), RNG.random((64, 64)), np.zeros((0, 4)), np.zeros(()), np.zeros((8, 8), np.float32)],
)
def test_what_saves_too_little_is_left_alone(array: np.ndarray[Any, Any]) -> None:
    assert choose(array, 4096, 0.1) is None


def test_an_almost_dense_array_is_left_alone() -> None:
    array = np.where(RNG.random((256, 256)) < 0.1, 0, RNG.random((256, 256)))
    assert choose(array, 4096, 0.1) is None
    assert choose(array, 4096, 0.05) is not None


GROUPED = np.array([[7, 9], [5, 6]], np.int8), np.array([0b11001101], np.uint8)


@pytest.mark.parametrize(
    ("values", "places", "form", "shape", "words"),
    [
        (*GROUPED, Groups(2, 4, 1), (2, 400), "needs [2, 200] values"),
        (*GROUPED, Groups(2, 4, 2), (2, 4), "no pattern"),
        (*GROUPED, Groups(4, 2, 1), (2, 4), "no pattern"),
        (*GROUPED, Groups(2, 4, 1), (2, 3), "out of range"),
        (*GROUPED, Groups(2, 4, 1), (), "no elements"),
        (*GROUPED, Groups(2, 4, 1), (2, 0), "no elements"),
        (*GROUPED, Groups(2, 4, 1), (-2, 4), "no elements"),
        (*GROUPED, Groups(2, 4, 1), (1 << 40, 1 << 40), "needs"),
        (GROUPED[0], np.zeros(1, np.uint8), Groups(2, 4, 1), (2, 4), "out of order"),
        (GROUPED[0], np.zeros(2, np.uint8), Groups(2, 4, 1), (2, 4), "need 1 bytes, not 2"),
        (np.array([[1, 2]]), np.array([0xC0], np.uint8), Groups(2, 9, 1), (1, 9), "out of range"),
        (np.array([0, 1, 2], np.int8), np.array([7], np.uint8), Mask(), (8,), "3 places cannot hold 2 values"),
        (np.array([0, 1, 2], np.int8), np.array([3], np.uint8), Mask(), (1 << 62, 1 << 62), "bytes, not 1"),
        (np.zeros((0,), np.int8), np.array([0], np.uint8), Mask(), (8,), "cannot hold -1 values"),
    ],
)
def test_contradictions_are_refused(values: Any, places: Any, form: Any, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        unpack(values, places, form, shape, np.int8(0))
    assert words in str(caught.value)


def test_codes() -> None:
    for bits in (1, 2, 4):
        codes = RNG.integers(0, 1 << bits, 13).astype(np.uint8)
        packed = packing.pack_codes(codes, bits)
        assert packed.size == -(-13 * bits // 8)
        assert packing.unpack_codes(packed, bits, 13).tolist() == codes.tolist()
