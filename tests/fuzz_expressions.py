"""python -m tests.fuzz_expressions [--minutes 10] [--seed N]: texts that nobody would write, read, planned and computed.

What comes is a result that is what was planned, or a MaskserveError at a column, within 10 ms; nothing else, ever.
"""

from __future__ import annotations

import argparse
import gc
import random
import re
import time
from collections import Counter

import torch

import maskserve as ms
from maskserve import MaskedTensor
from maskserve.errors import ExpressionError, MaskserveError
from maskserve.evaluation import Declared, Term, declared_of, evaluated, planned
from maskserve.expression import canonical, functions, parse
from maskserve.ops.parameters import REQUIRED
from maskserve.torch_dtypes import dtype_of

MOST_S = 0.010
"""To refuse a text, or to plan one."""
MOST_COMPUTED_S = 5.0
NAMES = ("x", "y", "n", "b", "s", "h", "z")
SIGNS = "+ - * / ** < <= == != & | ~ ( ) , = 0 1 -1 2.5 1e308 1e-320 9007199254740992 9**9**9 True False"
PARAMETERS = (
    "dim=0 dim=-1 dim=(0,1) keepdim=True nan=omit nan=raise q=0.5 q=(0.1,0.9) ord=inf ord=-0.5 weights=y dtype=f64"
)
SLIPS = "0x1 1j _ __class__ . [ ] { } ' lambda if for # @ : ; // % << not and in is := ... import yield await *x **x f'' 1_0 1e é"
PIECES = (
    *NAMES,
    *functions(),
    *SIGNS.split(),
    *PARAMETERS.split(),
    *SLIPS.split(),
    " ",
    '"',
    "\\",
    "\n",
    "\x00",
    "\uff45xp",
)
WORDS = ("0", "-1", "1", "(0,1)", "0.5", "True", "omit", "y", "f64", "inf", "4", "(4,)", "(4,3)", "(3,-1)")
OUTLINED = tuple(name for name, row in functions().items() if row.outline)
"""Losses, products, layers and moves: three in ten calls."""
COLUMN = re.compile(r"column [1-9][0-9]*: ")


def term(rng: random.Random, depth: int) -> str:
    """A text of the grammar, mostly."""
    kind = rng.random()
    if depth == 0 or kind < 0.25:
        return rng.choice((*NAMES, *NAMES, "0", "1", "-2", "0.5", "1e300", "3"))
    if kind < 0.45:
        sign = rng.choice(("+", "-", "*", "/", "**", "<", ">=", "==", "&", "|"))
        return f"({term(rng, depth - 1)} {sign} {term(rng, depth - 1)})"
    if kind < 0.5:
        return f"{rng.choice('-+~')}{term(rng, depth - 1)}"
    name = rng.choice(OUTLINED if rng.random() < 0.3 else tuple(functions()))
    row = functions()[name]
    n_operands = len(row.operands) - rng.randrange(row.n_optional + 1)
    parts = [term(rng, depth - 1) for _ in range(n_operands if rng.random() < 0.9 else rng.randrange(4))]
    for p in row.requestable:
        if rng.random() < (0.9 if p.default is REQUIRED else 0.4):
            parts.append(f"{p.name}={rng.choice((*WORDS, *p.choices))}")
    return f"{name}({', '.join(parts)})"


def text(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.55:
        return term(rng, rng.randrange(1, 7))
    if kind < 0.85:
        made = list(term(rng, rng.randrange(1, 6)))
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(made) + 1)
            made[at : at + rng.randrange(3)] = rng.choice(PIECES)
        return "".join(made)
    if kind < 0.97:
        return "".join(rng.choice(PIECES) for _ in range(rng.randrange(60)))
    return rng.choice(PIECES) * rng.randrange(1, 3000) + term(rng, 2)


def variables(rng: random.Random) -> dict[str, MaskedTensor]:
    shape = rng.choice(((3, 4), (4, 4), (1, 4), (0, 4), (4,), (2, 3, 4), ()))
    kinds = {"x": torch.float32, "y": torch.float64, "n": torch.int32, "b": torch.bool, "s": torch.float32, "h": torch.bfloat16,
             "z": torch.complex64}  # fmt: skip
    found = {}
    for name, dtype in kinds.items():
        own = shape[-1:] if name == "s" else shape
        data = (torch.randn(own) * 9).to(torch.float32 if dtype is torch.bool else dtype)
        found[name] = MaskedTensor(data > 0 if dtype is torch.bool else data, torch.rand(own) > 0.4)
        if rng.random() < 0.3:
            found[name] = ms.masked_tensor(found[name].to_tensor(0 if dtype is not torch.bool else False))
    return found


def read(source: str, declared: dict[str, Declared]) -> tuple[float, Term | int | float | None, MaskserveError | None]:
    """The seconds that it took to plan a text or to refuse it, and which."""
    start = time.process_time()
    try:
        term = planned(parse(source).root, declared)
    except MaskserveError as error:
        return time.process_time() - start, None, error
    return time.process_time() - start, term, None


def one(source: str, values: dict[str, MaskedTensor]) -> str:
    """What became of a text; raises what should not be."""
    declared = {name: declared_of(value) for name, value in values.items()}
    seconds, term, refused = read(source, declared)
    if seconds >= MOST_S:  # a module that was imported, or the collector's walk, is not the text's
        seconds = min(read(source, declared)[0] for _ in range(3))
    assert seconds < MOST_S, f"{seconds * 1e3:.1f} ms: {source[:300]!r}"
    if refused is not None:
        at_length = isinstance(refused, ExpressionError) and "bytes" in refused.message
        assert COLUMN.match(refused.message) or at_length, f"no column: {refused.message!r} of {source[:300]!r}"
        assert len(refused.message) < 1000, refused.message
        return "refused"
    assert term is not None
    root = parse(source).root
    again = parse(canonical(root)).root
    assert canonical(again) == canonical(root), source
    start = time.process_time()
    made = None
    try:
        made = evaluated(term, values)
    except MaskserveError as error:  # what only the cells can tell, such as a division of ints by 0
        refused = error
    if refused is not None:
        assert COLUMN.match(refused.message), f"no column: {refused.message!r} of {source[:300]!r}"
        return "refused by cells"
    assert made is not None
    assert time.process_time() - start < MOST_COMPUTED_S, source
    assert tuple(made.shape) == term.shape, source
    assert dtype_of(made._data) is term.dtype, source
    return "computed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng = random.Random(asked.seed)
    torch.manual_seed(asked.seed)
    torch.set_num_threads(1)
    ms.eval("mean(x, dim=0) + softmax(x, dim=-1)", x=torch.ones(2, 2))  # the first call imports
    for row in functions().values():
        getattr(ms, row.name)
    gc.disable()
    seen: Counter[str] = Counter()
    end = time.monotonic() + asked.minutes * 60
    values = variables(rng)
    while time.monotonic() < end:
        n = sum(seen.values())
        if n % 50 == 0:
            values = variables(rng)
            gc.collect()
        source = text(rng)
        try:
            seen[one(source, values)] += 1
        except Exception:
            print(
                f"text {n} of seed {asked.seed}: {source[:2100]!r}\nshapes { ({k: tuple(v.shape) for k, v in values.items()}) }"
            )
            raise
    print(
        f"{sum(seen.values())} texts, seed {asked.seed}: {dict(seen)}; none hung, crashed, or took {MOST_S * 1e3:g} ms to refuse"
    )


if __name__ == "__main__":
    main()
