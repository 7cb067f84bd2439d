"""The console blocks of the documents, run and compared: `python -m tests.documents` rewrites their outputs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.ready import ready

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)


def blocks(text: str) -> Iterator[str]:
    for found in BLOCK.finditer(text):
        yield found.group(1)


def ran(block: str, folder: Path, commands: Path) -> str:
    """The block with the output that its commands really print; a comment behind a command stays."""
    lines = []
    for line in block.splitlines():
        if not line.startswith("$ "):
            continue
        lines.append(line)
        done = subprocess.run(
            ["bash", "-c", line[2:]], cwd=folder, env=environment(commands), capture_output=True, text=True, check=False
        )
        lines += [out.rstrip() for out in (done.stdout + done.stderr).splitlines()]
    return "\n".join(lines) + "\n"


def environment(*commands: Path) -> dict[str, str]:
    """As a user in the activated virtual environment; folders of commands come before it."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    path = ":".join(map(str, (*commands, Path(sys.executable).parent, "/usr/bin", "/bin")))
    return kept | {"PATH": path, "NO_COLOR": "1", "COLUMNS": "100"}


def rewritten(page: Path) -> str:
    """The page as its commands say it should be; they run in a folder that holds the examples."""
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as other, ready(Path(other)) as commands:
        folder = Path(name)
        shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
        return BLOCK.sub(lambda found: f"```console\n{ran(found.group(1), folder, commands)}```", page.read_text())


def main() -> None:
    for page in PAGES:
        page.write_text(rewritten(page))


if __name__ == "__main__":
    main()
