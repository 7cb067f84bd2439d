"""Optimizers that move the cells whose gradient is specified, and a GradScaler that takes masked losses.

A MaskedTensor parameter moves as if each of its cells were a torch parameter of its own, whose `.grad` is None in the
steps where the cell's gradient is masked: weight decay, momentum, counts of steps and bias correction are per cell, and
what lies under the parameter's mask stays as it is. Of a sparse parameter the stored cells are parameters, and the pattern
stays. Plain parameters are torch.optim's, in the same list.

`param_groups` and `state_dict()` hold plain tensors, so that torch's schedulers and GradScaler work. torch.optim's own
checkpoints load: their one count of steps is each cell's.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from maskserve.errors import GradientError, ParameterError
from maskserve.tensor import MaskedTensor

Params = Iterable[Tensor | MaskedTensor] | Iterable[tuple[str, Tensor | MaskedTensor]] | Iterable[dict[str, Any]]
Options = Mapping[str, Any]
State = dict[str, Tensor]

PLAIN_ONLY = ("fused", "capturable", "differentiable")
"""Options of torch whose promises the steps of single cells do not keep."""


class PerCell(torch.optim.Optimizer):
    """What the rules share: the cells that move, their state, and how many steps each has taken.

    A rule names its state and gives its formula. It is torch's class too, which moves the plain parameters.
    """

    _masked: dict[Tensor, MaskedTensor]
    """The MaskedTensor of each masked parameter's data, which is what param_groups hold."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__init__" not in vars(cls):
            theirs = next(base for base in cls.__mro__ if base.__module__.startswith("torch."))
            cls.__signature__ = inspect.signature(theirs)  # type: ignore[attr-defined]  # read by inspect and help()

    def __init__(self, params: Params, *args: Any, **kwargs: Any) -> None:
        if isinstance(params, MaskedTensor):
            raise ParameterError("params is one MaskedTensor; give a list of parameters: [m]", parameter="params")
        self._masked = {}
        super().__init__(params, *args, **kwargs)  # type: ignore[arg-type]  # torch's class of the rule; it knows no ours

    @abstractmethod
    def fresh(self, group: Options) -> Mapping[str, float]:
        """What a cell's state is before its first step, by torch's names; nothing where the rule keeps none."""

    @abstractmethod
    def moved(self, options: Options, param: Tensor, grad: Tensor, state: State) -> Tensor:
        """The parameter after a step of every cell; `state` too is changed to what it is then. "step" counts from 1."""

    # -- parameters ------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Parameters with options of their own, as torch's; the dict given stays as it is."""
        if not isinstance(param_group, dict) or isinstance(param_group["params"], Tensor | set):
            return super().add_param_group(param_group)
        given = param_group["params"]
        found: dict[Tensor, MaskedTensor] = {}

        def plain(param: Any) -> Any:
            if isinstance(param, tuple):
                return param[0], plain(param[1])
            if not isinstance(param, MaskedTensor):
                return param
            param = param._cells  # of a sparse one those that are stored, which is where it has a gradient
            found[leaf_of(param)] = param
            return param._data

        params = [plain(param) for param in ([given] if isinstance(given, MaskedTensor) else given)]
        options = self.defaults | param_group
        if found and (refused := [name for name in PLAIN_ONLY if options.get(name)]):
            raise ParameterError(
                f"{refused[0]}=True is for plain parameters alone: leave it out, or give the MaskedTensors to an optimizer "
                "of their own",
                parameter=refused[0],
            )
        super().add_param_group({**param_group, "params": params})
        self._masked |= found
        return None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """No gradients any more; of plain parameters 0 where `set_to_none` is False, of MaskedTensors None either way.

        A specified 0 would move its cell: momentum goes on, and weights decay.
        """
        for param in self._masked.values():
            param.grad = None
        super().zero_grad(set_to_none)

    def __getstate__(self) -> dict[str, Any]:
        parts = [(param._data, param._mask, param._reach) for param in self._masked.values()]
        return {**super().__getstate__(), "masked": parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if (parts := state.pop("masked", None)) is not None:  # a copy or a pickle; load_state_dict brings none
            self._masked = {data: MaskedTensor._of(data, mask, reach) for data, mask, reach in parts}
        super().__setstate__(state)

    # -- a step ----------------------------------------------------------------------------------------------------

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        """torch's step collects a group's parameters by this, behind the closure and under no_grad: the plain ones.

        The masked ones are moved here.
        """
        for data in group["params"]:
            gradient = self._masked[data].grad if data in self._masked else None
            if gradient is not None:
                self._move(group, data, gradient)
        theirs: Any = super()
        return theirs._init_group({**group, "params": [p for p in group["params"] if p not in self._masked]}, *lists)

    def _move(self, group: dict[str, Any], data: Tensor, gradient: MaskedTensor) -> None:
        """One step of the cells where the gradient is specified."""
        options = {name: number(value) for name, value in group.items() if name != "params"}
        kept = self._state_of(group, data)
        parts = [data, gradient._data, gradient._full_mask(), *kept.values()]
        param, grad, specified, *states = map(as_real, parts) if data.is_complex() else parts
        state = dict(zip(kept, states, strict=True))
        old = [param, *states]
        if "step" in state:
            state["step"] = state["step"] + 1
        if options["maximize"]:
            grad = -grad
        if decay := options["weight_decay"]:
            if options.get("decoupled_weight_decay"):
                param = param * (1 - options["lr"] * decay)
            else:
                grad = grad + param * decay
        param = self.moved(options, param, grad, state)
        for cells, new in zip(old, (param, *state.values()), strict=True):
            cells.copy_(torch.where(specified, new.to(cells.dtype), cells))

    def _state_of(self, group: dict[str, Any], data: Tensor) -> State:
        """The state of each cell, made where there is none so far."""
        fresh = self.fresh(group)
        if not fresh:
            return {}
        state = self.state[data]
        steps = state.get("step", int(any(name in state for name in fresh)))  # torch's SGD counts none
        for name, value in fresh.items():
            if state.get(name) is None:
                state[name] = torch.full_like(data, complex(value, value) if data.is_complex() else value)
        steps = torch.as_tensor(steps, dtype=torch.int32, device=data.device)
        state["step"] = steps if steps.shape == data.shape else steps.expand(data.shape).clone()
        return {name: state[name] for name in (*fresh, "step")}


def leaf_of(param: MaskedTensor) -> Tensor:
    """The data of a parameter, which must be a leaf that collects a gradient."""
    if not param.is_leaf:
        raise GradientError(
            "a parameter was computed from others: give the leaf itself, masked_tensor(..., requires_grad=True)",
            parameter="params",
        )
    if not param.requires_grad:
        raise GradientError("a parameter does not require grad: call requires_grad_() on it", parameter="params")
    return param._data


def number(option: Any) -> Any:
    """An option that may be a tensor of one cell, as torch's lr, as a number."""
    if isinstance(option, tuple):
        return tuple(map(number, option))
    return option.item() if isinstance(option, Tensor) else option


def as_real(cells: Tensor) -> Tensor:
    """Complex cells as pairs, whose numbers move each on its own in torch; what belongs to both broadcasts to them."""
    return torch.view_as_real(cells.resolve_conj()) if cells.is_complex() else cells.unsqueeze(-1)


# -- the rules ----------------------------------------------------------------------------------------------------


class SGD(PerCell, torch.optim.SGD):
    """torch.optim.SGD, of MaskedTensors and plain parameters: each cell's momentum starts with its first gradient."""

    def fresh(self, group: Options) -> Mapping[str, float]:
        return {"momentum_buffer": 0.0} if group["momentum"] else {}

    def moved(self, options: Options, param: Tensor, grad: Tensor, state: State) -> Tensor:
        lr = float(options["lr"])
        if momentum := options["momentum"]:
            going_on = state["momentum_buffer"] * momentum + grad * (1 - options["dampening"])
            state["momentum_buffer"] = torch.where(state["step"] == 1, grad, going_on)
            grad = grad + state["momentum_buffer"] * momentum if options["nesterov"] else state["momentum_buffer"]
        return param - grad * lr


class Adagrad(PerCell, torch.optim.Adagrad):
    """torch.optim.Adagrad, of MaskedTensors and plain parameters: squares are summed where a gradient is specified."""

    def fresh(self, group: Options) -> Mapping[str, float]:
        return {"sum": self.defaults["initial_accumulator_value"]}

    def moved(self, options: Options, param: Tensor, grad: Tensor, state: State) -> Tensor:
        lr, eps = float(options["lr"]), float(options["eps"])
        state["sum"] = state["sum"] + grad * grad
        step = grad / (state["sum"].sqrt() + eps)
        if not options["lr_decay"]:
            return param - step * lr
        return param - step * by_count(lambda n: lr / (1 + (n - 1) * options["lr_decay"]), state["step"], param)


class Adam(PerCell, torch.optim.Adam):
    """torch.optim.Adam, of MaskedTensors and plain parameters: each cell's bias is corrected by its own count of steps."""

    def fresh(self, group: Options) -> Mapping[str, float]:
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        return dict.fromkeys(names if group["amsgrad"] else names[:2], 0.0)

    def moved(self, options: Options, param: Tensor, grad: Tensor, state: State) -> Tensor:
        lr, eps, (beta1, beta2) = float(options["lr"]), float(options["eps"]), map(float, options["betas"])
        state["exp_avg"] = state["exp_avg"].lerp(grad, 1 - beta1)
        square = state["exp_avg_sq"] = state["exp_avg_sq"] * beta2 + grad * grad * (1 - beta2)
        if options["amsgrad"]:
            square = state["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], square)
        rate = by_count(lambda n: lr / (1 - beta1**n), state["step"], param)
        spread = square.sqrt() / by_count(lambda n: (1 - beta2**n).sqrt(), state["step"], param) + eps
        return param - state["exp_avg"] / spread * rate


class AdamW(Adam, torch.optim.AdamW):
    """torch.optim.AdamW, of MaskedTensors and plain parameters: a weight decays in the steps where its cell moves."""


def by_count(formula: Callable[[Tensor], Tensor], steps: Tensor, param: Tensor) -> Tensor:
    """A number for each cell that depends on its count of steps alone, no narrower than torch's own scalars.

    Made in float64, and once for a count where cells are many: a power takes ten times as long as to look it up.
    """
    wide = torch.promote_types(param.dtype, torch.float32)
    n = int(steps.max()) + 1 if steps.numel() else 0
    if n > steps.numel():
        return formula(steps.double()).to(wide)
    return formula(torch.arange(n, dtype=torch.float64, device=steps.device)).to(wide)[steps]


# -- clipping -----------------------------------------------------------------------------------------------------


def clip_grad_norm_(
    parameters: Tensor | MaskedTensor | Iterable[Tensor | MaskedTensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """The norm of all specified gradients together, which are scaled down to `max_norm` where it is larger: torch's own."""
    given = listed(parameters)
    plain = with_grads(given)
    if float(norm_type) >= 0:  # to which a 0 adds nothing
        return torch.nn.utils.clip_grad_norm_(plain, max_norm, norm_type, error_if_nonfinite, foreach)
    cells = [specified(param.grad) for param in given if param.grad is not None]
    total = torch.nn.utils.get_total_norm([x for x in cells if x.numel()], norm_type, error_if_nonfinite, foreach)
    torch.nn.utils.clip_grads_with_norm_(plain, max_norm, total, foreach)
    return total


def specified(grad: Tensor | MaskedTensor) -> Tensor:
    """(n,): the cells of a gradient that are specified."""
    if not isinstance(grad, MaskedTensor):
        return grad.reshape(-1)
    return grad._cells._data[grad._cells._full_mask()]


def clip_grad_value_(
    parameters: Tensor | MaskedTensor | Iterable[Tensor | MaskedTensor], clip_value: float, foreach: bool | None = None
) -> None:
    """Every specified gradient between -clip_value and clip_value: torch's own."""
    torch.nn.utils.clip_grad_value_(with_grads(parameters), clip_value, foreach)


def with_grads(parameters: Tensor | MaskedTensor | Iterable[Tensor | MaskedTensor]) -> list[Tensor]:
    """The plain tensors whose gradients are those of the parameters, 0 where they are masked."""
    return [leaf_of(param) if isinstance(param, MaskedTensor) else param for param in listed(parameters)]


def listed(parameters: Tensor | MaskedTensor | Iterable[Tensor | MaskedTensor]) -> list[Tensor | MaskedTensor]:
    return [parameters] if isinstance(parameters, Tensor | MaskedTensor) else list(parameters)


# -- mixed precision ----------------------------------------------------------------------------------------------


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler whose `scale` takes MaskedTensors too."""

    def scale(self, outputs: Any) -> Any:
        """The outputs times the scale: a tensor, a MaskedTensor, or a list or tuple of them."""
        if not self.is_enabled():
            return outputs
        if isinstance(outputs, MaskedTensor):
            by: Any = super().scale(torch.ones((), device=outputs.device))
            return outputs * by
        if isinstance(outputs, list | tuple):
            return type(outputs)(map(self.scale, outputs))
        return super().scale(outputs)
