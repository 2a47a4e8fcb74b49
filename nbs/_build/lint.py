"""The rules for code: `ruff check` with the settings of pyproject.toml. In notebooks: lines of at most 120 characters,
and none of prose that the site would leave out.

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


def left_out(notebook): # path of an .ipynb file
    "(number of the cell, its id, the line) for each line of prose that MyST takes for a comment: it begins with %"
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        fenced = False
        for line in "".join(cell["source"]).splitlines() if cell["cell_type"] == "markdown" else ():
            fenced ^= line.lstrip().startswith("```")
            if line.startswith("%") and not fenced: yield number, cell.get("id", "?"), line


def notebooks():
    "Every notebook of the repository that people write"
    skipped = {".ipynb_checkpoints", "_proc"}
    return [path for path in sorted((REPO / "nbs").rglob("*.ipynb")) if not skipped & set(path.parts)]


def check_notebooks(paths):
    "One message for each fault"
    found = [(path, *place, f"{len(line)} characters > {WIDTH}", line)
             for path in paths for *place, line in long_lines(path)]
    found += [(path, *place, "a line that begins with % is not shown; wrap it elsewhere", line)
              for path in paths for *place, line in left_out(path)]
    return [f"{path.relative_to(REPO) if path.is_relative_to(REPO) else path}: cell {number} ({cell}): "
            f"{fault}: {line.strip()[:70]}…" for path, number, cell, fault, line in found]


def run_ruff():
    "Exit status of `ruff check`, which prints what it finds"
    ruff = Path(sys.executable).parent / "ruff"
    return subprocess.run([ruff, "check", "--quiet", "--output-format", "concise", REPO]).returncode


def main(arguments):
    messages = check_notebooks([Path(argument).resolve() for argument in arguments] or notebooks())
    print("\n".join(messages) or f"notebooks: every line has at most {WIDTH} characters, and all prose is shown")
    return max(run_ruff(), bool(messages))


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
