"""What delegates take of models: all kinds of conditions, what would help, and ONNX Runtime's own estimate beside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

import graphopt
from graphopt.delegates import Report, delegates, report
from graphopt.delegates.ort_checker import CHECKED, estimate
from graphopt.delegates.table import parse_delegate
from graphopt.delegates.text import as_text

TABLE: dict[str, Any] = {"title": "A chip", "date": "2026-01-01", "sources": ["its manual"]}
QNN = os.environ.get("GRAPHOPT_QNN_PYTHON")


def on(model: ir.Model, *rules: dict[str, Any], **more: Any) -> Report:
    return report(model, parse_delegate("chip", {**TABLE, **more, "rules": list(rules)}, "chip.toml"))


def only_reason(found: Report) -> str:
    ((reason,),) = {refused.reasons for refused in found.refused}
    return reason


CONV = "y = Conv(x, w)"


def conv(signature: str = "(float[1,3,8,8] x) => (float[1,4,8,8] y)", body: str = CONV, **more: Any) -> ir.Model:
    return graph(signature, body, **({"w": (4, 3, 1, 1)} | more))


@pytest.mark.parametrize(
    ("rule", "more", "reason", "change"),
    [
        (
            {"ops": ["Relu"]},
            {"instead": {"Conv": "Relu is taken"}},
            "Conv has no kernel there",
            "replace Conv: Relu is taken",
        ),
        ({"ops": ["Conv"], "types": {"X": ["float16"]}}, {}, "X is float32, not float16", "make Conv float16"),
        ({"ops": ["Conv"], "ranks": {"X": [3]}}, {}, "X has 4 axes, not 3", "reshape around Conv to 3 axes"),
        ({"ops": ["Conv"]}, {"ranks": [1, 3]}, "input x has 4 axes, not 1 to 3", "reshape around Conv to 1 to 3 axes"),
        ({"ops": ["Conv"], "constant": ["X"]}, {}, "X is computed", "make X of Conv a constant"),
        ({"ops": ["Conv"], "absent": ["W"]}, {}, "W is given", "leave out W of Conv"),
        ({"ops": ["Conv"], "attributes": {"group": [2]}}, {}, "group is 1, not 2", "change group of Conv to 2"),
        (
            {"ops": ["Conv"], "since": 12},
            {},
            "Conv of version 11 is taken from version 12",
            "convert the operator",
        ),
        ({"ops": ["Conv"]}, {"largest": 7}, "x has 8 entries along an axis, of 7 at most", "cut axes longer than 7"),
        ({"ops": ["Conv"], "checks": ["two-inputs"], "until": 10}, {}, "from version 1 to 10", "convert the operator"),
    ],
)
def test_every_condition_refuses_with_its_reason_and_a_change(
    rule: dict[str, Any], more: dict[str, Any], reason: str, change: str
) -> None:
    found = on(conv(), rule, **more)
    assert (found.taken, found.nodes, found.parts) == (0, 1, ())
    assert reason in only_reason(found)
    assert found.changes[0].change.startswith(change)
    assert (found.changes[0].taken, found.changes[0].macs) == (1, 1.0)


def test_a_node_is_taken_by_any_rule_and_told_by_the_nearest() -> None:
    rules = (
        {"ops": ["Conv"], "types": {"X": ["float16"]}, "ranks": {"X": [3]}},
        {"ops": ["Conv"], "ranks": {"X": [5]}},
    )
    assert only_reason(on(conv(), *rules)) == "X has 4 axes, not 5"
    assert on(conv(), *rules, {"ops": ["Conv"]}).taken == 1


def test_free_sizes_name_the_options_that_fix_them() -> None:
    model = conv("(float[N,3,H,8] x) => (float[N,4,H,8] y)")
    found = on(model, {"ops": ["Conv"]}, static_shapes=True)
    assert only_reason(found) == "the shape of x is [N, 3, H, 8]"
    assert found.changes[0].change == "fix the sizes of the inputs (--dim N=SIZE --dim H=SIZE) and fold"
    assert on(model, {"ops": ["Conv"]}).taken == 1
    assert on(model, {"ops": ["Conv"], "known": {"X": [1, 3]}}).taken == 1
    assert on(model, {"ops": ["Conv"], "known": {"X": [1, 2]}}).taken == 0


def test_nodes_that_compute_shapes_are_told_apart() -> None:
    model = conv(body="c = Conv(x, w)  s = Shape(c)  t = Cast<to=7>(s)  y = Reshape(c, t)")
    found = on(model, {"ops": ["Conv"]}, {"ops": ["Reshape"], "constant": ["shape"]})
    assert {r.op: r.reasons[0] for r in found.refused} == {
        "Shape": "it computes the shape of something",
        "Cast": "it computes the shape of something",
        "Reshape": "shape is computed",
    }
    assert [(c.change, c.taken, c.parts) for c in found.changes] == [("fold", 4, 1)]


def test_work_parts_and_changes_are_ordered_by_what_they_bring() -> None:
    body = "a = Conv(x, w)  e = Erf(a)  b = Conv(e, v)  t = Tan(b)  y = Relu(t)"
    model = conv(body=body, v=(4, 4, 1, 1))
    found = on(model, {"ops": ["Conv", "Relu"]}, worthless=["Relu"], instead={"Erf": "Tanh is taken"})
    # Conv(3 -> 4) and Conv(4 -> 4) over 64 positions
    assert [(len(p.nodes), round(p.macs, 4)) for p in found.parts] == [(1, round(3 / 7, 4)), (1, round(4 / 7, 4))]
    assert found.macs == 1.0 and found.taken == 2
    assert {r.op: r.reasons[0] for r in found.refused}["Relu"] == "Relu alone is not worth the transfer"
    assert [(c.change, c.taken, c.parts) for c in found.changes] == [
        ("replace Erf: Tanh is taken", 3, 1)
    ]  # nothing is known to write in place of Tan
    text = as_text(found)
    for expected in (
        "A chip: 2 of 5 nodes in 2 parts",
        "1 Erf",
        "replace Erf: Tanh is taken: 3, 100.0%, 1",
        "its manual",
    ):
        assert expected in text


def test_what_stands_behind_a_stop_is_not_taken() -> None:
    found = on(conv(body="a = Conv(x, w)  b = TopK_(a)  y = Relu(b)".replace("TopK_", "Erf")),
               {"ops": ["Conv", "Erf", "Relu"]}, stops=["Erf"])  # fmt: skip
    assert [p.nodes for p in found.parts] == [("Conv(a)",)]
    assert "it stands behind Erf" in found.refused[-1].reasons[0]


def test_an_activation_becomes_part_of_the_kernel_before_it() -> None:
    fused = {"fused": {"Relu": ["Conv"]}}
    assert on(conv(body="a = Conv(x, w)  y = Relu(a)"), {"ops": ["Conv"]}, **fused).taken == 2
    # not where something else reads what the kernel would no longer write
    assert on(conv(body="a = Conv(x, w)  r = Relu(a)  y = Add(a, r)"), {"ops": ["Conv"]}, **fused).taken == 1


SCALE = {"s": np.float32(0.1), "z": np.uint8(0), "ws": np.full(4, 0.1, np.float32), "wz": np.zeros(4, np.int8)}


def quantised(scales: str, zeros: str) -> ir.Model:
    body = (
        f"q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)"
        f"  wd = DequantizeLinear<axis=0>(w, {scales}, {zeros})"
        "  c = Conv(d, wd)  p = QuantizeLinear(c, s, z)  y = DequantizeLinear(p, s, z)"
    )
    small = {} if scales == "ws" else {"wz": np.int8(0)}
    return conv(body=body, w=np.ones((4, 3, 1, 1), np.int8), **{**SCALE, **small})


def test_quantised_operators_are_judged_with_their_scales() -> None:
    rule = {"ops": ["Conv"], "quantised": True, "types": {"X": ["uint8"], "W": ["int8"], "Y": ["uint8"]}}
    pairs = {"ops": ["QuantizeLinear", "DequantizeLinear"], "types": {"0": ["float32", "uint8"]}}
    assert on(quantised("ws", "wz"), {**rule, "scales": "channel"}, pairs).taken == 6
    refused = on(quantised("ws", "wz"), rule, pairs)
    assert refused.taken == 2 and "input 1 has 4 scales, not 1" in refused.refused[0].reasons
    signed = {**rule, "types": {"X": ["int8"]}, "scales": "channel"}
    assert on(quantised("ws", "wz"), signed, pairs, int8="cpu").changes[0].change == "quantise for --target cpu"
    float_only = on(quantised("ws", "wz"), {"ops": ["Conv"], "constant": ["W"]})
    assert float_only.taken == 0
    assert {c.change for c in float_only.changes[:1]} == {
        "lower the float model, or take it back with graphopt optimize --passes dequantize"
    }


def test_without_anything_that_multiplies_shares_are_of_nodes() -> None:
    found = on(graph("(float[1,4] x) => (float[1,4] y)", "a = Relu(x)  y = Erf(a)"), {"ops": ["Relu"]})
    assert (found.macs, found.measure) == (0.5, "nodes")
    assert "50.0% of the nodes" in found.summary()


# -- the real tables -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", delegates())
def test_a_plain_convolution_network_is_taken_by_all(name: str) -> None:
    body = "a = Conv<pads=[1,1,1,1]>(x, w, b)  r = Relu(a)  y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)"
    model = conv("(float[1,3,8,8] x) => (float[1,4,4,4] y)", body, w=(4, 3, 3, 3), b=(4,))
    found = report(model, name)
    assert (found.taken, len(found.parts), found.refused) == (3, 1, ())


@pytest.mark.parametrize(
    ("name", "body", "refused"),
    [
        ("nnapi", "a = Conv(x, w)  y = Clip(a, zero, five)", "it clips to [0, 5], not [0, 6] or [-1, 1]"),
        ("nnapi", "a = Conv(x, w)  y = Gelu(a)", "Gelu has no kernel there"),
        ("coreml_neuralnetwork", "a = Conv(x, w)  y = Erf(a)", "Erf has no kernel there"),
        ("coreml_mlprogram", "a = Conv(x, w)  y = HardSwish(a)", "HardSwish has no kernel there"),
        ("xnnpack", "a = Conv(x, w)  y = Softmax<axis=1>(a)", "it works along axis 1 of 4"),
    ],
)
def test_real_rules_refuse_what_their_sources_do(name: str, body: str, refused: str) -> None:
    constants = {"zero": np.float32(0), "five": np.float32(5)}
    used = {key: value for key, value in constants.items() if key in body}
    found = report(conv(body=body, opset=20, **used), name)
    assert found.taken == 1 and refused in found.refused[0].reasons


@pytest.mark.data
@pytest.mark.parametrize("model", ["resnet20_cifar10", "minilm_l6", "ultraface_rfb320", "ppocr_cls"])
def test_we_take_nothing_that_the_runtimes_own_checker_refuses(model: str, data_dir: Path) -> None:
    """It looks at operators and ranks alone, so that it takes more; what it has no entry for, we must refuse too."""
    sizes = {"resnet20_cifar10": {"batch": 1}, "minilm_l6": {"batch": 1, "seq": 16}}.get(model, {})
    loaded = graphopt.optimize(data_dir / "models" / f"{model}.onnx", "fold", dim=sizes, bench=False).model
    for name in CHECKED:
        ours, theirs = report(loaded, name), estimate(loaded, name)
        assert ours.nodes == theirs.nodes
        assert ours.taken <= theirs.taken
        refused = {f"ai.onnx:{r.op}" for r in ours.refused}
        # a misprint in its list ("ai.onnx.ReduceSum") hides this one from it
        misread = {"ai.onnx:ReduceSum"} if name == "coreml_neuralnetwork" else set()
        assert set(theirs.missing) - misread <= refused
        if ours.taken == theirs.taken:
            assert len(ours.parts) == theirs.partitions


@pytest.mark.data
@pytest.mark.skipif(QNN is None, reason="GRAPHOPT_QNN_PYTHON names no Python with onnxruntime-qnn")
@pytest.mark.parametrize("model", ["resnet20_cifar10", "ultraface_rfb320", "minilm_l6"])
def test_the_table_of_qnn_agrees_with_its_compiler(model: str, data_dir: Path, tmp_path: Path) -> None:
    sizes = {"resnet20_cifar10": {"batch": 1}, "minilm_l6": {"batch": 1, "seq": 16}}.get(model, {})
    made = graphopt.optimize(data_dir / "models" / f"{model}.onnx", "fold", dim=sizes, bench=False)
    made.save(tmp_path / "m.onnx")
    script = Path(sys.modules["graphopt.backends"].__path__[0] if "graphopt.backends" in sys.modules else "backends")
    command = [str(QNN), str(script / "qnn_compile.py"), "m.onnx", "c.onnx", "--soc", "43", "--arch", "73"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert '"left": []' in done.stdout
    assert report(made.model, "qnn_htp").refused == ()
