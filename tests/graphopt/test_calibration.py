"""Every form of calibration data: what is read is what was given, and what does not fit is refused by name."""

from __future__ import annotations

import itertools
import zipfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphopt import calibration, evaluation, model
from graphopt.data.feeds import input_specs
from graphopt.data.sources import Feeds
from graphopt.errors import DataError, ModelError, UsageError
from graphopt.pruning.walk import Walk
from graphopt.slicing import SlicedSession
from graphopt.verify import compare

ONE = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,3,4] x) => (float[N,3,4] z) { y = Relu(x)  z = Neg(y) }"""
FIXED = ONE.replace("[N,3,4]", "[4,3,4]")
TWO = """<ir_version: 8, opset_import: ["" : 17]>
g (int64[N,S] ids, int64[N,S] mask) => (int64[N,S] y) { y = Mul(ids, mask) }"""
STATE = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,4] x, float[2,N,4] state, int64 rate) => (float[2,N,4] y) {
    r = Cast<to=1>(rate)  s = Mul(state, r)  y = Add(s, x) }"""
DEFAULTED = """<ir_version: 3, opset_import: ["" : 17]>
g (float[N,3] x, float[3] w) => (float[N,3] y) <float[3] w = {1, 2, 3}> { y = Mul(x, w) }"""


def net(text: str) -> ir.Model:
    return ir.from_onnx_text(text)


def samples(n: int = 10, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 3, 4)).astype(np.float32)


def joined(data: calibration.Calibration, name: str = "x", **options: int) -> np.ndarray:
    return np.concatenate([feeds[name] for feeds in data.batches(**options)])


# --- forms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_gives_back_its_rows_in_batches(tmp_path: Path, compressed: bool) -> None:
    x = samples()
    (np.savez_compressed if compressed else np.savez)(tmp_path / "c.npz", x=x, labels=np.arange(10))
    data = calibration.load(str(tmp_path / "c.npz"), net(ONE))
    assert data.samples == 10
    assert [len(f["x"]) for f in data.batches(4)] == [4, 4, 2]
    assert set(next(data.batches())) == {"x"}
    assert any("labels" in note for note in data.notes)
    np.testing.assert_array_equal(joined(data, batch_size=3), x)
    np.testing.assert_array_equal(joined(data, batch_size=3), x)  # re-iterable


def test_a_file_of_another_kind_is_not_taken_for_a_pickle(tmp_path: Path) -> None:
    """numpy's own message advises to load the file unsafely."""
    (tmp_path / "c.npz").write_text("no archive")
    with pytest.raises(DataError, match=r"neither \.npy nor \.npz") as caught:
        calibration.load(str(tmp_path / "c.npz"), net(ONE))
    assert "pickle" not in str(caught.value)


def test_uncompressed_npz_is_not_read_into_memory(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", x=np.asfortranarray(samples()), z=1)
    from graphopt.files.arrays import read_npz

    arrays = read_npz(tmp_path / "c.npz")
    assert isinstance(arrays["x"], np.memmap)
    np.testing.assert_array_equal(arrays["x"], samples())
    assert arrays["z"] == 1


@pytest.mark.parametrize(("limit", "sizes"), [(5, [4, 1]), (4, [4]), (8, [4, 4]), (99, [4, 4, 2])])
def test_limit_counts_samples(limit: int, sizes: list[int]) -> None:
    data = calibration.load({"x": samples()}, net(ONE))
    assert [len(f["x"]) for f in data.batches(4, limit)] == sizes


def test_fixed_batch_is_kept_and_the_rest_left_out_with_a_note() -> None:
    data = calibration.load({"x": samples()}, net(FIXED))
    assert [len(f["x"]) for f in data.batches(32)] == [4, 4]
    assert any("last 2 samples" in note for note in data.notes)


def test_keys_with_sample_numbers_are_whole_calls_in_numeric_order(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "c.npz",
        **{f"{i}|x": samples(1 + i % 2, i) for i in range(11)},
    )
    data = calibration.load(tmp_path / "c.npz", net(ONE.replace("N,", "frames,")))
    got = list(data.batches(32))
    assert len(got) == 11
    np.testing.assert_array_equal(got[10]["x"], samples(1, 10))
    assert data.samples == sum(1 + i % 2 for i in range(11))


def test_stateful_model_takes_stacked_samples_and_scalars() -> None:
    rng = np.random.default_rng(0)
    x, state = rng.normal(size=(5, 4)).astype(np.float32), rng.normal(size=(5, 2, 1, 4)).astype(np.float32)
    data = calibration.load({"x": x, "state": state, "rate": np.full(5, 16000)}, net(STATE))
    got = list(data.batches(32))
    assert len(got) == data.samples == 5
    np.testing.assert_array_equal(got[3]["x"], x[3:4])
    np.testing.assert_array_equal(got[3]["state"], state[3])
    assert got[3]["rate"].shape == ()


def test_arrays_of_one_call_of_a_stateful_model_are_that_call() -> None:
    feeds = {"x": np.ones((3, 4), np.float32), "state": np.ones((2, 3, 4), np.float32), "rate": np.array(8)}
    got = list(calibration.load(feeds, net(STATE)).batches(1))
    assert len(got) == 1
    assert got[0]["x"].shape == (3, 4)


def test_axes_of_different_names_and_lengths_count_no_samples() -> None:
    """The nodes and edges of one graph: each feed is one call."""
    network = net(TWO.replace("int64[N,S] ids, int64[N,S] mask", "float[nodes,7] x, int64[edges] source"))
    feeds = [{"x": np.ones((n, 7), np.float32), "source": np.zeros(m, np.int64)} for n, m in ((9, 17), (5, 5), (4, 8))]
    got = list(calibration.load(feeds, network).batches(2))
    assert [(len(f["x"]), len(f["source"])) for f in got] == [(9, 17), (5, 5), (4, 8)]


def test_folder_of_npz_is_read_in_natural_order(tmp_path: Path) -> None:
    for i in range(12):
        np.savez(tmp_path / f"part{i}.npz", x=samples(3, i))
    data = calibration.load(tmp_path, net(ONE))
    assert data.samples == 36
    np.testing.assert_array_equal(joined(data, batch_size=5), np.concatenate([samples(3, i) for i in range(12)]))


def test_folder_of_npy_holds_samples_or_batches_of_one_input(tmp_path: Path) -> None:
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", samples(1, i)[0] if i else samples(1, i))
    data = calibration.load(tmp_path, net(ONE))
    np.testing.assert_array_equal(joined(data), np.concatenate([samples(1, i) for i in range(3)]))


def test_folder_of_npy_named_like_the_inputs_is_one_set(tmp_path: Path) -> None:
    ids = np.arange(12).reshape(6, 2)
    np.save(tmp_path / "ids.npy", ids)
    np.save(tmp_path / "mask.npy", np.ones((6, 2), np.int64))
    data = calibration.load(tmp_path, net(TWO))
    np.testing.assert_array_equal(joined(data, "ids", batch_size=4), ids)


def test_samples_of_different_lengths_pass_one_by_one() -> None:
    lengths = [5, 2, 7]
    feeds = [{"ids": np.ones((1, n), np.int64), "mask": np.ones((1, n), np.int64)} for n in lengths]
    data = calibration.load(feeds, net(TWO))
    assert [f["ids"].shape[1] for f in data.batches(32)] == lengths


def test_function_of_a_module_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_feeds_module.py").write_text(
        "import numpy as np\n"
        "calls = []\n"
        "def feeds():\n"
        "    calls.append(1)\n"
        "    buffer = np.empty((2, 3, 4), np.float32)\n"
        "    for i in range(4):\n"
        "        buffer[:] = i\n"
        "        yield {'x': buffer}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    data = calibration.load("my_feeds_module:feeds", net(ONE))
    assert data.samples == 8  # small enough to be read and checked at once
    kept = joined(data)
    assert [float(x[0, 0]) for x in kept] == [0, 0, 1, 1, 2, 2, 3, 3]  # the reused buffer was copied
    assert len(joined(data, limit=3)) == 3
    list(data.batches())
    import my_feeds_module

    assert len(my_feeds_module.calls) <= 2  # passes after the first come from memory
    assert data.samples == 8


def test_feeds_too_large_to_keep_are_made_anew() -> None:
    calls: list[int] = []

    def make() -> list[dict[str, np.ndarray]]:
        calls.append(1)
        return [{"x": samples(2, i)} for i in range(5)]

    source = Feeds("f", make, input_specs(net(ONE)), cache_bytes=3 * samples(2).nbytes)
    for _ in range(2):
        got = [b.arrays["x"] for b in source.blocks()]
        np.testing.assert_array_equal(np.concatenate(got), np.concatenate([samples(2, i) for i in range(5)]))
    assert len(calls) == 3
    assert source.samples == 10


def test_feeds_are_cut_only_where_the_model_names_its_batch_axis_and_never_merged() -> None:
    feeds = [{"x": samples(n, n)} for n in (5, 1, 2)]
    whole = np.concatenate([f["x"] for f in feeds])
    for name, sizes in (("batch_size", [3, 2, 1, 2]), ("N", [3, 2, 1, 2]), ("time", [5, 1, 2]), ("", [5, 1, 2])):
        data = calibration.load(feeds, net(ONE.replace("N,", f"{name or '?'},")))
        assert [len(f["x"]) for f in data.batches(3)] == sizes
        np.testing.assert_array_equal(joined(data), whole)


def test_passes_that_overlap_see_the_same() -> None:
    data = calibration.load(lambda: ({"x": samples(1, i)} for i in range(5)), net(ONE))
    for a, b in itertools.zip_longest(data.batches(), data.batches()):
        np.testing.assert_array_equal(a["x"], b["x"])


def test_a_function_may_return_arrays() -> None:
    data = calibration.load(lambda: {"x": samples()}, net(ONE))
    assert [len(f["x"]) for f in data.batches(8)] == [8, 2]


def test_random_is_reproducible_and_says_so() -> None:
    a, b = (calibration.load("random", net(ONE), seed=3) for _ in range(2))
    np.testing.assert_array_equal(joined(a), joined(b))
    assert not np.array_equal(joined(a), joined(calibration.load("random", net(ONE), seed=4)))
    assert any(note.startswith("warning: ") and "random" in note for note in a.notes)


def test_inputs_with_defaults_may_be_left_out() -> None:
    got = next(calibration.load({"x": np.ones((2, 3), np.float32)}, net(DEFAULTED)).batches())
    assert set(got) == {"x"}


def test_fingerprint_tells_values_apart_and_batches_not(tmp_path: Path) -> None:
    x = samples()
    np.savez_compressed(tmp_path / "c.npz", x=x)
    prints = [calibration.load(d, net(ONE)).fingerprint() for d in ({"x": x}, tmp_path / "c.npz", {"x": x + 1})]
    assert prints[0] == prints[1] != prints[2]
    again = calibration.load({"x": x}, net(ONE), batch_size=3)
    assert again.fingerprint() == prints[0]


# --- conversions and refusals --------------------------------------------------------------------------------------


def test_lossless_integers_and_double_precision_are_converted_with_a_note() -> None:
    data = calibration.load({"ids": np.ones((2, 3), np.int32), "mask": np.ones((2, 3), np.int8)}, net(TWO))
    assert {f.dtype for f in next(data.batches()).values()} == {np.dtype(np.int64)}
    assert sum("converted" in note for note in data.notes) == 2
    assert joined(calibration.load({"x": samples().astype(np.float64)}, net(ONE))).dtype == np.float32


BAD = {
    "missing": ({"y_": samples()}, "no data for input 'x'"),
    "raw images": ({"x": np.zeros((5, 3, 4), np.uint8)}, "module:function"),
    "floats for integers": ({"x": samples().astype(np.int64)}, "integers are not turned into floats"),
    "channels last": ({"x": samples().transpose(0, 2, 1)}, "np.moveaxis"),
    "no batch axis": ({"x": samples()[0]}, "batch axis is missing"),
    "one axis too many": ({"x": samples()[None, None]}, "expects float32 [N,3,4], got float32 [1,1,10,3,4]"),
    "wrong size": ({"x": np.zeros((5, 3, 5), np.float32)}, "got float32 [5,3,5]"),
    "unknown key": ({"x": samples(), "xx": samples()}, "closest: 'x'"),
    "nothing": ({"x": samples(0)}, "no samples"),
    "no arrays": ({}, "no arrays"),
    "objects": ({"x": np.array([{}], object)}, "object"),
    "infinite generator object": (iter([{"x": samples()}]), "only once"),
    "stacked feed": ([{"x": samples()[:, None]}], "one by one"),
    "pairs": ([(samples(), 3)], "must map input names"),
    "empty list": ([], "no feeds"),
    "number": (lambda: 3, "returned int"),
}


@pytest.mark.parametrize("case", BAD)
def test_data_that_does_not_fit_is_refused_before_work_starts(case: str) -> None:
    data, expected = BAD[case]
    with pytest.raises(DataError) as caught:
        calibration.load(data, net(ONE))
    assert expected in str(caught.value)
    assert caught.value.exit_code == 3


def test_fixed_batch_without_enough_samples_is_refused() -> None:
    with pytest.raises(DataError, match="fixes the batch size to 4 and the data holds 3"):
        calibration.load({"x": samples(3)}, net(FIXED))


def test_different_lengths_are_refused() -> None:
    with pytest.raises(DataError, match=r"'mask' \[4,3\]"):
        calibration.load({"ids": np.ones((5, 3), np.int64), "mask": np.ones((4, 3), np.int64)}, net(TWO))


def test_nan_is_refused_in_arrays_and_in_later_feeds() -> None:
    bad = samples()
    bad[7, 1, 2] = np.nan
    with pytest.raises(DataError, match="1 NaN"):
        calibration.load({"x": bad}, net(ONE))
    with pytest.raises(DataError, match="1 NaN"):
        calibration.load([{"x": samples()}, {"x": bad}], net(ONE))
    source = Feeds("f", lambda: [{"x": samples()}, {"x": bad}], input_specs(net(ONE)))
    data = calibration.Calibration(source, input_specs(net(ONE)))
    for _ in range(2):
        with pytest.raises(DataError, match="1 NaN"):
            list(data.batches())


def test_a_later_feed_that_fails_fails_every_time() -> None:
    def make() -> object:
        yield {"x": samples(1)}
        raise KeyError("image 7")

    with pytest.raises(DataError, match="KeyError: 'image 7'"):
        calibration.load(make, net(ONE))
    data = calibration.Calibration(Feeds("f", make, input_specs(net(ONE))), input_specs(net(ONE)))
    for _ in range(2):
        with pytest.raises(DataError, match="KeyError: 'image 7'"):
            list(data.batches())


def test_a_function_that_never_ends_serves_limited_passes() -> None:
    source = Feeds(
        "f", lambda: ({"x": samples(1, i)} for i in itertools.count()), input_specs(net(ONE)),
        cache_bytes=20 * samples(1).nbytes,
    )  # fmt: skip
    assert 10 <= len(source.prefetch()) <= 12
    data = calibration.Calibration(source, input_specs(net(ONE)))
    for count in (5, 50, 5):
        got = joined(data, limit=count)
        np.testing.assert_array_equal(got, np.concatenate([samples(1, i) for i in range(count)]))
    assert data.samples is None


def test_shuffling_functions_are_refused() -> None:
    rng = np.random.default_rng()
    source = Feeds("f", lambda: [{"x": rng.random((1, 3, 4), np.float32)}], input_specs(net(ONE)), cache_bytes=0)
    with pytest.raises(DataError, match="other data each time"):
        for _ in range(2):
            list(source.blocks())


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ("nowhere.npz", DataError),
        ("no_such_module:f", UsageError),
        ("json:no_such", UsageError),
        ("json:__name__", UsageError),
    ],
)
def test_names_that_lead_nowhere(spec: str, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        calibration.load(spec, net(ONE))
    assert spec in str(caught.value)


def test_pickles_and_broken_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", x=np.array([{"a": 1}], object))
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], object))
    (tmp_path / "text.npz").write_text("not an archive")
    np.savez_compressed(tmp_path / "cut.npz", x=samples(1000))
    whole = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    (tmp_path / "damaged.npz").write_bytes(damaged)
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (9, 3, 4)}")
    for name in ("objects.npz", "objects.npy", "text.npz", "cut.npz", "damaged.npz", "huge.npz"):
        with pytest.raises(DataError) as caught:
            calibration.load(tmp_path / name, net(ONE))
        assert name in str(caught.value)


def test_mixed_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.npy or \.npz"):
        calibration.load(tmp_path, net(ONE))
    np.save(tmp_path / "a.npy", samples())
    np.savez(tmp_path / "b.npz", x=samples())
    with pytest.raises(DataError, match="mixes"):
        calibration.load(tmp_path, net(ONE))


# --- real data -----------------------------------------------------------------------------------------------------

WILD = (
    "basic_pitch", "dnsmos_sig_bak_ovr", "dtln_1", "gtcrn", "ppocr_cls", "silero_vad_v5_if", "ultraface_rfb320",
    "yunet_n_dynamic",
)  # fmt: skip


@pytest.mark.data
@pytest.mark.parametrize("name", WILD)
def test_recorded_inputs_of_wild_models_fit(data_dir: Path, name: str) -> None:
    network = model.load(data_dir / "models" / f"{name}.onnx", check_weights=False)
    data = calibration.load(data_dir / "inputs" / f"{name}.npz", network)
    with np.load(data_dir / "inputs" / f"{name}.npz") as raw:
        first = {k.partition("|")[2]: raw[k] for k in raw.files if k.startswith("0|")}
    got = next(data.batches())
    assert got.keys() == first.keys()
    for key, array in first.items():
        np.testing.assert_array_equal(got[key], array)


@pytest.mark.data
def test_raw_cifar_is_refused_and_preprocessed_cifar_fits(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = model.load(data_dir / "models" / "resnet20_cifar10.onnx")
    raw = data_dir / "cifar10" / "train2048.npz"
    with pytest.raises(DataError, match="rename 'images' to 'input'"):
        calibration.load(raw, network)
    (tmp_path / "cifar_feeds.py").write_text(
        "import numpy as np\n"
        "def feeds():\n"
        f"    images = np.load({str(raw)!r})['images']\n"
        "    for i in range(0, len(images), 64):\n"
        "        yield {'input': (images[i:i+64].astype(np.float32) / 255 - 0.45) / 0.22}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    data = calibration.load("cifar_feeds:feeds", network)
    assert sum(len(f["input"]) for f in data.batches()) == data.samples == 2048


@pytest.mark.data
def test_token_ids_and_mask_of_a_language_model(data_dir: Path) -> None:
    network = model.load(data_dir / "models" / "minilm_l6.onnx", check_weights=False)
    with np.load(data_dir / "sts" / "calib1024.npz") as raw:
        arrays = {"input_ids": raw["ids"], "attention_mask": raw["mask"]}
    data = calibration.load(arrays, network)
    assert data.samples == 1024
    np.testing.assert_array_equal(joined(data, "input_ids", limit=70), arrays["input_ids"][:70])


def test_no_such_tensor_is_named() -> None:
    network = net(ONE)
    data = calibration.load({"x": samples()}, network)
    with pytest.raises(ModelError, match="'nope'"):
        next(calibration.activations(network, ["nope"], data))


# --- values that the model does not take ---------------------------------------------------------------------------

TABLE = """<ir_version: 8, opset_import: ["" : 17]>
g (int64[N,S] ids) => (float[N,S] y) <float[3] t = {1, 2, 3}> { e = Gather(t, ids)  y = Neg(e) }"""


@pytest.mark.parametrize("way", ["whole", "tapped", "sliced", "walked", "evaluated"])
def test_values_out_of_range_are_traced_to_the_file_and_its_samples(way: str, tmp_path: Path) -> None:
    ids = np.zeros((10, 2), dtype=np.int64)
    ids[7, 1] = 77
    file = tmp_path / "tokens.npz"
    np.savez(file, ids=ids, labels=np.zeros(10, dtype=np.int64))
    network = net(TABLE)
    data = calibration.load(file, network, batch_size=4)
    batches = data.batches()
    with pytest.raises(ModelError, match=r"idx=77") as error:
        if way == "whole":
            compare(network, network, batches)
        elif way == "sliced":
            SlicedSession(network, budget=1).run_all(list(batches))
        elif way == "tapped":
            list(calibration.activations(network, ["e"], data))
        elif way == "walked":
            list(Walk(network, data).stream(["e"]))
        else:
            evaluation.load(str(file), "top1", network, batch_size=4).score(network)
    assert f"{file}, samples 4 to 7" in str(error.value)
