"""Notebooks -> library, cleaned notebooks and README.md.   sync.py [--check]

With --check the same is done to a copy, and every file that would change is named; the work tree is left as it is.
`nbdev-readme` needs Quarto; this needs nbconvert alone. Chapters get their imports in cells of their own: the site's build runs every cell
that holds one, and a training run in the same cell with it."""
import ast
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

REPO = Path(__file__).parents[2]
PARTS = ["nbs", "bgrpo_nb", "pyproject.toml", "settings.ini", "setup.py", "_quarto.yml", "README.md"]
HIDDEN = re.compile(r"^#\| *(hide|default_exp|exporti?)\b", re.MULTILINE)


def readme(root):
    "README.md from nbs/index.ipynb: hidden cells gone, links seen from the top of the repository"
    nb = nbformat.read(root / "nbs/index.ipynb", as_version=4)
    nb.metadata["language_info"] = {"name": "python"}
    nb.cells = [c for c in nb.cells if not HIDDEN.search(c.source)]
    for cell in nb.cells: cell.source = re.sub(r"^#\|.*\n", "", cell.source, flags=re.MULTILINE)
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r"\]\((?!https?:|#|\.\./)([^)]+)\)", r"](nbs/\1)", text).replace("](../", "](")
    note = "<!-- Generated from nbs/index.ipynb by `make export`; edit the notebook. -->\n\n"
    (root / "README.md").write_text(note + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")


def _is_import(node): return isinstance(node, (ast.Import, ast.ImportFrom))


def part_imports(cell):
    "A code cell as one or two: its imports, then the rest; directives that say who sees a cell go with both"
    try: body = ast.parse(cell.source).body
    except SyntaxError: return [cell]     # a magic, or a cell that shows an error
    found = [node for node in body if _is_import(node)]
    if not found or len(found) == len(body): return [cell]
    lines = cell.source.splitlines()
    taken = {i for node in found for i in range(node.lineno - 1, node.end_lineno)}
    if any(i in taken for node in body if not _is_import(node) for i in range(node.lineno - 1, node.end_lineno)): return [cell]
    seen_by = [line for line in lines if re.match(r"#\| *(exporti?|hide|eval: *false)\b", line)]
    imports = "\n".join(seen_by + [lines[i] for i in sorted(taken)])
    first = nbformat.v4.new_code_cell(imports, id=hashlib.sha1(f"{cell.id}{imports}".encode()).hexdigest()[:8])
    cell.source = re.sub(r"^((?:#\|.*\n)*)\n+", r"\1", "\n".join(line for i, line in enumerate(lines) if i not in taken))
    return [first, cell]


def stand_imports_alone(path):
    "Rewrite a chapter in which a cell holds imports and other code"
    nb = nbformat.read(path, as_version=4)
    if not any(re.match(r"#\| *default_exp", c.source) for c in nb.cells): return
    cells = [part for c in nb.cells for part in (part_imports(c) if c.cell_type == "code" else [c])]
    if len(cells) == len(nb.cells): return
    nb.cells = cells
    nbformat.write(nb, path)


def sync(root):
    "Imports apart, export, clean, README"
    for path in sorted((root / "nbs").glob("[!_.]*.ipynb")): stand_imports_alone(path)
    run = Path(sys.executable).parent
    for command in ("nbdev-export", "nbdev-clean"):
        done = subprocess.run([run / command], cwd=root, capture_output=True, text=True)
        if done.returncode: sys.exit(f"{command} failed:\n{done.stdout}{done.stderr}")
    if (root / "nbs/index.ipynb").exists(): readme(root)


def files(root):
    "Relative path -> bytes of all that is generated or cleaned"
    found = [p for part in ("nbs", "bgrpo_nb") for p in (root / part).rglob("*") if p.suffix in (".py", ".ipynb", ".txt")]
    kept = [p for p in found if not {"__pycache__", ".ipynb_checkpoints", "_build"} & set(p.parts)]
    return {str(p.relative_to(root)): p.read_bytes() for p in [*kept, root / "README.md"] if p.exists()}


def check():
    "Names of the files that `sync` would change"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / REPO.name
        root.mkdir()
        for part in PARTS:
            source = REPO / part
            if source.is_dir(): shutil.copytree(source, root / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists(): shutil.copy(source, root / part)
        sync(root)
        before, after = files(REPO), files(root)
        return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


if __name__ == "__main__":
    if "--check" not in sys.argv: sync(REPO)
    elif changed := check():
        sys.exit("Not in sync with the notebooks (run `make export` and commit): " + ", ".join(changed))
    else: print("in sync: export, clean and README change nothing")
