"""Notebooks -> library, cleaned notebooks and README.md.   sync.py [--check]

What nbdev exports is completed here: module docstrings from headings and first paragraphs, lines of at most 120
characters, the list of modules, the map on the index page. `nbdev-readme` needs Quarto; this needs nbconvert alone.
Chapters get their imports in cells of their own, because the site's build runs every cell that holds an import.

With --check the same is done to a copy, and every file that would change is named; the work tree stays as it is."""
import ast
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from textwrap import fill

import nbformat
from nbconvert import MarkdownExporter

import house

REPO = house.REPO
WIDTH = 120
PARTS = ["nbs", "bgrpo_nb", "pyproject.toml", "settings.ini", "setup.py", "_quarto.yml", "README.md"]
HIDDEN = re.compile(r"^#\| *(hide|default_exp|exporti?)\b", re.MULTILINE)
MAP = ("<!-- map: made from the imports by `make export` -->", "<!-- end of map -->")


# README

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


# Notebooks

def _is_import(node): return isinstance(node, (ast.Import, ast.ImportFrom))


def _lines_of(nodes): return {i for node in nodes for i in range(node.lineno - 1, node.end_lineno)}


def part_imports(cell):
    "A code cell as one or two: its imports, then the rest; directives that say who sees a cell go with both"
    try: body = ast.parse(cell.source).body
    except SyntaxError: return [cell]     # a magic, or a cell that shows an error
    found = [node for node in body if _is_import(node)]
    if not found or len(found) == len(body): return [cell]
    lines = cell.source.splitlines()
    taken = _lines_of(found)
    if taken & _lines_of(node for node in body if not _is_import(node)): return [cell]
    seen_by = [line for line in lines if re.match(r"#\| *(exporti?|exports|hide|eval: *false)\b", line)]
    imports = "\n".join(seen_by + [lines[i] for i in sorted(taken)])
    first = nbformat.v4.new_code_cell(imports, id=hashlib.sha1(f"{cell.id}{imports}".encode()).hexdigest()[:8])
    rest = "\n".join(line for i, line in enumerate(lines) if i not in taken)
    cell.source = re.sub(r"^((?:#\|.*\n)*)\n+", r"\1", rest)
    return [first, cell]


def plain_prose(text):
    "A markdown cell without `#| export` lines: JupyterLab shows them as text, and the docstring does not need them"
    return re.sub(r"^#\| *export\w*.*\n*", "", text, flags=re.MULTILINE)


def tidy_notebook(path):
    "Rewrite a notebook whose markdown has `#| export` lines, or a chapter in which a cell holds imports and other code"
    nb = nbformat.read(path, as_version=4)
    before = [cell.source for cell in nb.cells]
    for cell in nb.cells:
        if cell.cell_type == "markdown": cell.source = plain_prose(cell.source)
    if exported_to(nb):
        nb.cells = [part for c in nb.cells for part in (part_imports(c) if c.cell_type == "code" else [c])]
    if [cell.source for cell in nb.cells] != before: nbformat.write(nb, path)


def draw_map(root):
    "The diagram between the two markers of the index page, from the imports"
    path = root / "nbs/index.ipynb"
    nb = nbformat.read(path, as_version=4)
    cell = next((c for c in nb.cells if MAP[0] in c.source and MAP[1] in c.source), None)
    if cell is None:
        sys.exit("nbs/index.ipynb has no place for the map of the folders: "
                 f"add a markdown cell with these two lines\n{MAP[0]}\n{MAP[1]}")
    before, rest = cell.source.split(MAP[0])
    after = rest.split(MAP[1])[1]
    source = f"{before}{MAP[0]}\n```mermaid\n{house.diagram(root)}\n```\n{MAP[1]}{after}"
    if source != cell.source:
        cell.source = source
        nbformat.write(nb, path)


# Module docstrings

TEX = {  # commands that have a plain form
    r"\circ": "∘", r"\cdot": " · ", r"\times": "×", r"\le": "≤", r"\leq": "≤", r"\ge": "≥", r"\geq": "≥",
    r"\ne": "≠", r"\to": "→", r"\in": "∈", r"\sum": "Σ", r"\pi": "π", r"\epsilon": "ε", r"\beta": "β", r"\log": "log",
    r"\exp": "exp", r"\deg": "deg", r"\min": "min", r"\max": "max", r"\,": " ", r"\;": " ", r"\quad": " ",
    r"\ldots": "...", r"\dots": "...",
}
NO_PROSE = re.compile(r"#|\||```|~~~|:::|!\[|\$\$|<|>|(?:[-*+]|\d+\.) ")   # what begins a block that is no paragraph


def _plain_formula(match):
    "A formula without TeX where it is simple enough, else as it is"
    text = re.sub(r"\\(?:[A-Za-z]+|[,;])", lambda m: TEX.get(m.group(0), m.group(0)), match.group(1))
    return match.group(0) if "\\" in text else re.sub(r"[{}]", "", re.sub(r" {2,}", " ", text)).strip()


def plain(text):
    "Markdown as `help()` can show it: links and emphasis become their words, code stays in backticks"
    def outside_code(part):
        part = re.sub(r"!\[[^\]]*\]\([^)]*\)(?:\{[^}]*\})?", "", part)
        part = re.sub(r"<!--.*?-->|</?\w+[^>]*>", "", part, flags=re.DOTALL)
        part = re.sub(r"(?<!\\)\$([^$\n]+(?:\n[^$\n]+)?)\$", _plain_formula, part)
        part = re.sub(r"\*\*(\S(?:.*?\S)?)\*\*", r"\1", part, flags=re.DOTALL)
        return re.sub(r"(?<![\w*])\*(\w(?:[^*]*\w[.!?]?)?)\*(?![\w*])", r"\1", part)
    text = re.sub(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\([^()\s]*\)(?:\{[^}]*\})?", r"\1", text)
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if i % 2 else outside_code(part) for i, part in enumerate(parts))


def blocks(text):
    "What blank lines part, fenced blocks whole"
    found, open_fence = [[]], ""
    for line in text.splitlines():
        fence = re.match(r" *(`{3,}|~{3,}|:{3,})", line)
        if fence and not open_fence: open_fence = fence.group(1)
        elif fence and line.strip() == open_fence: open_fence = ""
        if not line.strip() and not open_fence: found.append([])
        else: found[-1].append(line)
    return ["\n".join(lines) for lines in found if lines]


def sections(cells):
    "(heading, first paragraph) of each H2 that prose follows"
    flow = []
    for cell in cells:
        if cell.cell_type != "markdown": flow.append(None)
        else:
            for block in blocks(cell.source):   # a heading's paragraph may begin on the next line
                first, *rest = block.splitlines()
                if first.startswith("#") and rest: flow += [first, "\n".join(rest)]
                else: flow.append(block)
    for block, following in zip(flow, [*flow[1:], None]):
        if not block or not block.startswith("## ") or not following or NO_PROSE.match(following): continue
        paragraph = re.split(r"\n(?=\s*(?:[-*+]|\d+\.) |\||```|\$\$)", following)[0]
        if paragraph.rstrip().endswith(":"):    # what it announces is no part of the docstring
            paragraph = "".join(re.findall(r".*?[.!?](?=\s|$)\s*", paragraph, flags=re.DOTALL))
        if paragraph.strip(): yield block.removeprefix("## ").strip(), paragraph.strip()


def docstring(nb):
    "A module's docstring from its notebook: the line under the title, then each section's heading and first paragraph"
    title = next(c.source for c in nb.cells if c.cell_type == "markdown" and c.source.startswith("# "))
    lead = " ".join(line.removeprefix(">").strip() for line in title.splitlines() if line.startswith(">"))
    parts = [_wrap(lead)]
    for heading, paragraph in sections(nb.cells): parts += [f"## {plain(heading)}", _wrap(paragraph)]
    return "\n\n".join(part for part in parts if part)


def _wrap(text, **indent):
    "Plain prose in lines that fit, the first of them behind the quotes"
    return _fill(" ".join(plain(text).split()), WIDTH - 5, **indent)


def _fill(text, width, **indent): return fill(text, width, break_long_words=False, break_on_hyphens=False, **indent)


def quoted(text):
    "A string literal in triple quotes; raw where it holds a backslash and can be raw"
    ends_well = not text.endswith(('"', "\\"))
    if '"""' not in text and ends_well: return f'r"""{text}"""' if "\\" in text else f'"""{text}"""'
    escaped = text.replace("\\", "\\\\").replace('"""', r'\"\"\"')
    if escaped.endswith('"') and not escaped.endswith(r'\"'): escaped = escaped[:-1] + r"\""
    return f'"""{escaped}"""'


def replace_docstring(source, text):
    "A module's source with another docstring; the rest stays as it is"
    body = ast.parse(source).body
    has_one = body and isinstance(body[0], ast.Expr) and isinstance(getattr(body[0].value, "value", None), str)
    lines = source.splitlines(keepends=True)
    rest = "".join(lines[body[0].end_lineno:] if has_one else lines).lstrip("\n")
    return f"{quoted(text)}\n\n{rest}"


def wrap_all(source):
    "A module's source with its `__all__` in lines of at most 120 characters"
    match = re.search(r"^__all__ = (\[.*?\])$", source, flags=re.MULTILINE | re.DOTALL)
    if match is None: return source
    names = ", ".join(repr(name) for name in ast.literal_eval(match.group(1)))
    lines = _fill(f"__all__ = [{names}]", WIDTH, subsequent_indent=" " * 11)
    return source[:match.start()] + lines + source[match.end():]


def exported_to(nb):
    "The dotted name of the module that a notebook becomes, or None"
    found = (re.match(r"#\| *default_exp +(\S+)", cell.source) for cell in nb.cells if cell.cell_type == "code")
    return next((match.group(1) for match in found if match), None)


def complete_modules(root):
    "Docstrings and line lengths of the modules that nbdev has exported"
    for module in house.modules(root).values():
        if module.notebook is None: continue
        notebook = root / module.notebook
        nb = nbformat.read(notebook, as_version=4) if notebook.is_file() else None
        if nb is None or exported_to(nb) != module.name:
            sys.exit(f"{module.path.relative_to(root)} is no longer exported from {module.notebook}; remove the file")
        source = wrap_all(replace_docstring(module.text, docstring(nb)))
        if source != module.text: module.path.write_text(source, encoding="utf-8")


def wrap_index(root):
    "nbdev's index of names, with lines of at most 120 characters"
    path = root / "bgrpo_nb/_modidx.py"
    space = {}
    exec(path.read_text(encoding="utf-8"), space)
    lines = ["# Autogenerated by nbdev", "", "d = {"]
    lines += [f" {key!r}: {value!r}," for key, value in space["d"].items() if key != "syms"]
    lines.append(" 'syms': {")
    for module, names in sorted(space["d"]["syms"].items()):
        lines.append(f"  {module!r}: {{")
        for name, where in sorted(names.items()): lines += [f"   {name!r}:", f"    {where!r},"]
        lines.append("  },")
    path.write_text("\n".join([*lines, " },", "}", ""]), encoding="utf-8")


def list_modules(root):
    "The package's docstring: its description, then every folder with its sentence and its modules"
    path = root / "bgrpo_nb/__init__.py"
    source = path.read_text(encoding="utf-8")
    description = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["description"]
    known = house.modules(root)
    parts = [_wrap(description), "Folders and modules, from the ground up:"]
    for folder in house.FOLDERS:
        if folder not in known: continue
        inside = [module for name, module in known.items() if name.startswith(f"{folder}.")]
        lines = [_wrap(f"`bgrpo_nb.{folder}`: {known[folder].lead}")]
        lines += [_wrap(f"- `{module.name}`: {module.lead}", subsequent_indent="  ") for module in inside]
        parts.append("\n".join(lines))
    text = replace_docstring(source, "\n\n".join(parts))
    if text != source: path.write_text(text, encoding="utf-8")


# All of it

UPDATE = "from nbdev.config import update_llms_txt; update_llms_txt()"


def run(root, *command):
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode: sys.exit(f"{Path(command[0]).name} failed:\n{done.stdout}{done.stderr}")


def sync(root):
    "Notebooks tidied, exported and cleaned; docstrings, map, lists of modules and README from them"
    for path in sorted((root / "nbs").rglob("[!_.]*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts: tidy_notebook(path)
    tools = Path(sys.executable).parent
    run(root, tools / "nbdev-export")
    complete_modules(root)
    run(root, sys.executable, "-c", UPDATE)   # again, now that the docstrings are in
    list_modules(root)
    wrap_index(root)
    if (root / "nbs/index.ipynb").exists(): draw_map(root)
    run(root, tools / "nbdev-clean")
    if (root / "nbs/index.ipynb").exists(): readme(root)


def files(root):
    "Relative path -> bytes of all that is generated or cleaned"
    found = [*(root / "nbs").rglob("*"), *(root / "bgrpo_nb").rglob("*")]
    skipped = {"__pycache__", ".ipynb_checkpoints", "_build"}
    wanted = [p for p in found if p.suffix in (".py", ".ipynb", ".txt") and not skipped & set(p.parts)]
    return {str(p.relative_to(root)): p.read_bytes() for p in [*wanted, root / "README.md"] if p.exists()}


def check():
    "Names of the files that `sync` would change"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / REPO.name
        root.mkdir()
        for part in PARTS:
            source = REPO / part
            if source.is_dir():
                shutil.copytree(source, root / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists(): shutil.copy(source, root / part)
        sync(root)
        before, after = files(REPO), files(root)
        return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


if __name__ == "__main__":
    if "--check" not in sys.argv: sync(REPO)
    elif changed := check():
        sys.exit("Not in sync with the notebooks (run `make export` and commit): " + ", ".join(changed))
    else: print("in sync: export, clean and README change nothing")
