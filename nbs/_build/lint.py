"""The rules for code: `ruff check` with the settings of pyproject.toml, and at most 120 characters a line in notebooks.

    lint.py [FILE.ipynb ...]      without files: everything"""
import json
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
WIDTH = 120


def unbreakable(line):
    "Is the line long because of one address that is too long for any line?"
    return any("://" in word and len(word) > WIDTH - 20 for word in line.split())


def long_lines(notebook): # path of an .ipynb file
    "(number of the cell, its id, the line) for each line of code or prose that is too long; cells count from 0"
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        for line in "".join(cell["source"]).splitlines():
            if len(line) > WIDTH and not unbreakable(line): yield number, cell.get("id", "?"), line


def notebooks():
    "Every notebook of the repository that people write"
    skipped = {".ipynb_checkpoints", "_proc"}
    return [path for path in sorted((REPO / "nbs").rglob("*.ipynb")) if not skipped & set(path.parts)]


def check_notebooks(paths):
    "One message for each line that is too long"
    found = [(path, *rest) for path in paths for rest in long_lines(path)]
    return [f"{path.relative_to(REPO) if path.is_relative_to(REPO) else path}: cell {number} ({cell}): "
            f"{len(line)} characters > {WIDTH}: {line.strip()[:70]}…" for path, number, cell, line in found]


def run_ruff():
    "Exit status of `ruff check`, which prints what it finds"
    ruff = Path(sys.executable).parent / "ruff"
    return subprocess.run([ruff, "check", "--quiet", "--output-format", "concise", REPO]).returncode


def main(arguments):
    messages = check_notebooks([Path(argument).resolve() for argument in arguments] or notebooks())
    print("\n".join(messages) or f"notebooks: every line has at most {WIDTH} characters")
    return max(run_ruff(), bool(messages))


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
