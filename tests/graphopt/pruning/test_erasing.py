"""The order in which branches go: what matters least first, neighbours judged together."""

import numpy as np
import onnx_ir as ir
import pytest
from redundant_net import images
from residual_nets import residual_blocks

from graphopt.analysis.units import analyse
from graphopt.executor import Session
from graphopt.pipeline.clone import private_clone
from graphopt.progress import Silent
from graphopt.pruning.branches import Erased
from graphopt.pruning.decision import Decision, built, regroup, translate
from graphopt.pruning.erasing import Eraser, Writer, as_erasures, savings, writers
from graphopt.pruning.families import candidates
from graphopt.pruning.selection import Choice
from graphopt.pruning.work import mac_terms
from graphopt.rewriting.layers import layers_of


def eraser_of(model, **options):
    return Eraser(model, images(model, 64), 1, Silent(), **options)


def test_what_matters_least_goes_first():
    model = residual_blocks([1.0, 0.05, 0.4])
    eraser = eraser_of(model)
    saved = {b.output: 1.0 for b in eraser.branches}
    chosen, harm = eraser.order(saved, enough=3.0)
    assert chosen[0].output == "d1"
    assert harm[0] == 0
    assert (np.diff(harm) >= 0).all()
    assert [b.output for b in chosen] == ["d1", "d2", "d0"]
    assert harm[1] < 0.3 * harm[2]
    # it stops where enough is saved, and knows no branch that saves nothing
    assert [b.output for b in eraser.order(saved, enough=1.0)[0]] == ["d1"]
    assert [b.output for b in eraser.order({"d0": 1.0}, enough=3.0)[0]] == ["d0"]
    # three times the work saved is worth some harm
    dear = eraser.order({"d0": 1.0, "d1": 1e-3, "d2": 1e3}, enough=1.0)[0]
    assert dear[0].output == "d2"


def test_the_refit_of_the_writer_helps():
    model = residual_blocks([0.6, 0.6, 0.6])
    eraser = eraser_of(model)
    (branch,) = [b for b in eraser.branches if b.output == "d1"]
    copy = private_clone(model)
    eraser.apply(copy, [branch])
    x = next(iter(images(model, 64).batches(batch_size=64)))
    want, have = (Session(m).run(x)["y"] for m in (model, copy))
    only_shifted = float(np.square(have - want).sum() / np.square(want).sum())
    assert eraser.noise([branch]) < 0.7 * only_shifted


def test_excluded_branches_stay():
    model = residual_blocks([0.1, 0.1, 0.1])
    for node in model.graph:
        node.name = f"node_{node.outputs[0].name}"
    left = eraser_of(model, exclude=("node_b0", "u2")).branches
    assert [b.output for b in left] == ["d1"]


def test_a_writer_stands_for_the_last_of_several_sums():
    first, second = Erased("a", "e0", "a", "e0", True), Erased("e0", "e0", "e0", "e1", True)
    assert writers([first, second, Erased(total="z")]) == {"e0": Writer("a", "a", "e1", True)}


def test_savings_count_what_only_the_branch_does():
    model = residual_blocks([1, 1])
    coupling = analyse(model)
    eraser = eraser_of(model)
    terms = mac_terms(model, coupling, {"x": np.zeros((1, 3, 8, 8), np.float32)})
    saved = savings(eraser.branches, terms)
    assert saved == {"d0": 2 * 8 * 8 * 9 * 64, "d1": 2 * 8 * 8 * 9 * 64}
    families, _ = candidates(coupling, layers_of(model)[0], (), refitted=True)
    erasures = as_erasures(eraser.branches, [0, 1, 2], families, coupling)
    inner = [[families[i].layers for i in held] for held in erasures.families]
    assert inner == [[("d0",)], [("d1",)]]  # and the stream belongs to none


@pytest.mark.parametrize("order", [1, -1])
def test_a_decision_is_built_and_units_keep_their_identity(order):
    model = residual_blocks([1, 1, 1])
    coupling = analyse(model)
    families, _ = candidates(coupling, layers_of(model)[0], (), refitted=True)
    eraser = eraser_of(model)
    inner = next(f for f in families if f.layers == ("d2",))
    gone = next(f for f in families if f.layers == ("d1",))
    units = inner.units[:3][::order]
    choice = Choice(frozenset(units), (3, 0), 0.5, 0.0, 0.0, 1)
    decision = Decision(choice, [type("F", (), {"units": units + inner.units[3:]}), gone], eraser.branches[1:2])
    small = built(model, coupling, decision, eraser)
    assert small.graph.initializers["v2"].const_value.shape == ir.Shape([5, 8, 3, 3])
    assert "v1" not in small.graph.initializers
    copy = private_clone(model)
    eraser.apply(copy, decision.branches)
    after = analyse(copy)
    moved = translate(coupling, after, units)
    assert [after.units[u - 1].members for u in moved] == [coupling.units[u - 1].members for u in units]
    assert translate(coupling, after, gone.units) == []
    left, _ = candidates(after, layers_of(copy)[0], (), refitted=True)
    assert [r for r in regroup(left, moved) if r] == [moved]
    with pytest.raises(ValueError, match="no unit"):
        translate(coupling, after, [0])
