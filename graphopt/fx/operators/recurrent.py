"""LSTM, GRU and RNN, step by step as the standard writes them: gates, peepholes, both directions, lengths, states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.fx.operators import operator

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softsign": functional.softsign,
    "softplus": functional.softplus,
    "hardsigmoid": lambda x: torch.clamp(0.2 * x + 0.5, 0, 1),
    "elu": functional.elu,
    "leakyrelu": lambda x: functional.leaky_relu(x, 0.01),
}

State = tuple[Tensor, ...]
Step = Callable[[Tensor, State], State]


def _activations(
    names: Sequence[str] | None, default: Sequence[str], direction: int
) -> list[Callable[[Tensor], Tensor]]:
    each = len(default)
    chosen = list(names)[direction * each : (direction + 1) * each] if names else default
    return [_FUNCTIONS[name.lower()] for name in chosen]


def _run(x: Tensor, lengths: Tensor | None, state: State, step: Step, backwards: bool) -> tuple[Tensor, State]:
    """All steps of one direction; x [steps, batch, input]. Past a sample's length its state stays, its output is 0."""
    steps = x.shape[0]
    results: list[Tensor] = []
    for position in reversed(range(steps)) if backwards else range(steps):
        new = step(x[position], state)
        if lengths is not None:
            alive = (position < lengths).reshape(-1, 1)
            results.append(torch.where(alive, new[0], torch.zeros_like(new[0])))
            state = tuple(torch.where(alive, n, old) for n, old in zip(new, state, strict=True))
        else:
            results.append(new[0])
            state = new
    return torch.stack(results[::-1] if backwards else results), state


def _directions(
    x: Tensor,
    w: Tensor,
    lengths: Tensor | None,
    starts: Sequence[Tensor | None],
    hidden: int,
    direction: str,
    layout: int,
    clip: float | None,
    make: Callable[[int], Callable[[Tensor], Step]],
) -> tuple[Any, ...]:
    """Run every direction of a recurrent operator and stack what comes out."""
    x = x.transpose(0, 1) if layout else x
    starts = [s.transpose(0, 1) if layout and s is not None else s for s in starts]
    outputs, finals = [], []
    for d in range(w.shape[0]):
        zeros = torch.zeros(x.shape[1], hidden, dtype=x.dtype, device=x.device)
        state = tuple(zeros if s is None else s[d] for s in starts)
        bound = _bounded(clip)
        y, final = _run(x, lengths, state, make(d)(bound), direction == "reverse" or d == 1)
        outputs.append(y)
        finals.append(final)
    y = torch.stack(outputs, 1)
    last = [torch.stack([f[k] for f in finals]) for k in range(len(starts))]
    if layout:
        return y.permute(2, 0, 1, 3), *(f.transpose(0, 1) for f in last)
    return y, *last


def _bounded(clip: float | None) -> Any:
    return (lambda t: t) if clip is None else (lambda t: t.clamp(-clip, clip))


@operator("LSTM", since=7, outputs=3, fixed=(4,))
def lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    p: Tensor | None = None,
    *,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
) -> Any:
    """Gates in the order input, output, forget, cell."""
    hidden = r.shape[2]

    def make(d: int) -> Callable[[Any], Step]:
        f, g, h = _activations(activations, ("Sigmoid", "Tanh", "Tanh"), d)
        bias = None if b is None else b[d].reshape(2, -1).sum(0)
        peep = None if p is None else p[d].reshape(3, hidden)

        def stepper(bound: Any) -> Step:
            def step(xt: Tensor, state: State) -> State:
                ht, ct = state
                gates = functional.linear(xt, w[d], bias) + functional.linear(ht, r[d])
                i, o, forget, c = gates.split(hidden, 1)
                if peep is not None:
                    i, forget = i + peep[0] * ct, forget + peep[2] * ct
                i = f(bound(i))
                forget = 1 - i if input_forget else f(bound(forget))
                ct = forget * ct + i * g(bound(c))
                o = f(bound(o if peep is None else o + peep[1] * ct))
                return o * h(ct), ct

            return step

        return stepper

    return _directions(x, w, sequence_lens, (initial_h, initial_c), hidden, direction, layout, clip, make)


@operator("GRU", since=7, outputs=2, fixed=(4,))
def gru(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
) -> Any:
    """Gates in the order update, reset, hidden."""
    hidden = r.shape[2]

    def make(d: int) -> Callable[[Any], Step]:
        f, g = _activations(activations, ("Sigmoid", "Tanh"), d)
        wb, rb = (None, None) if b is None else b[d].reshape(2, -1)
        cut = 2 * hidden

        def stepper(bound: Any) -> Step:
            def step(xt: Tensor, state: State) -> State:
                (ht,) = state
                given = functional.linear(xt, w[d], wb)
                gates = given[:, :cut] + functional.linear(ht, r[d, :cut], None if rb is None else rb[:cut])
                z, reset = f(bound(gates)).split(hidden, 1)
                last = None if rb is None else rb[cut:]
                if linear_before_reset:
                    kept = reset * functional.linear(ht, r[d, cut:], last)
                else:
                    kept = functional.linear(reset * ht, r[d, cut:], last)
                return ((1 - z) * g(bound(given[:, cut:] + kept)) + z * ht,)

            return step

        return stepper

    return _directions(x, w, sequence_lens, (initial_h,), hidden, direction, layout, clip, make)


@operator("RNN", since=7, outputs=2, fixed=(4,))
def rnn(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
) -> Any:
    """h' = f(W x + R h + b)."""

    def make(d: int) -> Callable[[Any], Step]:
        (f,) = _activations(activations, ("Tanh",), d)
        bias = None if b is None else b[d].reshape(2, -1).sum(0)

        def stepper(bound: Any) -> Step:
            return lambda xt, state: (f(bound(functional.linear(xt, w[d], bias) + functional.linear(state[0], r[d]))),)

        return stepper

    return _directions(x, w, sequence_lens, (initial_h,), r.shape[2], direction, layout, clip, make)
