"""A double of TensorRT's Python package: an engine is an ONNX file that ONNX Runtime computes."""

from __future__ import annotations

import ctypes
import os

import numpy as np
import onnxruntime as ort
from cuda.bindings.runtime import MEMORY

TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8,
}


class TensorIOMode:
    INPUT, OUTPUT = "input", "output"


class Logger:
    WARNING = 1

    def __init__(self, severity: int) -> None:
        self.severity = severity


class IOutputAllocator:
    def __init__(self) -> None:
        self.made = True


def init_libnvinfer_plugins(logger: Logger, namespace: str) -> bool:
    return True


def nptype(kind: type) -> type:
    return kind


class Runtime:
    def __init__(self, logger: Logger) -> None:
        assert isinstance(logger, Logger)

    def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
        if data.startswith(b"stale"):
            return None
        return Engine(data)


class Engine:
    def __init__(self, data: bytes) -> None:
        self.session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
        self.inputs = {v.name: v for v in self.session.get_inputs()}
        self.outputs = {v.name: v for v in self.session.get_outputs()}
        self.num_io_tensors = len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> str:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> type:
        return TYPES[{**self.inputs, **self.outputs}[name].type]

    def create_execution_context(self) -> Context:
        return Context(self)


class Context:
    """Reads and writes at the addresses that it was given, when it is executed."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.allocators: dict[str, IOutputAllocator] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return max(shape, default=1) <= int(os.environ.get("DOUBLE_LARGEST", "1000000"))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if os.environ.get("DOUBLE_DATA_DEPENDENT"):
            return (-1,)
        feeds = {n: np.ones(self.shapes[n], self.engine.get_tensor_dtype(n)) for n in self.engine.inputs}
        names = list(self.engine.outputs)
        return dict(zip(names, self.engine.session.run(names, feeds), strict=True))[name].shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_output_allocator(self, name: str, allocator: IOutputAllocator) -> bool:
        assert allocator.made
        self.allocators[name] = allocator
        return True

    def execute_async_v3(self, stream: int) -> bool:
        feeds = {}
        for name in self.engine.inputs:
            array = np.empty(self.shapes[name], self.engine.get_tensor_dtype(name))
            assert len(MEMORY[self.addresses[name]]) >= array.nbytes
            ctypes.memmove(array.ctypes.data, self.addresses[name], array.nbytes)
            feeds[name] = array
        names = list(self.engine.outputs)
        for name, array in zip(names, self.engine.session.run(names, feeds), strict=True):
            made = np.ascontiguousarray(array)
            address = self.addresses.get(name)
            if name in self.allocators:
                address = self.allocators[name].reallocate_output_async(name, 0, made.nbytes, 256, stream)
                self.allocators[name].notify_shape(name, made.shape)
            assert address is not None and len(MEMORY[address]) >= made.nbytes
            ctypes.memmove(address, made.ctypes.data, made.nbytes)
        return True
