"""A module whose full weight is trained: as a value, what is added to the weight (and bias) that the base has.

Shape suffixes: I inputs, O outputs of the module.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from atoll.errors import AdapterFitError


@dataclass(frozen=True, slots=True, eq=False)
class FullWeightDelta:
    """x -> change_OI x + bias_O, beside the module's own product; fp32 on the CPU. Without `bias_O` the bias is not trained."""

    change_OI: Tensor
    bias_O: Tensor | None = None

    def __post_init__(self) -> None:
        bias, change = self.bias_O, self.change_OI
        if change.ndim != 2 or (bias is not None and bias.shape != change.shape[:1]):
            raise AdapterFitError(
                "the change of a weight and that of its bias do not fit each other",
                got=f"weight {tuple(change.shape)}, bias {None if bias is None else tuple(bias.shape)}",
                expected="weight (outputs, inputs) and bias (outputs)", do="save the adapter again from the run that made it",
            )  # fmt: skip

    @property
    def size(self) -> tuple[int, int]:
        """(inputs, outputs) of the module this change fits."""
        return self.change_OI.shape[1], self.change_OI.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The weight's change, then the bias's where it is trained."""
        return (self.change_OI,) if self.bias_O is None else (self.change_OI, self.bias_O)

    @property
    def num_parameters(self) -> int:
        """Trained numbers."""
        return sum(tensor.numel() for tensor in self.tensors)

    def of(self, tensors: tuple[Tensor, ...]) -> FullWeightDelta:
        """A change with other numbers, in the order of `tensors`."""
        return FullWeightDelta(*tensors)

    def plus(self, other: FullWeightDelta, name: str) -> FullWeightDelta:
        """The sum of two changes of one module.

        Raises: AdapterFitError where they are not of the same size, or one has no bias.
        """
        if [t.shape for t in self.tensors] != [t.shape for t in other.tensors]:
            raise AdapterFitError(
                f"two changes of {name} are for modules of different size",
                got=f"{[tuple(t.shape) for t in other.tensors]}", expected=f"{[tuple(t.shape) for t in self.tensors]}",
                do="use the same base model on every edge",
            )  # fmt: skip
        return self.of(tuple(a + b for a, b in zip(self.tensors, other.tensors, strict=True)))
