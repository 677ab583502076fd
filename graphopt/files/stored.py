"""What compression made of the weights of a model, as plain data for reports."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class StoredTensor:
    """One compressed weight.

    Attributes:
        form: "2:4 along axis 1" (values and positions in groups), or "mask" (values and a bit for every element).
        before, after: bytes stored in full, and as values and positions.
        share: after / before.
        share_of_float16: after / bytes of the full weight in float16.
    """

    name: str
    dtype: str
    shape: list[int]
    form: str
    before: int
    after: int
    share: float
    share_of_float16: float


@dataclass
class Storage:
    """The weights of a file.

    Attributes:
        before, after: bytes of all weights of the model: in full, and as they are stored.
        tensors: the compressed ones.
        kept: why the others are stored in full: reason -> how many.
        notes: sentences for the user.
    """

    before: int
    after: int
    tensors: list[StoredTensor] = field(default_factory=list)
    kept: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One line."""
        if not self.tensors:
            return "; ".join(["no weight is compressed", *self.notes])
        before, after = (sum(getattr(t, key) for t in self.tensors) for key in ("before", "after"))
        return (
            f"{len(self.tensors)} weights are compressed to {after / before:.1%} of their bytes, "
            f"all weights together to {self.after / self.before:.1%}"
        )
