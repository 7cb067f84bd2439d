"""The arrows between the packages, what may import torch, and where ops may be named."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import maskserve
from maskserve.describe import FILES, error_classes
from maskserve.ops import OPS

ROOT = Path(__file__).parent.parent
ENGINE, CLI, API = ROOT / "maskserve", ROOT / "cli" / "maskserve_cli", ROOT / "api" / "maskserve_api"
SOURCES = [*ENGINE.rglob("*.py"), *CLI.rglob("*.py"), *API.rglob("*.py")]


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def importers(folder: Path, *packages: str) -> set[str]:
    return {
        path.name for path in folder.rglob("*.py") if any(name.split(".")[0] in packages for name in imported(path))
    }


def test_imports_point_one_way() -> None:
    assert (
        importers(ENGINE, "maskserve_cli", "maskserve_api", "typer", "fastapi", "starlette", "uvicorn", "rich") == set()
    )
    assert importers(API, "maskserve_cli", "typer", "rich") == set()
    assert importers(CLI, "maskserve_api", "fastapi", "starlette", "uvicorn") == {"serve.py"}


@pytest.mark.parametrize(
    "module",
    ["maskserve", "maskserve.ops", "maskserve.plan", "maskserve.requests", "maskserve.payload.format",
     "maskserve.convert.files", "maskserve.payload.variables", "maskserve.payload.json", "maskserve.settings",
     "maskserve.errors"],
)  # fmt: skip
def test_imports_without_torch(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; import {module}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("folder", [CLI, API], ids=["cli", "api"])
def test_front_ends_name_no_op(folder: Path) -> None:
    """An op's name in a front end's code would be a second op list. Help texts come from rows."""
    names = set(OPS) - {"select", "view", "t", "where", "mask", "diff"}  # diff: the command that compares two files
    parameters = {p.name for row in OPS.values() if row.verb for p in row.requestable} - {
        "dim",
        "dtype",
        "nan",
        "mask",
        "empty",
    }
    # int64 to the array module, GET or POST to HTTP, a setting's value, how long a page of a list is
    parameters -= {"q", "method", "value", "limit"}
    for path in folder.rglob("*.py"):
        words = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not words & names, f"{path.name} names {words & names}"
        assert not words & parameters, f"{path.name} names {words & parameters}"


def test_no_behaviour_hangs_on_an_ops_name() -> None:
    """`name == "sum"` in the engine would be an if-ladder's first rung."""
    ladder = re.compile(r"name\s*(?:==|in)\s*[\[({]?\s*[\"'](" + "|".join(OPS) + r")[\"']")
    for path in SOURCES:
        assert not ladder.search(path.read_text()), path


def test_public_names_are_there() -> None:
    for name in maskserve.__all__:
        assert getattr(maskserve, name) is not None
    assert set(maskserve.__all__) <= set(dir(maskserve))
    with pytest.raises(AttributeError, match="no attribute"):
        _ = maskserve.nonsense


def test_every_row_has_a_documented_function_and_method() -> None:
    for row in OPS.values():
        function = getattr(maskserve, row.name)
        assert row.summary[1:] in function.__doc__
        if row.is_method:
            assert getattr(maskserve.MaskedTensor(__import__("torch").ones(1)), row.name)


@pytest.mark.parametrize("name", FILES)
def test_generated_files_are_up_to_date(name: str) -> None:
    assert (ROOT / name).read_text() == FILES[name](), f"{name} is stale: run `python -m maskserve.describe`"


def test_error_codes_are_unique_and_drawn_in_the_tree() -> None:
    classes = list(error_classes())
    codes = [cls.code for cls in classes]
    assert len(set(codes)) == len(codes)
    tree = maskserve.errors.__doc__ or ""
    for cls in classes:
        assert cls.__name__ in tree
        if len(cls.__subclasses__()) == 0:
            assert cls.code in tree


def test_nothing_is_a_stub() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert "NotImplementedError" not in text, path
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", text), path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path}:{node.lineno}: a bare except"
