"""The Triton back end without a GPU: kernels in numpy, kernels compiled, launches counted, limits told."""

from __future__ import annotations

import os
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch

import maskserve as ms
from benchmarks import gpu
from maskserve import OPS, dtypes, engine, evaluation
from maskserve.backends import backends, choose, choose_fuser, triton_trees
from maskserve.backends.triton import TritonBackend
from maskserve.backends.triton_launches import Call, recording
from maskserve.backends.triton_plans import Stage, stages_of
from maskserve.backends.triton_tables import interprets, missing, reducing
from maskserve.blockwise import Cells
from maskserve.compact import Mask
from maskserve.dtypes import DType
from maskserve.errors import BackendError
from maskserve.ops.rows import Reduction, Row
from maskserve.plan import Plan, plan
from tests.samples import cells, plan_of
from tests.triton_rows import OWN, ROWS, TREES, stages_of_tree, taken, variables

ROOT = Path(__file__).parent.parent
needs_triton = pytest.mark.skipif(missing() is not None, reason=str(missing()))
compiles = pytest.mark.skipif(interprets(), reason="TRITON_INTERPRET=1 compiles nothing")
REDUCTIONS = [row for row in ROWS if isinstance(row, Reduction) and not row.picks]


@needs_triton
@pytest.mark.longest
def test_the_kernels_give_what_the_reference_gives_in_the_interpreter() -> None:
    """And the law of splits on one example a row; more of them by the commands in docs/gpu.md."""
    files = ["tests/triton_interpreted.py", "tests/test_laws.py", "-k", "triton", "--hypothesis-seed=0"]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *files]
    given = os.environ | {"TRITON_INTERPRET": "1", "EXAMPLES": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout, ran.stdout[-4000:] + ran.stderr[-2000:]


def mask_in(layout: str, shape: tuple[int, ...]) -> Mask:
    """A mask in one of the forms that kernels read."""
    prefixes = ms.from_lengths(torch.ones(shape), torch.arange(shape[0]) % shape[1], 1)
    held = prefixes.to_mask_layout(layout)._held
    assert held is not None
    return held


# -- machine code without a device ----------------------------------------------------------------------------------


@needs_triton
@compiles
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("name", "dtype", "shape", "layout"),
    [
        ("sum", dtypes.f32, (9000, 1), "bool"),
        ("var", dtypes.f16, (300, 40), "bool"),
        ("argmax", dtypes.i32, (300, 40), "packed"),
        ("norm", dtypes.bf16, (9000, 1), "bool"),
        ("softmax", dtypes.f32, (300, 40), "lengths"),
        ("cumsum", dtypes.i8, (300, 40), "bool"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_kernels_compile_to_machine_code(
    name: str, dtype: DType, shape: tuple[int, ...], layout: str, capability: int
) -> None:
    from maskserve.backends.triton_ahead import compile_ahead

    data = cells(dtype, shape, 1).data
    with recording() as calls:
        TritonBackend().run(plan_of(OPS[name], data, dim=0), data, mask_in(layout, shape))
    made = compile_ahead(calls, capability)
    assert calls
    for kernel in made:
        assert f".target sm_{capability}" in kernel.asm["ptx"]
        assert kernel.asm["cubin"].startswith(b"\x7fELF")
        assert "fma.rn.f64" not in kernel.asm["ptx"], "a contracted product rounds otherwise than the reference"
        assert "red.global" not in kernel.asm["ptx"]
        assert "atom.global" not in kernel.asm["ptx"], "atomics add in any order"


@needs_triton
@compiles
@pytest.mark.parametrize("n", [100, 10**6])
def test_a_gradient_compiles_of_whole_slices_and_of_runs(n: int) -> None:
    """Loops that the interpreter takes and the compiler may not: what they carry has to keep its type."""
    from maskserve.backends.triton_ahead import compile_ahead

    calls = launches_of_gradient("softmax", (2, n))
    assert len(compile_ahead(calls, 90)) == (1 if n == 100 else 3)


def launches_of_gradient(name: str, shape: tuple[int, ...]) -> list[Call]:
    cells_, mask = [torch.empty(shape) for _ in range(4)], [torch.empty(shape, dtype=torch.bool) for _ in range(2)]
    with recording() as calls:
        TritonBackend().pull(
            plan_of(OPS[name], cells_[0], dim=1), cells_[0], mask[0], cells_[1], cells_[2], mask[1], cells_[3], None
        )
    return calls


@needs_triton
@compiles
def test_a_root_compiles_to_the_one_that_is_rounded_once() -> None:
    from maskserve.backends.triton_ahead import compile_ahead

    for dtype, word in ((dtypes.f32, "sqrt.rn.f32"), (dtypes.f64, "sqrt.rn.f64")):
        data = cells(dtype, (3, 70), 1).data
        term = stages_of_tree("sqrt(x) * 2", {"x": ms.as_masked_tensor(data)})[-1]
        with recording() as calls:
            triton_trees.run(evaluation.program(term).chain.ops, [Cells(data, None)], term.shape, None)
        (made,) = compile_ahead(calls, 90)
        assert word in made.asm["ptx"]


@needs_triton
@compiles
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("text", ["-(x * y) / z - abs(x)", "where(x > 0.5, abs(x) / z, -y) * 2 - z"])
def test_a_tree_compiles_to_one_kernel_that_rounds_each_op(text: str, capability: int) -> None:
    from maskserve.backends.triton_ahead import compile_ahead

    (made,) = compile_ahead(recorded(text), capability)
    assert made.asm["cubin"].startswith(b"\x7fELF")
    assert "fma.rn" not in made.asm["ptx"]
    assert "div.full" not in made.asm["ptx"], "a division that is off by 2 ulp"
    assert "div.rn" in made.asm["ptx"]


def recorded(text: str) -> list[Call]:
    """What the last stage of a tree launches."""
    given = variables(TREES[text])
    term = stages_of_tree(text, given)[-1]
    made = evaluation.program(term)
    leaves = [evaluation.evaluated(leaf, given) for leaf, _ in made.leaves]
    with recording() as calls:
        triton_trees.run(made.chain.ops, [Cells(leaf._data, leaf._mask) for leaf in leaves], term.shape, None)
    return calls


# -- launches and bytes ---------------------------------------------------------------------------------------------

SHAPES = [((8192, 8192), 1), ((8192, 8192), 0), ((64, 1024, 64), 1), ((10**8,), 0), ((3, 10**7), 1), ((8192, 3), 1)]


READ = {
    "lift_kernel": (0, 1, 2), "join_kernel": (0,), "normalize_kernel": (0, 1, 2), "scan_kernel": (0, 1, 2),
    "carry_kernel": (0,), "fill_kernel": (0, 1), "share_kernel": (0, 1, 2), "pull_kernel": (0, 1, 2, 3, 4, 7),
    "tree_kernel": (0, 1),
}  # fmt: skip
WRITTEN = {
    "lift_kernel": (3,), "join_kernel": (1,), "normalize_kernel": (3,), "scan_kernel": (3,), "carry_kernel": (0,),
    "fill_kernel": (2,), "share_kernel": (3,), "pull_kernel": (5, 6), "tree_kernel": (3, 4),
}  # fmt: skip
"""Where the operands of launches stand that are read and written."""


def memory(call: Call, places: tuple[int, ...]) -> dict[int, int]:
    """The bytes of operands, each once, by where they lie."""
    given = [call.args[place] for place in places]
    tensors = [one for operand in given for one in (operand if isinstance(operand, tuple) else (operand,))]
    return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors if one is not None}


def read(call: Call) -> int:
    """The bytes that a launch reads; cells are not that it looks at the mask of alone."""
    found = memory(call, READ[call.name])
    reads = call.constants["OMITS"] if call.name == "pull_kernel" else call.constants.get("READS", True)
    if not reads:
        found.pop(call.args[0].untyped_storage().data_ptr())
    return sum(found.values())


def written(call: Call) -> int:
    return sum(memory(call, WRITTEN[call.name]).values())


@needs_triton
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_cells_and_mask_are_read_once_and_results_written_once(row: Row, shape: tuple[int, ...], dim: int) -> None:
    """But for few long slices of results for each cell: of those first the states are made. Of memory that nobody touches."""
    data, mask = torch.empty(shape), torch.empty(shape, dtype=torch.bool)
    of = plan_of(row, data, **taken(row, dim=dim))
    of = engine.indexing(of) if of.row.picks else of
    with recording() as calls:
        TritonBackend().run(of, data, mask)
    readers = [call for call in calls if data.data_ptr() in memory(call, READ[call.name][:1])]
    assert len(readers) <= (1 if isinstance(row, Reduction) else 2)
    assert len(calls) <= 3 + len(readers) - 1
    once = read(readers[0]) + prod(of.out_shape) * (of.result.n_bytes + 1)
    moved = sum(read(call) + written(call) for call in calls) - sum(read(call) for call in readers[1:])
    assert once <= moved <= once * (1.02 if of.fold[-1] == 1 else 1.4)
    assert read(readers[0]) == prod(shape) * (5 if readers[0].constants.get("READS", True) else 1)


@needs_triton
@pytest.mark.parametrize("name", ["softmax", "softmin", "log_softmax"])
@pytest.mark.parametrize(("shape", "launches"), [((512, 100), 1), ((2, 10**6), 3)])
def test_a_gradient_reads_each_operand_once_and_of_long_slices_twice(
    name: str, shape: tuple[int, ...], launches: int
) -> None:
    calls = launches_of_gradient(name, shape)
    assert len(calls) == launches
    above, n = 4 + 4 + 1, prod(shape)
    assert read(calls[-1]) <= 1.01 * n * (1 + above)
    assert written(calls[-1]) == n * 4
    assert launches == 1 or read(calls[0]) == n * above


@needs_triton
@pytest.mark.parametrize("text", TREES)
def test_a_tree_reads_each_operand_once_and_writes_once(text: str) -> None:
    (call,) = recorded(text)
    result, valid = call.args[3:5]
    assert len(memory(call, READ[call.name])) == len(call.args[0]) + len(call.args[1])
    assert written(call) == result.nbytes + (valid.nbytes if valid is not result else 0)


@needs_triton
@pytest.mark.parametrize(("layout", "mask_bytes"), [("bool", 300 * 41), ("packed", 300 * 6), ("lengths", 300 * 8)])
def test_a_mask_is_read_in_the_form_in_which_it_is_held(layout: str, mask_bytes: int) -> None:
    held, data = mask_in(layout, (300, 41)), torch.ones(300, 41)
    of = plan_of(OPS["sum"], data, dim=1)
    with recording() as calls:
        TritonBackend().run(of, data, held)
    operands = [operand for call in calls for operand in call.args if isinstance(operand, torch.Tensor)]
    own = held if isinstance(held, torch.Tensor) else held.cells
    assert {one.data_ptr() for one in operands} == {data.data_ptr(), own.data_ptr()}
    assert held.nbytes == mask_bytes


@pytest.mark.parametrize(
    ("fold", "leaf", "launches"),
    [((1, 4096, 1), 4096, 1), ((1, 4097, 1), 4096, 2), ((1, 1024 * 4096, 1), 4096, 2), ((8, 5, 9, 7, 1), 4096, 2)],
)
def test_a_reduction_is_one_launch_and_one_for_each_1024_states(
    fold: tuple[int, ...], leaf: int, launches: int
) -> None:
    assert len(stages_of(fold, leaf)) == launches


@needs_triton
def test_what_is_launched_is_what_was_planned() -> None:
    sample = cells(dtypes.f32, (9000, 3), 1)
    of = plan_of(OPS["var"], sample.data, dim=0)
    with recording() as calls:
        TritonBackend().run(of, sample.data, sample.mask)
    assert [call.programs for call in calls] == [stage.programs for stage in stages_of(of.fold, of.leaf)]
    of = plan_of(OPS["softmax"], sample.data[:70], dim=0)
    with recording() as calls:
        TritonBackend().run(of, sample.data[:70], None)
    assert [call.name for call in calls] == ["normalize_kernel"], "a slice that a tile holds is read once"


def lanes_covered(stage: Stage) -> int:
    return stage.blocks * stage.tile.lanes


@pytest.mark.parametrize("fold", [(1, 1, 1), (7, 5000, 1), (3, 129, 40), (1, 10**6, 3), (4, 9, 5, 200, 6)])
@pytest.mark.parametrize("leaf", [64, 4096])
def test_every_cell_and_every_state_belongs_to_one_program(fold: tuple[int, ...], leaf: int) -> None:
    stages = stages_of(fold, leaf)
    assert stages[-1].runs == 1
    assert stages[-1].lanes == prod(fold[::2])
    for stage in stages:
        assert lanes_covered(stage) >= stage.lanes > lanes_covered(stage) - stage.tile.lanes
        assert stage.runs * stage.tile.cells >= stage.count > (stage.runs - 1) * stage.tile.cells
        assert stage.tile.groups & (stage.tile.groups - 1) == 0, "whole subtrees"


# -- limits -----------------------------------------------------------------------------------------------------------


def why_not(row: Row, dtype: DType = dtypes.f32, device: str = "cuda:0", **params: object) -> str | None:
    given: Plan = plan(row, tuple({"dim": 0, **params}.items()), (3,), dtype, device)
    return TritonBackend().why_not(given)


def test_limits_are_told_one_at_a_time() -> None:
    if not interprets():
        assert why_not(OPS["sum"], device="cpu") == "it computes on CUDA devices, and the tensor is on cpu"
    assert why_not(OPS["median"]) == "it has no kernel for median"
    assert why_not(OPS["norm"], ord=3) is None
    assert why_not(OPS["norm"], ord=9) == "it has no kernel for norm with this ord"
    assert why_not(OPS["norm"], dtypes.f64, ord=1.5) == "it has no kernel for norm with this ord"
    assert why_not(OPS["amax"], dtypes.u64) is None
    assert why_not(OPS["sum"], dtypes.u64, weights=dtypes.f32) == "it has no kernel for u64 with weights"
    assert why_not(OPS["sum"], weights=dtypes.u64) == "it has no kernel for weights of u64"


@pytest.mark.parametrize(
    ("text", "dtype", "reason"),
    [
        ("x + exp(x)", dtypes.f32, "exp"),
        ("x / 3", dtypes.f32, "div by this other"),
        ("x ** 3", dtypes.f32, "pow by this exponent"),
        ("x ** x", dtypes.f32, "pow by a tensor as exponent"),
        ("maximum(x, x * 2)", dtypes.f32, "maximum in f32"),
        ("x * 0.1", dtypes.f16, "mul with a number that f16 does not hold"),
        ("abs(x) + 1", dtypes.i32, "abs in i32"),
        ("x < x / 2", dtypes.i32, "lt of i32 beside f32"),
        ("add(x, x, alpha=2)", dtypes.f32, "add with alpha"),
        ("x * 2", dtypes.c64, "mul of c64"),
        ("x * (x < x)", dtypes.bf16, "mul of bool beside bf16"),
    ],
)
def test_a_tree_that_torch_may_round_otherwise_says_so(text: str, dtype: DType, reason: str) -> None:
    term = stages_of_tree(text, {"x": ms.as_masked_tensor(cells(dtype, (3, 2), 1).data)})[-1]
    chosen = choose_fuser(evaluation.program(term).chain.ops, "cuda:0")
    assert chosen.fuser is None
    assert chosen.refusals == (("triton", f"it has no kernel for {reason}"),)


def test_without_triton_the_limit_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskserve.backends.triton_tables.find_spec", lambda name: None)
    missing.cache_clear()
    try:
        assert why_not(OPS["sum"]) == "triton is not installed: pip install 'maskserve[gpu]'"
    finally:
        monkeypatch.undo()
        missing.cache_clear()


@needs_triton
def test_a_triton_that_is_too_old_is_a_limit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskserve.backends.triton_tables.version", lambda name: "3.5.1")
    missing.cache_clear()
    try:
        assert why_not(OPS["sum"]) == "triton 3.5.1 is too old for its kernels: it takes 3.7, which torch 2.13 brings"
    finally:
        monkeypatch.undo()
        missing.cache_clear()


def test_the_benchmark_needs_a_device_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cuda:99"]) == 1
    assert "device cuda:99 is not there" in capsys.readouterr().err
    timed = {of.row.name for of in gpu.plans("cuda:0", ())}
    assert timed == (set() if missing() else {row.name for row in OWN if row.verb})


def test_a_plan_on_a_cuda_device_falls_back_to_the_reference_and_says_why() -> None:
    chosen = choose(plan(OPS["median"], (("dim", 0),), (3,), dtypes.f32, "cuda:0"))
    assert chosen.backend.name == "reference"
    assert [name for name, _ in chosen.refusals] == ["cpu", "triton"]
    with pytest.raises(BackendError, match="back end triton cannot serve median: it has no kernel for median"):
        choose(plan(OPS["median"], (("dim", 0),), (3,), dtypes.f32, "cuda:0"), "triton")


def test_the_back_end_is_imported_without_triton() -> None:
    blocked = (
        "import sys; sys.modules['triton'] = None; import torch, maskserve as ms; print(ms.sum(torch.ones(3)).item())"
    )
    ran = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, check=False)
    assert ran.stdout == "3.0\n", ran.stderr


def test_the_order_of_preference_is_cpu_then_triton_then_the_reference() -> None:
    assert [backend.name for backend in backends()] == ["cpu", "triton", "reference"]


@needs_triton
def test_every_pass_that_is_served_names_its_parts_as_the_row_does() -> None:
    for row in REDUCTIONS:
        of = plan_of(row, torch.zeros(2, 3), dim=1)
        assert reducing(of).names == tuple(part.name for part in of.passes[0].parts(of.dtype))
