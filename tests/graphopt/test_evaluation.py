"""Scores are what numpy says they are, and data that does not fit is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt import evaluation, model
from graphopt.errors import DataError, UsageError

IDENTITY = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,7] x) => (float[N,7] y, float[N,7] other) { y = Identity(x)  other = Neg(x) }"""
FIXED = IDENTITY.replace("[N,7]", "[4,7]")
IMAGE = IDENTITY.replace("[N,7]", "[N,7,5,7]")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(11, 7)).astype(np.float32)
LABELS = RNG.integers(0, 7, 11)


def net(text: str = IDENTITY) -> ir.Model:
    return ir.from_onnx_text(text)


def score(arrays: dict[str, Any], metric: str | None = None, text: str = IDENTITY) -> float:
    return evaluation.load(arrays, metric, net(text), batch_size=4).score(net(text))


@pytest.mark.parametrize("text", [IDENTITY, FIXED])
def test_top1_and_top5_equal_numpy_also_where_the_last_batch_is_padded(text: str) -> None:
    order = np.argsort(-X, axis=1)
    assert score({"x": X, "labels": LABELS}, text=text) == np.mean(order[:, 0] == LABELS)
    assert score({"x": X, "labels": LABELS}, "top5", text) == np.mean((order[:, :5] == LABELS[:, None]).any(1))


def test_ties_and_nan_do_not_flatter() -> None:
    flat = np.zeros((7, 7), np.float32)
    assert score({"x": flat, "labels": np.arange(7)}) == pytest.approx(1 / 7)
    network = net("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,7] x) => (float[N,7] y) { y = Div(x, x) }""")
    assert evaluation.load({"x": flat, "labels": np.zeros(7, int)}, None, network).score(network) == 0


def test_negative_labels_are_left_out() -> None:
    labels = LABELS.copy()
    labels[::2] = -100
    assert score({"x": X, "labels": labels}) == np.mean(X.argmax(1)[1::2] == LABELS[1::2])
    with pytest.raises(DataError, match="all labels are negative"):
        score({"x": X, "labels": np.full(11, -1)})


def test_classes_of_images_stand_on_axis_one_even_when_the_last_fits_too() -> None:
    x = RNG.normal(size=(3, 7, 5, 7)).astype(np.float32)
    labels = RNG.integers(0, 7, (3, 5, 7))
    assert score({"x": x, "labels": labels}, text=IMAGE) == pytest.approx(np.mean(x.argmax(1) == labels))


def test_mse_and_cosine_against_reference_outputs() -> None:
    reference = X + RNG.normal(size=X.shape).astype(np.float32)
    assert score({"x": X, "labels": reference}, "mse") == pytest.approx(np.mean((X - reference) ** 2), rel=1e-6)
    cosines = (X * reference).sum(1) / np.linalg.norm(X, axis=1) / np.linalg.norm(reference, axis=1)
    assert score({"x": X, "labels": reference}, "cosine") == pytest.approx(cosines.mean(), rel=1e-6)
    assert score({"x": X, "labels|other": -X}, "cosine") == pytest.approx(1)
    assert not evaluation.load({"x": X, "labels": X}, "mse", net()).higher_is_better
    assert evaluation.load({"x": X, "labels": X}, "cosine", net()).higher_is_better


def test_npz_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "e.npz", x=X, labels=LABELS)
    found = evaluation.load(str(tmp_path / "e.npz"), None, net())
    assert (found.metric, found.name) == ("top1", str(tmp_path / "e.npz"))
    assert found.score(net()) == np.mean(X.argmax(1) == LABELS)


def test_function_gets_an_onnxruntime_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_eval_module.py").write_text(
        "import numpy as np\n"
        "def error(session):\n"
        "    name = session.get_inputs()[0].name\n"
        "    return np.float32(session.run(None, {name: np.full((2, 7), 3, np.float32)})[0].mean())\n"
        "error.higher_is_better = False\n"
        "error.metric = 'my error'\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    found = evaluation.load("my_eval_module:error", None, net())
    assert (found.score(net()), found.metric, found.higher_is_better) == (3.0, "my error", False)
    sys.modules.pop("my_eval_module")
    with pytest.raises(UsageError, match="metric 'top1'"):
        evaluation.load("my_eval_module:error", "top1", net())


@pytest.mark.parametrize("result", [None, "good", float("nan")])
def test_functions_must_return_a_finite_number(result: object) -> None:
    def judge(session: object) -> Any:
        return result

    with pytest.raises(DataError, match="judge"):
        evaluation.load(judge, None, net()).score(net())


def test_an_error_in_the_function_is_named() -> None:
    def judge(session: object) -> float:
        raise KeyError("row 3")

    with pytest.raises(DataError, match="KeyError: 'row 3'"):
        evaluation.load(judge, None, net()).score(net())


BAD: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "no labels": ({"x": X}, None, "exactly one array of labels"),
    "two labels": ({"x": X, "labels": LABELS, "labels|other": X}, None, "exactly one array of labels"),
    "unknown output": ({"x": X, "labels|nope": X}, "mse", "no output 'nope'"),
    "too few labels": ({"x": X, "labels": LABELS[:-1]}, None, "for 11 samples"),
    "float labels": ({"x": X, "labels": X[:, 0]}, "top1", "integer class indices"),
    "wrong shape": ({"x": X, "labels": X[:, :3]}, "mse", "do not fit|for an output of shape"),
    "label too large": ({"x": X, "labels": np.full(11, 7)}, None, "label 7 for 7 classes"),
    "one-hot labels": ({"x": X, "labels": np.eye(7, dtype=int)[LABELS]}, None, "do not fit the output"),
    "unknown input": ({"x": X, "z": X, "labels": LABELS}, None, "key 'z'"),
}


@pytest.mark.parametrize("case", BAD)
def test_data_that_does_not_fit_is_refused(case: str) -> None:
    arrays, metric, expected = BAD[case]
    with pytest.raises(DataError, match=expected):
        score(arrays, metric)


def test_metrics_are_checked() -> None:
    with pytest.raises(UsageError, match="no metric 'f1'"):
        score({"x": X, "labels": LABELS}, "f1")
    with pytest.raises(UsageError, match="must be named"):
        score({"x": X, "labels": X})
    with pytest.raises(DataError, match="no such"):
        evaluation.load("nowhere.npz", None, net())


@pytest.mark.data
def test_published_accuracy_of_resnet20_is_reproduced(data_dir: Path) -> None:
    with np.load(data_dir / "cifar10" / "test.npz") as raw:
        images, labels = raw["images"], raw["labels"]
    mean = np.array([0.485, 0.456, 0.406], np.float32).reshape(1, 3, 1, 1)
    std = np.array([0.229, 0.224, 0.225], np.float32).reshape(1, 3, 1, 1)
    arrays = {"input": (images.astype(np.float32) / 255 - mean) / std, "labels": labels}
    network = model.load(data_dir / "models" / "resnet20_cifar10.onnx")
    assert evaluation.load(arrays, "top1", network).score(network) == pytest.approx(0.9173, abs=1e-9)
