"""What a schedule needs to know of a processor: lanes of a vector, vectors in registers, cores."""

from __future__ import annotations

from dataclasses import dataclass

from tvm.target import Target
from tvm.target.codegen import target_has_features

PARALLEL_ELEMENTS = 1 << 17
"""Elements below which starting threads costs more than they save: some tens of microseconds of one thread."""
PARALLEL_SUMS = 1 << 20
"""The same in multiply-adds."""


@dataclass(frozen=True)
class Machine:
    """The register file and the cores of one processor.

    Attributes:
        vector_bits: width of a vector register in bits.
        registers: how many vector registers the instruction set names.
        cores: how many threads a kernel may use.
    """

    vector_bits: int
    registers: int
    cores: int

    def lanes(self, dtype: str = "float32") -> int:
        """Elements of `dtype` in one vector register."""
        bits = int("".join(c for c in dtype if c.isdigit()) or 8)
        return max(1, self.vector_bits // bits)

    @staticmethod
    def of(target: Target) -> Machine:
        """The processor that `target` names; its `num-cores`, one thread where it names none.

        LLVM's own answer for the vector width (`llvm_get_vector_width`) is 512 bits for every x86-64, so the features
        are asked one by one.
        """
        vector_bits, registers = 128, 16
        for feature, bits, names in _REGISTER_FILES:
            if target_has_features(feature, target):
                vector_bits, registers = bits, names
                break
        return Machine(vector_bits, registers, int(target.attrs.get("num-cores", 1)))


# LLVM feature -> (bits of a vector register, names of vector registers), widest first.
_REGISTER_FILES = (("avx512f", 512, 32), ("avx", 256, 16), ("neon", 128, 32))
