"""Cutting and merging samples into calls: nothing is lost, repeated or reordered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.data.feeds import Layout
from graphopt.data.sources import Block, rebatch


@dataclass
class Blocks:
    """Blocks of running numbers; `wide` ones have another shape and cannot be merged with the rest."""

    sizes: list[tuple[int, bool]]
    layout: str
    batch: int | None = None
    name: str = "test"
    notes: tuple[str, ...] = ()
    samples: int | None = None

    def blocks(self) -> Iterator[Block]:
        start = 0
        for size, wide in self.sizes:
            x = np.repeat(np.arange(start, start + size)[:, None], 2 if wide else 1, axis=1)
            start += size
            if self.layout == "call":
                yield Block({"x": x}, Layout("call", size))
            else:
                yield Block({"x": x}, Layout("rows", size, self.batch, alone=self.layout == "alone"))


SIZES = st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=6)


@given(sizes=SIZES, layout=st.sampled_from(["rows", "alone", "call"]), size=st.integers(1, 8), limit=st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_free_batches_give_every_sample_once_in_order(
    sizes: list[tuple[int, bool]], layout: str, size: int, limit: int
) -> None:
    total = sum(n for n, _ in sizes)
    source = Blocks(sizes, layout)
    everything = list(rebatch(source, size, None))
    numbers = np.concatenate([feeds["x"][:, 0] for feeds, _ in everything])
    np.testing.assert_array_equal(numbers, np.arange(total))
    assert all(count == len(feeds["x"]) for feeds, count in everything)
    limited = [count for _, count in rebatch(source, size, limit)]
    if layout == "call":
        # calls are whole: the stream ends with the one that reaches the limit
        assert sum(limited) >= min(limit, total)
        assert sum(limited[:-1]) < limit
    else:
        assert max(limited) <= size
        assert sum(limited) == min(limit, total)
    if layout == "rows" and len({wide for _, wide in sizes}) == 1:
        assert [count for _, count in everything[:-1]] == [size] * (len(everything) - 1)


@given(sizes=SIZES, batch=st.integers(1, 5), limit=st.one_of(st.none(), st.integers(1, 40)))
@settings(max_examples=100, deadline=None)
def test_fixed_batches_are_always_full(sizes: list[tuple[int, bool]], batch: int, limit: int | None) -> None:
    sizes = [(n, False) for n, _ in sizes]
    total = sum(n for n, _ in sizes)
    got = list(rebatch(Blocks(sizes, "rows", batch), 3, limit))
    assert {count for _, count in got} <= {batch}
    wanted = total // batch if limit is None else min(total // batch, -(-limit // batch))
    assert len(got) == wanted
    if got:
        numbers = np.concatenate([feeds["x"][:, 0] for feeds, _ in got])
        np.testing.assert_array_equal(numbers, np.arange(wanted * batch))
