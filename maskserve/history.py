"""MaskedTensor as autograd sees it: leaves, what they collect, and the way back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from maskserve.attributes import Attributes
from maskserve.backends.reference.cells import select
from maskserve.errors import GradientError
from maskserve.gates import as_cotangent, is_reached
from maskserve.reach import channel

if TYPE_CHECKING:
    from maskserve.tensor import MaskedTensor


class History(Attributes):
    """Whether a tensor requires grad, its gradient, and backward: in torch's words, of data and reach alike."""

    __slots__ = ("_reach",)

    _reach: Tensor | None
    """What a gradient's mask travels back by (reach.py); None where nobody asks for one."""

    if TYPE_CHECKING:

        def _full_mask(self) -> Tensor: ...

    @property
    def requires_grad(self) -> bool:
        return self._data.requires_grad

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        self.requires_grad_(wanted)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """The tensor itself, from now on a leaf that collects a gradient in `.grad`, or none any more."""
        if requires_grad and not (self._data.is_floating_point() or self._data.is_complex()):
            raise GradientError(
                f"a gradient is by floats, and the tensor is {self._data.dtype}; convert it first: .double()"
            )
        self._data.requires_grad_(requires_grad)
        if self._reach is not None and self._reach.is_leaf:
            self._reach.requires_grad_(requires_grad)  # kept: what was collected stays, and says where it is specified
        elif requires_grad and self._reach is None:
            self._reach = channel(self._data, leaf=True)
        elif not requires_grad:
            self._reach = None
        return self

    @property
    def is_leaf(self) -> bool:
        """Whether it was not computed from others; a leaf under a further mask was."""
        return self._data.is_leaf and (self._reach is None or self._reach.is_leaf)

    @property
    def grad_fn(self) -> Any:
        return self._data.grad_fn

    def retain_grad(self) -> None:
        """Have `.grad` collected here too, though the tensor is no leaf."""
        self._data.retain_grad()
        if self._reach is not None:
            self._reach.retain_grad()

    def _reach_is_collected(self) -> bool:
        return self._reach is not None and (self._reach.is_leaf or self._reach.retains_grad)

    @property
    def grad(self) -> MaskedTensor | None:
        """The gradient that backward() collected: specified where a path of valid cells led back to a valid cell.

        None where nothing came back yet. `m.grad *= 0.5` scales it where it is; its mask cannot be written: assign None,
        or another gradient.
        """
        from maskserve.tensor import MaskedTensor

        if self._data.grad is None or (self._data.is_leaf and not self.is_leaf and not self._reach_is_collected()):
            return None
        reached = None if self._reach is None else self._reach.grad
        specified = self._full_mask() if reached is None else is_reached(reached)
        made = MaskedTensor._of(self._data.grad, specified)  # 0 where nothing was reached, as all cotangents are
        made._is_view, made._owns_mask = True, False
        return made

    @grad.setter
    def grad(self, gradient: MaskedTensor | None) -> None:
        if gradient is None:
            self._data.grad = None
            if self._reach is not None:
                self._reach.grad = None
            return
        from maskserve.tensor import MaskedTensor

        if isinstance(gradient, Tensor):
            gradient = MaskedTensor._of(gradient, None)
        if not isinstance(gradient, MaskedTensor) or gradient.shape != self.shape:
            given = (
                f"one of shape {tuple(gradient.shape)}"
                if hasattr(gradient, "shape")
                else f"a {type(gradient).__name__}"
            )
            raise GradientError(f"a gradient is a tensor of shape {tuple(self.shape)}, or None, and not {given}")
        specified = gradient._full_mask() & self._full_mask()
        self._data.grad = select(gradient._data.detach(), specified)
        if self._reach is not None:
            self._reach.grad = as_cotangent(specified)

    def backward(
        self,
        gradient: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """Gradients of this tensor into `.grad` of the leaves it was computed from, as torch.Tensor.backward.

        gradient: what comes from above, of this tensor's shape; masked cells of it add nothing. May be left out for a
        tensor of one cell. A masked cell has no gradient: plain leaves get 0 from it, MaskedTensors `--`.
        """
        from maskserve.autograd import backward

        above = None if gradient is None else [gradient]
        backward(self, above, retain_graph=retain_graph, create_graph=create_graph, inputs=inputs)
