"""What a row of the op table is: frozen records that say what an op computes, never how.

Everything that knows ops (functions, stubs, command line, service, docs, tests) is built from these records.
Kernels are named as "module:object" below `maskserve.backends.reference`, so that no row imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, Final, Literal

from maskserve import dtypes
from maskserve.dtypes import DType
from maskserve.ops.arithmetic import Arithmetic
from maskserve.ops.families import ANY
from maskserve.ops.layouts import Rule
from maskserve.ops.parameters import NAN, Number, Parameter, Params
from maskserve.ops.results import ResultRule, same, summed


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One named tensor of a state."""

    name: str
    dtype: DType


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One walk over the cells: lift(block) -> parts, merge(parts, parts) -> parts; `count` is always one of the parts."""

    name: str
    parts: Callable[[DType], tuple[Part, ...]]
    reference: str
    reads_cells: bool = True
    """Whether it looks at the data; a count looks at the mask alone."""
    exact_bits: bool = True
    """Whether every CPU back end gives the same bits: so it is for + - * / and selection, not for exp (docs/order.md)."""


# -- rows ---------------------------------------------------------------------------------------------------------

GRAD: Final = "grad"
"""The verb that gives the gradient of what another verb computes."""
NO_VJP: Final = "nobody has said what its derivative is"
NO_STEP_HAS_A_SLOPE: Final = "no small change of a cell changes its result"
NO_CELL_CHANGES: Final = "it changes which cells are valid, and no cell"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """What every row says, whatever its kind. A row equals itself alone, so that it is a cheap key of caches."""

    kind: ClassVar[str]

    verb: str | None = None
    """The command and the path that serve it; None: Python and expressions only."""
    name: str
    summary: str
    aliases: tuple[str, ...] = ()
    """Other words for it in requests; Python keeps torch's meaning of those."""
    parameters: tuple[Parameter, ...] = ()
    check: Callable[[Params], str | None] = lambda _: None
    """What is wrong with the parameters, where their types do not say it."""
    accepts: frozenset[DType] = dtypes.NUMERIC
    result: ResultRule = same
    torch: tuple[str, ...] = ()
    """Further names of torch functions that mean this op."""
    torch_words: Mapping[str, str] = field(default_factory=dict)
    """Parameters that torch calls otherwise: {theirs: ours}."""
    torch_values: Params = field(default_factory=dict)
    """Values that torch spells otherwise: {theirs: ours}."""
    torch_defaults: Params = field(default_factory=dict)
    """What torch's function of this name takes where a parameter is not given and our default is another."""
    unlike: tuple[str, ...] = ()
    """Functions of torch that share a name of this row and mean something else."""
    differs: str = ""
    """Why torch's function of this name means something else; it then raises and names this op."""
    outline: str = ""
    """What tells from headers alone what it gives and holds, where no other field of the row does: expressions may call it."""

    @property
    def operands(self) -> tuple[str, ...]:
        """The tensors that it is computed on, by name."""
        return ("input",)

    @property
    def n_optional(self) -> int:
        """How many of the last operands may be None."""
        return 0

    @property
    def numbers(self) -> tuple[str, ...]:
        """The operands that may be numbers; in an expression a number is a tensor elsewhere."""
        return ()

    @property
    def in_expressions(self) -> bool:
        """Whether an expression may call it."""
        return bool(self.outline)

    @property
    def verbs(self) -> tuple[str, ...]:
        """Every verb that serves it, its own first."""
        return () if self.verb is None else (self.verb,)

    @property
    def why_no_gradient(self) -> str:
        """Why the verb grad does not serve it."""
        return NO_VJP

    @property
    def is_method(self) -> bool:
        """Whether it is a method of MaskedTensor too."""
        return True

    @property
    def requestable(self) -> tuple[Parameter, ...]:
        """The parameters that a request may name."""
        return tuple(p for p in self.parameters if not p.python_only)

    @property
    def callable(self) -> tuple[Parameter, ...]:
        """The parameters of the Python function."""
        return tuple(p for p in self.parameters if not p.request_only)


class Reach(StrEnum):
    """Which cells of its slice a result depends on, and so has a gradient to."""

    SLICE = "slice"  # all valid ones: the loser of a max has gradient 0
    BEFORE = "before"  # those up to its place: a running sum
    PICKED = "picked"  # the one it was taken from: a fill
    OWN = "own"  # the one at its place


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sliced(Row):
    """An op along dims: every result cell depends on one slice alone.

    `needs(params)` is the count that must be exceeded beside min_count (var: its correction).
    """

    sorts: bool = False
    """Whether its kernel sorts a copy of each slice's valid cells."""
    picks: bool = False
    """Whether its kernel tells the place of each result within the slice; the result is the cell that stands there."""
    indices: bool = False
    """Whether the Python function of a picking row, called with a dim, gives the places too: (values, indices)."""
    needs: Callable[[Params], float] | None = None
    on_complex: str = ""
    """The kernel that makes real cells of complex ones, where the row takes them."""
    vjp: str = ""
    """The kernel of its gradient; none where the row is not differentiable."""
    steps: bool = False
    """Whether no small change of a cell changes its result, a count or a place: why it has no gradient."""
    vjp_reads_cells: bool = True
    """Whether that kernel looks at the data; the gradient of a sum does not."""
    reach: Reach = Reach.SLICE
    is_valid_where_given: ClassVar[bool] = False
    """Whether the same cells are valid in its results, unless the parameters say otherwise."""
    masked_last: ClassVar[bool] = False
    """Whether the first cells of each slice of its results are valid, as many as were."""

    def keeps_mask(self, params: Params) -> bool:
        """Whether the same cells are valid in its result."""
        return self.is_valid_where_given and self.needs is None and params.get("nan") != "omit"

    @property
    def verbs(self) -> tuple[str, ...]:
        own = () if self.verb is None else (self.verb,)
        return (*own, GRAD) if own and self.vjp else own

    @property
    def in_expressions(self) -> bool:
        return self.verb is not None

    @property
    def why_no_gradient(self) -> str:
        return NO_STEP_HAS_A_SLOPE if self.steps else NO_VJP


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reduction(Sliced):
    """Many cells to one; a slice with too few valid cells gives `--`.

    A row with `passes` is mergeable. A row with `select` needs each slice whole.
    """

    kind = "reduction"
    verb: str | None = "reduce"

    passes: tuple[Pass, ...] = ()
    finalize: str = ""
    weighted: tuple[Pass, ...] = ()
    finalize_weighted: str = ""
    """The passes, and what ends them, when `weights` are given."""
    vjp_weighted: str = ""
    """The kernel of the gradients by data and by weights."""
    select: str = ""
    leading: Callable[[Params], tuple[float, ...] | None] = lambda _: None
    """The labels of a new first dim, where the params ask for several results a slice."""
    leading_dim: str = ""
    """The name of that dim."""
    identity: Number | None = None
    never_masked: bool = False
    binary: str = ""
    """The elementwise op that the function means when its second argument is a tensor: torch.max(a, b)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Normalization(Sliced):
    """Cells scaled by a state of their slice: a pass, then `apply(block, state) -> block`."""

    kind = "normalization"
    verb: str | None = "softmax"
    is_valid_where_given = True

    passes: tuple[Pass, ...]
    apply: str
    negates: bool = False
    """Whether it is the op of the negated cells: softmin."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scan(Sliced):
    """A running state along one dim; masked cells are skipped and stay masked."""

    kind = "scan"
    verb: str | None = "scan"
    is_valid_where_given = True

    scan: str
    reach: Reach = Reach.BEFORE
    carries: Literal["", "forward", "backward", "state"] = ""
    """How a slice goes on after a part of it: the part's last valid result stands before the next part as a cell, in this
    direction; or the kernel's scan_on hands on a state."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fill(Scan):
    """Masked cells that become valid ones; those that find no value stay masked."""

    kind = "fill"
    verb: str | None = "fill"
    is_valid_where_given = False

    reach: Reach = Reach.PICKED


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ordering(Scan):
    """Cells of a slice in order, masked ones last. Python only: the masks change their places."""

    kind = "ordering"
    verb: str | None = None
    is_valid_where_given = False
    masked_last = True

    reach: Reach = Reach.SLICE

    size: Callable[[Params, int], int] = lambda _, n: n
    """How many cells of each slice it gives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Lines about the masks of an answer in its place: an option of the command line, a function in Python."""

    name: str
    help: str
    function: str
    choices: tuple[str, ...] = ()
    """What the option takes; it is a flag where there are none."""
    parameters: tuple[Parameter, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Masking(Row):
    """A new mask for the same cells: a function of cell values and of the old mask; the data stays."""

    kind = "masking"
    verb: str | None = "mask"

    function: str
    reports: tuple[Report, ...] = ()

    @property
    def why_no_gradient(self) -> str:
        return NO_CELL_CHANGES


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Whole(Row):
    """A function of the whole tensor whose shape the data decides, or that gives several tensors. Python only."""

    kind = "whole"

    function: str
    outputs: tuple[str, ...] = ("values",)
    vjp: str = ""
    """The kernel of its gradient; none where the row is not differentiable."""


class MaskRule(StrEnum):
    """How validity flows through an elementwise op."""

    ALL = "all"  # valid where every operand is
    CHOSEN = "chosen"  # where(): the chosen branch's validity


class Beyond(StrEnum):
    """What an int is that the integer dtype of its partner cannot hold; torch takes 300 beside u8 for 44."""

    ERROR = "error"
    TORCHS = "torch's"  # it is right to wrap, as in sums, or torch computes in floats
    EXACT = "exact"  # compared as it is


OTHER: Final = "other"
"""The identity of an op with op(x, x) = x: the other operand's cell stands for a missing one, in any dtype."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Elementwise(Row):
    """Cell by cell, with broadcasting.

    `identity` has one entry an operand: what a missing operand stands for under policy "union"; None where there is none.
    """

    kind = "elementwise"

    operands: tuple[str, ...] = ("input",)
    n_optional: int = 0
    """How many of the last operands may be None."""
    function: str = ""
    """The kernel, where torch's function of the row's name will not do."""
    identity: tuple[Number | str | None, ...] = ()
    rule: MaskRule = MaskRule.ALL
    operator: str = ""
    """The Python operator's method, e.g. "add" for __add__ and __radd__."""
    method: tuple[int, ...] = ()
    """Where the method's arguments stand among the operands, if not in their order: x.where(condition, other)."""
    tensors_only: bool = False
    """torch's function takes no numbers: they become tensors of no dims first."""
    unsafe: bool = False
    """torch's function raises on some cells (int division by 0): hidden cells become 1 before it runs."""
    unsafe_floats: bool = False
    """torch's function raises on some floats too (a probability above 1): those that are hidden become 1 before it runs."""
    beyond: Beyond = Beyond.ERROR
    is_differentiable: bool = True
    """Whether torch knows its derivative, where its results are floats; else they carry no history, as comparisons do."""
    no_gradient_by: tuple[str, ...] = ()
    """Operands by which torch has no derivative: they count as constants, and no gradient comes back to them."""
    is_linear: bool = False
    """Its derivative is finite whatever the cells are, and so needs no gate: + - and the choice of cells."""
    arithmetic: Arithmetic | None = None
    """What a kernel may compute in the place of torch, for the same bits."""
    as_stored: bool = False
    """It chooses cells and computes none: it takes those of a storage type without widening them."""

    @property
    def in_expressions(self) -> bool:
        return True


def reduces_over_dims(params: Params) -> str | None:
    """Dims say what losses are reduced over: they mean nothing where each is given."""
    if params["reduction"] != "none" or params["dim"] is None:
        return None
    return "dim says what losses are reduced over, and reduction=none gives each of them: leave one of the two out"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Loss(Row):
    """What a model's output costs: a loss for each cell, or for each sample of classes, and their sum or mean. Python only."""

    kind = "loss"

    function: str = "maskserve.losses:compute"
    outline: str = "maskserve.outlines:loss"
    check: Callable[[Params], str | None] = reduces_over_dims
    operands: tuple[str, ...] = ("input", "target")
    cells: Elementwise | None = None
    """The loss of each cell."""
    samples: str = ""
    """Where cells have none: what gives the loss of each sample, and what it counts for in the mean."""
    is_mean_of_classes: bool = False
    """Whether the loss of a sample is the mean of those of its cells along the last dim."""
    each_row: str = ""
    """An operand that may lack the last dim: one value for each row."""
    third: str = ""
    """A parameter that is an operand of `cells`."""
    of_logits: bool = False
    """Whether the input of a loss of classes is any number, and not yet a log-probability."""
    weighs_mean: bool = False
    """Whether the mean with weights is by their sum; else by the count."""

    @property
    def numbers(self) -> tuple[str, ...]:
        return self.operands[1:]

    @property
    def is_method(self) -> bool:
        return False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer(Row):
    """A layer made of other rows, which say what masks do in it. Takes torch's own arguments.

    `operands` and `parameters` are what an expression may give it.
    """

    kind = "layer"

    accepts: frozenset[DType] = dtypes.FLOATING
    function: str
    """The function that calls them."""
    operands: tuple[str, ...] = ("input",)
    n_optional: int = 0
    scales_by_any_float: bool = False
    """Whether weights may be of any float dtype; else they have the input's, or float32 beside halves."""
    in_torchs_methods: bool = False

    @property
    def is_method(self) -> bool:
        """Whether it is a method of MaskedTensor too, as it is one of torch.Tensor."""
        return self.in_torchs_methods


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contraction(Row):
    """Sums of products of cells: a pair of which a side is masked adds nothing, and a sum of no pair is masked.

    Which dims meet is an equation in einsum's words; it is given here, by a function of the shapes, or by the caller.
    """

    kind = "contraction"

    parameters: tuple[Parameter, ...] = (NAN,)
    accepts: frozenset[DType] = ANY
    result: ResultRule = summed
    outline: str = "maskserve.outlines:contraction"
    operands: tuple[str, ...] = ("input", "other")
    n_optional: int = 0
    """How many of the last operands may be None."""
    equation: str = ""
    function: str = ""
    """What makes the equation, where it depends on shapes or parameters."""
    added: str = ""
    """The elementwise op by which an optional operand joins the sums: linear's bias."""
    operator: str = ""
    """The Python operator's method, e.g. "matmul" for __matmul__ and __rmatmul__."""
    in_torchs_methods: bool = True

    @property
    def is_method(self) -> bool:
        """Whether it is a method of MaskedTensor too, as it is one of torch.Tensor."""
        return self.in_torchs_methods

    @property
    def takes_any_number(self) -> bool:
        """Whether any number of tensors may follow its parameters: einsum(equation, *operands)."""
        return self.operands[0].startswith("*")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Formula(Row):
    """An expression over variables by name: the rows that it calls say what is computed."""

    kind = "formula"
    verb: str | None = "eval"
    function: str

    @property
    def verbs(self) -> tuple[str, ...]:
        return () if self.verb is None else (self.verb, GRAD)

    @property
    def is_method(self) -> bool:
        return False


class Cells(StrEnum):
    """Which arguments of a move hold cells; the others go to torch as they are."""

    FIRST = "first"  # reshape(input, shape)
    TWO = "two"  # select_scatter(input, src, dim, index)
    LIST = "list"  # the tensors of a list: cat(tensors, dim)
    ALL = "all"  # every positional one: meshgrid(*tensors)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Move(Row):
    """Cells that change their places and not their values; the mask moves along. Takes torch's own arguments.

    `parameters` are what an expression may give it, where `layout` says from shapes where cells go.
    """

    kind = "move"

    cells: Cells = Cells.FIRST
    function: str = ""
    """The kernel that moves data and mask together, where torch's function of the row's name cannot move a mask."""
    zeros: bool = False
    """The cells that it makes are 0 and valid: those of a matrix beside its diagonal."""
    several: bool = False
    """It gives a tuple of tensors, as torch does."""
    layout: Rule | None = None
    copies: bool = False
    """Whether its result may have memory of its own."""
    keeps_places: bool = False
    """Whether every cell stays where it is."""

    on_patterns: str = ""
    """What moves the positions of a sparse tensor; none where the row is of strided tensors alone."""
    attribute: bool = False
    """m.real stands without parentheses."""

    @property
    def is_method(self) -> bool:
        """Whether it works on one tensor, and so is a method of it."""
        return self.cells in (Cells.FIRST, Cells.TWO) and not self.attribute


def kernel_name(reference: str) -> tuple[str, str]:
    """("module", "object") of a kernel; a leading dot means the reference back end's own modules.

    >>> kernel_name(".reductions:Total")
    ('maskserve.backends.reference.reductions', 'Total')
    """
    module, _, name = reference.partition(":")
    return ("maskserve.backends.reference" + module if module.startswith(".") else module), name


@dataclass(slots=True, eq=False)
class Table(Mapping[str, Row]):
    """The op table: rows by name, in the order they were added."""

    _rows: dict[str, Row] = field(default_factory=dict)

    def add(self, *rows: Row) -> None:
        """Add rows; a name stands once, and a row stays as it is."""
        served = {word for row in self._rows.values() if row.verb for word in (row.name, *row.aliases)}
        for row in rows:
            said = {row.name, *row.aliases} if row.verb else set()
            taken = served & said or self._rows.keys() & {row.name}
            if taken:
                raise ValueError(f"the op table already has {min(taken)}")
            served |= said
            self._rows[row.name] = row

    def __getitem__(self, name: str) -> Row:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
