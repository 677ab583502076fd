"""Numbers of 2, 4 and 8 bits in bytes."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.numerics.bit_packing import pack, unpack

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 16)])
def test_there_and_back(bits: int, shape: tuple[int, ...]) -> None:
    values = RNG.integers(0, 1 << bits, shape)
    packed = pack(values, bits)
    assert packed.dtype == np.uint8 and packed.shape == (*shape[:-1], -(-shape[-1] * bits // 8))
    np.testing.assert_array_equal(unpack(packed, bits, shape[-1]), values)


def test_the_first_of_two_numbers_lies_in_the_low_bits() -> None:
    assert pack(np.array([1, 2, 3]), 4).tolist() == [0x21, 0x03]
    assert pack(np.array([1, 2, 3]), 2).tolist() == [0b111001]


@pytest.mark.parametrize(("values", "bits"), [([16], 4), ([-1], 4), ([256], 8), ([1], 3)])
def test_what_does_not_fit_is_refused(values: list[int], bits: int) -> None:
    with pytest.raises(ValueError, match="bits"):
        pack(np.array(values), bits)
