"""Running models with ONNX Runtime: the executor of calibration, verification and measurement.

A model in memory is handed over without its weights: large initialisers go to the runtime as views of the arrays or
memory maps they already are, so nothing is serialised and no weight is held twice, whatever the size of the model.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from graphopt.data.feeds import Call
from graphopt.errors import DataError, GraphoptError, MissingBackendError, ModelError, UsageError

if TYPE_CHECKING:
    import onnx_ir as ir

Array = np.ndarray[Any, Any]

INLINE = 1024
"""Initialisers above this many bytes are shared with the runtime instead of serialised."""

_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(int16)": np.int16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
    "tensor(uint16)": np.uint16,
    "tensor(uint32)": np.uint32,
    "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
    "tensor(string)": np.str_,
}


@dataclass(frozen=True)
class TensorSpec:
    """What a model input takes: name, numpy dtype, and a shape of sizes, dimension names, and None for unknown."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


class Session:
    """A model ready to run.

    Args:
        model: a model in memory, or the path of a model file.
        optimize: let the runtime optimise the graph. Off, what runs is the graph as it stands: use that to compare.
        threads: threads of one operator.
        providers: execution providers, in order of preference, alone or with their options; all must be installed.
        outputs: run these tensors of the main graph as the outputs instead of the model's own outputs.
        low_memory: keep memory at weights plus live tensors: no prepacked copies of weights, no arena.
        profile: beginning of the name of a file into which the runtime writes what its kernels took.
        config: entries of the session's configuration, by the runtime's names.
        shapes: tell the runtime the shapes that a saved file would tell it, which some of its fusions ask for. Finding
            them takes longer than the rest of loading a model: leave it out where only the numbers count.

    Raises:
        ModelError: the runtime refuses the model; names the node.
        MissingBackendError: an execution provider, or the implementation of an operator, is missing.
        UsageError: `outputs` names a tensor that the model does not have.
    """

    def __init__(
        self,
        model: ir.Model | Path,
        *,
        optimize: bool = False,
        threads: int = 1,
        providers: Sequence[str | tuple[str, Mapping[str, str]]] = ("CPUExecutionProvider",),
        outputs: Sequence[str] | None = None,
        low_memory: bool = False,
        profile: Path | None = None,
        config: Mapping[str, str] | None = None,
        shapes: bool = True,
    ) -> None:
        import onnxruntime as ort

        names = [given if isinstance(given, str) else given[0] for given in providers]
        missing = [name for name in names if name not in ort.get_available_providers()]
        if missing:
            raise MissingBackendError(
                f"execution provider {missing[0]} is not in this ONNX Runtime",
                hint=f"available are {', '.join(ort.get_available_providers())}",
            )
        options = ort.SessionOptions()
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # The runtime's own log would put several lines beside our one; what it raises says the same.
        options.log_severity_level = 4
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        for name, value in (config or {}).items():
            options.add_session_config_entry(name, value)
        if low_memory:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False
            options.enable_mem_pattern = False
        self._shared: dict[str, Any] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        try:
            self.session: Any = self._create(ort, model, options, list(providers), outputs, shapes)
        except GraphoptError:
            self._cleanup()
            raise
        except Exception as error:
            self._cleanup()
            raise explain(error, "the runtime cannot load the model") from error
        self.inputs: list[TensorSpec] = [_spec(entry) for entry in self.session.get_inputs()]
        self._overridable = {entry.name: _spec(entry) for entry in self.session.get_overridable_initializers()}
        self._specs = {spec.name: spec for spec in self.inputs} | self._overridable
        self.output_names: list[str] = [entry.name for entry in self.session.get_outputs()]

    def _create(
        self, ort: Any, model: ir.Model | Path, options: Any, providers: list[Any], outputs: Sequence[str] | None,
        shapes: bool,
    ) -> Any:  # fmt: skip
        if isinstance(model, Path):
            if outputs is None:
                if not model.is_file():
                    raise ModelError("there is no such file", where=str(model), hint="check the path")
                return ort.InferenceSession(str(model), options, providers=providers)
            from graphopt.model import load

            model = load(model, check_weights=False)
        return _session_of(self, ort, model, options, providers, outputs, shapes)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the model once.

        Args:
            feeds: one array for each input, of exactly its dtype and a shape that fits.

        Returns:
            The outputs by name.

        Raises:
            DataError: a feed is missing, unknown, or has a wrong dtype or shape.
            ModelError: an operator failed; names the node.
        """
        check_feeds(feeds, self.inputs, self._overridable)
        try:
            results = self.session.run(self.output_names, dict(feeds))
        except Exception as error:
            raise explain(error, running(feeds)) from error
        return dict(zip(self.output_names, results, strict=True))

    def close(self) -> None:
        """Free the session, and its temporary files."""
        self.session = None
        self._shared = {}
        self._cleanup()

    def _cleanup(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _session_of(
    owner: Session, ort: Any, model: ir.Model, options: Any, providers: list[Any], outputs: Sequence[str] | None,
    shapes: bool,
) -> Any:  # fmt: skip
    """A runtime session of a model in memory; see the module docstring for how the weights travel."""
    import onnx
    import onnx_ir as ir

    from graphopt.files.shape_inference import annotated
    from graphopt.files.stored_shapes import keep_needed, strip_value_info
    from graphopt.files.weights import reference, release_files, with_placeholders
    from graphopt.files.writer import INLINE_LIMIT, in_memory, write

    # What the runtime optimises, and what is timed, must be told the same shapes as a saved file tells it.
    optimised = options.graph_optimization_level != ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    as_saved = shapes and optimised and outputs is None
    if as_saved:
        model = annotated(model)
    clone = with_placeholders(model, in_memory, in_memory)
    shared: dict[str, Any] = {}
    inline = 0
    for name, value in list(clone.graph.initializers.items()):
        tensor = model.graph.initializers[name].const_value
        if tensor is None:
            raise ModelError("it holds no data", where=f"initialiser {name}")
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            # The runtime drops what nothing reads before it looks for what is shared with it, and then misses it.
            del clone.graph.initializers[name]
            continue
        if tensor.dtype == ir.DataType.STRING or tensor.nbytes <= INLINE:
            continue
        if f"tensor({tensor.dtype.name.lower()})" not in _NUMPY_TYPES:
            inline += tensor.nbytes
            continue
        array = np.ascontiguousarray(tensor.numpy())
        shared[name] = ort.OrtValue.ortvalue_from_numpy(array)
        value.const_value = reference(tensor, "shared-with-the-runtime", 0, name)
    if inline > INLINE_LIMIT:
        # Types that numpy does not have cannot be shared; as many of them as this go through files.
        owner._folder = tempfile.TemporaryDirectory(prefix="graphopt-")
        path = Path(owner._folder.name) / "model.onnx"
        tapped = model.clone()
        _tap(tapped, outputs)
        write(tapped, path, external=True, compress=False)
        return ort.InferenceSession(str(path), options, providers=providers)
    _tap(clone, outputs)
    proto: onnx.ModelProto = ir.to_proto(clone)
    if as_saved:
        keep_needed(proto)
    else:
        strip_value_info(proto)
    if shared:
        options.add_external_initializers(list(shared), list(shared.values()))
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=providers)
    # The runtime looks at these arrays for as long as it lives; but of most it has made copies in the order that its
    # kernels read, and pages of files come back when they are asked for.
    owner._shared = shared
    release_files(model)
    return session


def _tap(model: ir.Model, outputs: Sequence[str] | None) -> None:
    """Exchange the outputs of the main graph for the named tensors."""
    if outputs is None:
        return
    values = {value.name: value for node in model.graph for value in node.outputs}
    values |= {value.name: value for value in [*model.graph.initializers.values(), *model.graph.inputs]}
    wanted = []
    for name in dict.fromkeys(outputs):
        if name not in values:
            raise UsageError("the main graph has no such tensor", where=f"tensor {name}")
        wanted.append(values[name])
    model.graph.outputs.clear()
    model.graph.outputs.extend(wanted)


def _spec(entry: Any) -> TensorSpec:
    if entry.type not in _NUMPY_TYPES:
        raise ModelError(
            f"its type {entry.type} cannot be fed from numpy", where=f"input {entry.name}", hint="cast inside the model"
        )
    shape = tuple(dim if isinstance(dim, int | str) else None for dim in entry.shape)
    return TensorSpec(entry.name, np.dtype(_NUMPY_TYPES[entry.type]), shape)


def check_feeds(
    feeds: Mapping[str, Array], inputs: Sequence[TensorSpec], optional: Mapping[str, TensorSpec] | None = None
) -> None:
    """Check feeds against inputs.

    Args:
        feeds: arrays by input name.
        inputs: what must be there.
        optional: what may be there (initialisers that are also inputs).

    Raises:
        DataError: a feed is missing, unknown, or has a wrong dtype or shape.
    """
    specs = {spec.name: spec for spec in inputs}
    known = specs | dict(optional or {})
    for name in specs:
        if name not in feeds:
            raise DataError(
                "the data has no array for it", where=f"input {name}", hint=f"name the arrays {_list(specs)}"
            )
    for name, array in feeds.items():
        spec = known.get(name)
        if spec is None:
            raise DataError(
                "the model has no such input",
                where=f"array {name}",
                hint=f"its inputs are {_list(specs)}; leave it out",
            )
        if not _fits(array.dtype, spec.dtype):
            raise DataError(
                f"it is {array.dtype}, the model takes {spec.dtype}", where=f"input {name}",
                hint="store text" if spec.dtype.kind == "U" else f"store it as .astype({str(spec.dtype)!r}) gives it",
            )  # fmt: skip
        wrong = len(array.shape) != len(spec.shape) or any(
            isinstance(want, int) and want != have for want, have in zip(spec.shape, array.shape, strict=False)
        )
        if wrong:
            shown = "[" + ", ".join("?" if dim is None else str(dim) for dim in spec.shape) + "]"
            raise DataError(f"its shape is {list(array.shape)}, the model takes {shown}", where=f"input {name}")


def _fits(given: np.dtype[Any], wanted: np.dtype[Any]) -> bool:
    if wanted.kind == "U":
        return given.kind in "UO"
    return given == wanted


def _list(names: Mapping[str, Any]) -> str:
    shown = list(names)[:8]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "") if shown else "none"


def running(feeds: Mapping[str, Array]) -> str:
    """How a failure while running on these feeds begins: values out of range are found in the data that is named."""
    return "the model failed while running" + (f" on {feeds.origin}" if isinstance(feeds, Call) else "")


def explain(error: Exception, doing: str) -> GraphoptError:
    """One clear line out of an exception of ONNX Runtime: which node, and why."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ", "", text)
    where = _node_in(text)
    # A failure inside a subgraph is wrapped once for each operator around it; the innermost node is the one to name.
    while match := re.match(
        r"Non-zero status code returned while running \S+ node\. Name:'[^']*' Status Message: ", text
    ):
        where = _node_in(match.group()) or where
        text = text[match.end() :]
    operator = re.search(
        r"(?:No Op registered for (\S+)|([\w.]+:\w+)\(-?\d+\) is not a registered function/op"
        r"|Could not find an implementation for (\S+) node)",
        text,
    )
    if operator:
        name = next(group for group in operator.groups() if group)
        return MissingBackendError(
            f"ONNX Runtime has no implementation of operator {name}",
            where=where,
            hint="register its custom-operator library, or run it on a backend that has it",
        )
    # Source locations and C++ signatures of the runtime tell the user nothing.
    text = re.sub(r"\S*/onnxruntime\S*:\d+\s+", "", text)
    text = re.sub(r"\S+::\S+\([^)]*\)\s*(const\s*)?", "", text)
    text = re.sub(
        r"^(Load model from .*? failed:|This is an invalid model\. ?|Exception during (?:initialization|loading):)\s*",
        "",
        text,
    )
    return ModelError(f"{doing} ({text[:400].strip() or type(error).__name__})", where=where)


def _node_in(text: str) -> str | None:
    for pattern in (
        r"while running (?P<op>\S+) node\. Name:'(?P<name>[^']*)'",
        r"implementation for (?P<op>\w+)\(\d+\) node with name '(?P<name>[^']*)'",
        r"of operator \((?P<op>[^)]*)\) in node \((?P<name>[^)]*)\)",
        r"In Node, \(\"(?P<name>[^\"]*)\", (?P<op>\w+),",
        r"Node \((?P<name>[^)]*)\) Op \((?P<op>[^)]*)\)",
        r"Node ?\((?P<name>[^)]*)\)(?P<op>)",
        r"[Nn]ode:? ?'?(?P<name>[\w./:]+)'?(?P<op>)",
    ):
        match = re.search(pattern, text)
        if match:
            name, op = match["name"] or "(unnamed)", match["op"]
            return f"node {name} ({op})" if op else f"node {name}"
    return None
