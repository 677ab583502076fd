"""What `sparsify` and `armor` share: moments, order, threads, rules of targets, limits, input that is of no use."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from sparse_layers import context, relative
from text_graph import graph

from graphopt.base import PassResult
from graphopt.errors import UsageError
from graphopt.executor import Session
from graphopt.model import check
from graphopt.numerics.sparsity.patterns import holds, parse
from graphopt.passes.armor import Armor
from graphopt.passes.sparsify import Sparsify
from graphopt.rewriting import layer_moments
from graphopt.sparsity import moments
from graphopt.target import SparseKernels, Target

ATTENTION = """q = MatMul(x, wq)  qb = Add(q, bq)
k = MatMul(x, wk)  kb = Add(k, bk)
v = MatMul(x, wv)  vb = Add(v, bv)
m = Mul(qb, kb)  s = Sigmoid(m)  c = Mul(s, vb)
o = MatMul(c, wo)  ob = Add(o, bo)  r = Add(x, ob)
f = MatMul(r, wf)  fb = Add(f, bf)  g = Relu(fb)
d = MatMul(g, wd)  db = Add(d, bd)  y = Add(r, db)"""


def network(seed: int = 0) -> ir.Model:
    """Three layers that read one tensor, two sums, and layers behind them."""
    weights = {f"w{n}": (32, 32) for n in "qkvo"} | {"wf": (32, 64), "wd": (64, 32)}
    biases = {f"b{n}": (32,) for n in "qkvod"} | {"bf": (64,)}
    random = np.random.default_rng(seed)
    arrays = {n: (random.normal(size=s) * 0.2).astype(np.float32) for n, s in (weights | biases).items()}
    return graph("(float[n,6,32] x) => (float[n,6,32] y)", ATTENTION, **arrays)


def data(seed: int = 0, count: int = 64) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, 6, 32)) @ np.random.default_rng(7).normal(size=(32, 32)) * np.geomspace(1, 0.1, 32)
    return {"x": x.astype(np.float32)}


def run(
    make: Any, ctx_options: dict[str, Any] | None = None, model: ir.Model | None = None
) -> tuple[ir.Model, PassResult]:
    model = model or network()
    ctx = dataclasses.replace(context(model, data()), **(ctx_options or {}))
    result = make.run(model, ctx)
    check(model)
    return model, result


def weights(model: ir.Model) -> dict[str, bytes]:
    return {n: v.const_value.numpy().tobytes() for n, v in sorted(model.graph.initializers.items())}


MAKES = (
    Sparsify(propagate=False), Sparsify(propagate=True), Armor(propagate=False, overhead=0.3, cycles=4),
    Armor(propagate=True, overhead=0.3, cycles=4, shared=True, form="factors"),
)  # fmt: skip


@pytest.mark.parametrize("make", MAKES)
def test_the_bytes_do_not_depend_on_the_number_of_threads(make: Any) -> None:
    one, _ = run(make, {"jobs": 1})
    for jobs in (2, 5):
        assert weights(run(make, {"jobs": jobs})[0]) == weights(one)


@pytest.mark.parametrize("make", [Sparsify, lambda **o: Armor(overhead=0.2, cycles=4, **o)])
def test_layers_behind_sparse_ones_make_up_for_their_errors(make: Any) -> None:
    test = data(seed=1)
    dense = Session(network()).run(test)["y"]
    parallel, _ = run(make(propagate=False))
    behind, result = run(make(propagate=True))
    assert relative(dense, Session(behind).run(test)["y"]) < 0.97 * relative(dense, Session(parallel).run(test)["y"])
    assert [row["layer"] for row in next(iter(result.details.values()))] == list("qkvofd")


def test_published_methods_do_not_propagate_unless_asked_to() -> None:
    for method, expected in (("cd", True), ("sparsegpt", False), ("wanda", False)):
        default, _ = run(Sparsify(method=method))
        assert weights(default) == weights(run(Sparsify(method=method, propagate=expected))[0])
        assert weights(default) != weights(run(Sparsify(method=method, propagate=not expected))[0])


def test_little_memory_means_more_passes_over_the_data_and_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    monkeypatch.setattr(
        layer_moments,
        "activations",
        lambda *a, original=layer_moments.activations, **o: passes.append(1) or original(*a, **o),
    )
    whole, _ = run(Sparsify(propagate=False))
    assert len(passes) == 1
    monkeypatch.setattr(moments, "portions", lambda items, layer, _, own=moments.portions: own(items, layer, 1))
    parts, _ = run(Sparsify(propagate=False))
    assert len(passes) == 1 + 4  # x, c, r, g
    assert weights(parts) == weights(whole)


def test_moments_are_taken_once_for_layers_that_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = moments.Measured._measured
    monkeypatch.setattr(
        moments.Measured, "_measured",
        lambda self, layers: seen.append([each.layer.source for each in layers]) or original(self, layers),
    )  # fmt: skip
    run(Sparsify(propagate=False))
    assert seen == [["x", "c", "r", "g"]]


# -- wrappers that are shared -----------------------------------------------------------------------------------------


def test_layers_that_read_the_same_share_a_wrapper() -> None:
    separate, _ = run(Armor(shared=False, form="factors", overhead=1 / 6, cycles=4))
    shared, result = run(Armor(shared=True, form="factors", overhead=1 / 6, cycles=4))
    dense, _ = run(Armor(shared=True, form="dense", overhead=1 / 6, cycles=4))
    count = {name: sum("blocks" in n for n in m.graph.initializers) for name, m in (("a", separate), ("b", shared))}
    assert count == {"a": 6, "b": 4}
    assert len({node.inputs[0] for node in shared.graph if node.outputs[0].name in {"q", "k", "v"}}) == 1
    test = data(seed=1)
    assert relative(Session(dense).run(test)["y"], Session(shared).run(test)["y"]) < 1e-5
    blocks = {row["layer"]: row["block"] for row in result.details["2:4 cores"]}
    assert blocks["q"] == blocks["k"] == blocks["v"] == 16  # a sixth of 3 * 32 rows
    assert blocks["o"] == 4
    for name in "qkv":
        assert holds(shared.graph.initializers[f"w{name}"].const_value.numpy().T, parse("2:4"))


def test_factors_are_shared_by_default_and_products_are_not() -> None:
    options = {"overhead": 0.25, "cycles": 4}
    assert weights(run(Armor(form="factors", **options))[0]) == weights(
        run(Armor(form="factors", shared=True, **options))[0]
    )
    assert weights(run(Armor(form="dense", **options))[0]) == weights(
        run(Armor(form="dense", shared=False, **options))[0]
    )


def test_a_layer_that_cannot_be_fitted_does_not_harm_those_it_would_share_with() -> None:
    model = network()
    model.graph.initializers["wk"].const_value = ir.tensor(np.zeros((32, 32), np.float32), name="wk")
    model, result = run(Armor(shared=True, form="factors", overhead=0.25, cycles=4), model=model)
    assert [(skip.node, skip.reason) for skip in result.skipped] == [("k", "its weights are all zero")]
    key = next(node for node in model.graph if node.outputs[0].name == "k")
    assert key.inputs[0].name == "x"


def test_nothing_to_share_is_a_wrong_option() -> None:
    with pytest.raises(UsageError, match="share"):
        Armor(shared=True, wrappers="out")


# -- choice of layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernels", "reason"),
    [
        (SparseKernels(inputs=40), "32 input channels are fewer than 40"),
        (SparseKernels(outputs=64), "32 output channels are fewer than 64"),
        (SparseKernels(input_multiple=64), "32 input channels are no multiple of 64"),
        (SparseKernels(output_multiple=64), "32 output channels are no multiple of 64"),
    ],
)
def test_layers_that_the_targets_kernels_do_not_take_stay_dense(kernels: SparseKernels, reason: str) -> None:
    target = Target("board", "ort", sparsity_2_4=True, sparse=kernels)
    _, result = run(Sparsify(method="magnitude"), {"target": target})
    done = {row["layer"] for row in result.details.get("2:4 layers", [])}
    assert {"q", "k", "v", "o"}.isdisjoint(done)
    assert any(reason in skip.reason for skip in result.skipped if skip.node == "q")


def test_smallest_stands_above_the_target() -> None:
    target = Target("board", "ort", sparse=SparseKernels(inputs=64))
    _, result = run(Sparsify(smallest=32), {"target": target})
    assert len(result.details["2:4 layers"]) == 6


def test_convolutions_stay_dense_where_kernels_take_products_only() -> None:
    model = graph("(float[n,32,5,5] x) => (float[n,8,3,3] y)", "y = Conv<kernel_shape=[3,3]>(x, w)", w=(8, 32, 3, 3))
    target = Target("board", "ort", sparsity_2_4=True, sparse=SparseKernels(convolutions=False))
    result = Sparsify(method="magnitude").run(model, dataclasses.replace(context(model, None), target=target))
    assert [skip.reason for skip in result.skipped] == ["the target's kernels that skip zeros take no convolutions"]


@pytest.mark.parametrize("make", [Sparsify, lambda **o: Armor(overhead=0.2, cycles=4, **o)])
def test_layers_that_would_be_too_far_off_stay_dense(make: Any) -> None:
    _, free = run(make(propagate=False))
    errors = {row["layer"]: row["error"] for row in next(iter(free.details.values()))}
    limit = sorted(errors.values())[2]
    model, result = run(make(propagate=False, max_error=limit))
    assert {skip.node for skip in result.skipped} == {name for name, error in errors.items() if error > limit}
    assert all("max_error" in skip.reason and "%" in skip.reason for skip in result.skipped)
    dense = weights(network())
    assert all(weights(model)[f"w{skip.node}"] == dense[f"w{skip.node}"] for skip in result.skipped)


def test_layers_in_bodies_are_told() -> None:
    branches = (
        "then_branch = t () => (float[n,32] p) {p = MatMul(x, w)}",
        "else_branch = e () => (float[n,32] q) {q = Relu(x)}",
    )
    body = f"y = If(c) <{', '.join(branches)}>"
    model = graph("(bool c, float[n,32] x) => (float[n,32] y)", body, w=(32, 32))
    result = Sparsify(method="magnitude").run(model, context(model, None))
    assert not result.changed
    assert "body of an If" in result.skipped[0].reason


@pytest.mark.parametrize("pattern", ["1:4", "4:8", "50%", "25%"])
@pytest.mark.parametrize("method", ["magnitude", "cd"])
def test_other_patterns(pattern: str, method: str) -> None:
    model, result = run(Sparsify(pattern=pattern, method=method))
    assert len(result.details[f"{pattern} layers"]) == 6
    for name in "qkvofd":
        stored = model.graph.initializers[f"w{name}"].const_value.numpy().T
        assert holds(stored, parse(pattern))
        assert (stored != 0).mean() > 0.8 * parse(pattern).density


@pytest.mark.parametrize(
    "make", [Sparsify(method="magnitude"), Sparsify(), Armor(overhead=0.5, form="factors", wrappers="out")]
)
def test_groups_end_with_the_tap(make: Any) -> None:
    model = graph("(float[n,18,6,6] x) => (float[n,16,4,4] y)", "y = Conv<kernel_shape=[3,3]>(x, w)", w=(16, 18, 3, 3))
    x = np.random.default_rng(0).normal(size=(64, 18, 6, 6)).astype(np.float32)
    dense = Session(model.clone()).run({"x": x})["y"]
    assert make.run(model, context(model, {"x": x})).changed
    weight = model.graph.initializers["w"].const_value.numpy()
    assert holds(weight.transpose(0, 2, 3, 1).reshape(-1, 18), parse("2:4"))
    assert relative(dense, Session(model).run({"x": x})["y"]) < 0.5


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Sparsify, lambda **o: Armor(overhead=0.3, **o)])
def test_without_time_the_start_is_taken_and_the_report_says_so(make: Any) -> None:
    model, result = run(make(seconds=0.0))
    assert result.changed
    assert any("not give the same bytes" in note for note in result.notes)
    test = data(seed=1)
    assert relative(Session(network()).run(test)["y"], Session(model).run(test)["y"]) < 0.6


def test_fewer_positions_than_inputs_are_a_warning_with_numbers() -> None:
    model = network()
    few = context(model, data(count=5))
    result = Sparsify(propagate=False).run(model, few)
    warning = next(note for note in result.notes if note.startswith("warning:"))
    assert "inputs: 6 (" in warning
    assert "q: 30 for 32" in warning
    assert all(np.isfinite(v.const_value.numpy()).all() for v in model.graph.initializers.values())


# -- what cannot be used -----------------------------------------------------------------------------------------------


def half(body: str, **arrays: np.ndarray) -> ir.Model:
    return graph("(float16[n,16] x) => (float16[n,16] y)", body, **{n: a.astype(np.float16) for n, a in arrays.items()})


@pytest.mark.parametrize("propagate", [False, True])
@pytest.mark.parametrize("make", [Sparsify, lambda **o: Armor(overhead=0.5, cycles=2, **o)])
def test_activations_that_overflow_leave_the_layer_alone(make: Any, propagate: bool) -> None:
    random = np.random.default_rng(0)
    model = half("h = MatMul(x, w) y = MatMul(h, v)", w=np.full((16, 16), 3e3), v=random.normal(size=(16, 16)))
    before = weights(model)
    x = np.abs(random.normal(size=(64, 16))).astype(np.float16) * 10
    result = make(propagate=propagate, exclude=("w",)).run(model, context(model, {"x": x}))
    assert {s.node: s.reason for s in result.skipped}["y"].endswith("not finite")
    assert weights(model) == before


@pytest.mark.parametrize("propagate", [False, True])
def test_inputs_that_never_vary_are_a_reason(propagate: bool) -> None:
    model = network()
    before = weights(model)
    result = Sparsify(propagate=propagate).run(model, context(model, {"x": np.ones((64, 6, 32), np.float32)}))
    assert all("never vary over the 384 positions" in skip.reason for skip in result.skipped)
    assert len(result.skipped) == 6
    assert weights(model) == before


def test_weights_that_are_not_finite_are_a_reason() -> None:
    model = network()
    broken = np.full((32, 32), np.nan, np.float32)
    model.graph.initializers["wd"].const_value = ir.tensor(broken, name="wd")
    result = Sparsify(method="magnitude").run(model, context(model, None))
    assert {skip.node: skip.reason for skip in result.skipped} == {"d": "its weights are not finite"}


def test_factors_that_overflow_are_a_reason() -> None:
    random = np.random.default_rng(0)
    model = half("y = MatMul(x, w)", w=random.normal(size=(16, 16)) * 2e4)
    x = random.normal(size=(64, 16)).astype(np.float16) / 100
    before = weights(model)
    result = Armor(form="factors", overhead=0.9, cycles=4).run(model, context(model, {"x": x}))
    assert result.changed or "overflow float16" in result.skipped[0].reason
    assert result.changed or weights(model) == before
    assert all(np.isfinite(v.const_value.numpy()).all() for v in model.graph.initializers.values())


@pytest.mark.parametrize("propagate", [True, False])
def test_wrappers_behind_a_layer_do_not_hide_the_next(propagate: bool) -> None:
    """Nothing stands between the layers: what the second reads has another name once the first has its wrapper."""
    random = np.random.default_rng(0)
    arrays = {n: random.normal(size=(512, 512)).astype(np.float32) * 0.05 for n in "uv"}
    model = graph("(float[n,512] x) => (float[n,512] y)", "h = MatMul(x, u)  y = MatMul(h, v)", **arrays)
    ctx = context(model, {"x": random.normal(size=(64, 512)).astype(np.float32)})
    made = Armor(form="factors", wrappers="out", overhead=0.05, cycles=1, propagate=propagate, memory=2)
    result = made.run(model, ctx)
    check(model)
    assert not result.skipped
    assert len(result.details["2:4 cores"]) == 2
