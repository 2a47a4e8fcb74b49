"""The reference: what the source says of a name, and the pages of folders and of modules that no notebook exports."""
import ast
import re
from pathlib import PurePosixPath
from textwrap import dedent

import house

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


# Definitions

def patched_class(node):
    "The class that fastcore's `@patch` adds a function to, as a text; None for any other node"
    if not isinstance(node, FUNCTIONS) or not node.args.args: return None
    decorators = [ast.unparse(decorator).split("(")[0] for decorator in node.decorator_list]
    if not any(name.split(".")[-1].startswith("patch") for name in decorators): return None
    annotation = node.args.args[0].annotation
    return ast.unparse(annotation) if annotation else None


def find_node(module, dotted):
    "The definition of `f`, `Class` or `Class.method` (also where it is patched in) in a module, or None"
    owner, _, attribute = dotted.rpartition(".")
    nodes = module.tree.body
    if owner:
        inside = [node for cls in nodes if getattr(cls, "name", None) == owner for node in cls.body]
        nodes = inside + [node for node in nodes if owner in re.findall(r"\w+", patched_class(node) or "")]
    return next((node for node in nodes if getattr(node, "name", None) == attribute), None)


def first_line(node):
    "The line on which a definition begins, decorators included"
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def header(module, node):
    "A signature as it was written, with what its comments say of shapes and units"
    above = [f"@{text}" for text in map(ast.unparse, node.decorator_list) if not text.startswith("patch")]
    if isinstance(node, ast.ClassDef): return "\n".join([*above, _class_header(module, node)])
    start, end = node.lineno - 1, node.body[0].lineno - 1
    if start == end:    # the body is on the line of the signature
        bare = ast.parse(ast.unparse(node)).body[0]
        bare.decorator_list = []
        return "\n".join([*above, ast.unparse(bare).split(":\n")[0] + ":"])
    return "\n".join([*above, dedent("\n".join(module.text.splitlines()[start:end]).rstrip())])


def _class_header(module, node):
    "A class with its bases and fields; where there are none, with the signature of its `__init__`"
    lines = module.text.splitlines()
    bases = ", ".join(map(ast.unparse, [*node.bases, *node.keywords]))
    first = f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
    if fields:
        return "\n".join([first, *(line for part in fields for line in lines[part.lineno - 1:part.end_lineno])])
    init = next((part for part in node.body if getattr(part, "name", "") == "__init__"), None)
    if init is None: return first
    return "\n".join([first, *(f"    {line}" for line in header(module, init).splitlines())])


def methods(module, cls): # cls: a ClassDef
    "Public methods and properties of a class that have a docstring, patched ones too, in the order of the source"
    patches = [node for node in module.tree.body if patched_class(node) == cls.name]
    found = [node for node in [*cls.body, *patches] if isinstance(node, FUNCTIONS)]
    return [node for node in found if not node.name.startswith("_") and ast.get_docstring(node)]


def definitions(module):
    "Public functions and classes of a module, methods that are patched into classes left out"
    return [node for node in module.definitions() if patched_class(node) is None]


def source_parts(text):
    "An exported cell's code in pieces (name, code): each public definition begins one; what is above has no name"
    lines = text.splitlines()
    pieces, name, start = [], None, 0
    for node in ast.parse(text).body:
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)) or node.name.startswith("_"): continue
        begin = first_line(node) - 1
        while begin > start and lines[begin - 1].startswith("#"): begin -= 1    # its comments
        pieces.append((name, lines[start:begin]))
        owner = patched_class(node)
        name, start = (f"{owner}.{node.name}" if owner else node.name), begin
    pieces.append((name, lines[start:]))
    texts = [(name, "\n".join(piece).strip("\n")) for name, piece in pieces]
    return [(name, piece) for name, piece in texts if piece]


# Markdown

def outside_code(text, change):
    "Apply `change` to what is not in a fence"
    parts = re.split(r"(^ *(`{3,}|~{3,}).*?^ *\2 *$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(change(part) if i % 3 == 0 else part for i, part in enumerate(parts) if i % 3 != 2)


def slug(dotted):
    "The anchor of a heading, as MyST makes it"
    return re.sub(r"[^\w\- ]", "", dotted.lower()).replace(" ", "-")


def chapter_number(name): # of a notebook's file
    "`08a` of `08a_exact_resume.ipynb`; empty where the name has none"
    match = re.match(r"(\d\d[a-z]?)_", name)
    return match.group(1) if match else ""


def source_path(module):
    "Page of a module's source, from the top of the site, without its suffix"
    return f"source/{module.name.replace('.', '/')}"


def module_line(module, up): # up: from the page to the top of the site, `../` for each folder
    "The line below a page's title: the module's dotted name, and a link to its source"
    source = f'<a href="{up}{source_path(module)}.html">source</a>'
    return f'<p class="module"><code>bgrpo_nb.{module.name}</code> · {source}</p>'


def heading(level, module, dotted, node, up):
    "A heading for a name, with a link to the line of its definition"
    escaped = dotted.replace("_", "\\_")
    where = f"{up}{source_path(module)}.html#L{first_line(node)}"
    return f"{'#' * level} {escaped}\n\n<a class=\"source\" href=\"{where}\">source</a>"


def entry(level, module, dotted, node, up, prose=""):
    "A name in the reference: heading, signature as it was written, what it does"
    above = heading(level, module, dotted, node, up)
    return f"{above}\n\n```python\n{header(module, node)}\n```\n\n{prose.strip()}".rstrip()


def hidden_toctree(targets, caption=""): # staged paths, without suffix
    "A directive that puts pages into the navigation"
    options = [":hidden:", *([f":caption: {caption}"] if caption else [])]
    return "\n".join(["```{toctree}", *options, "", *targets, "```"])


# Pages

def public_names():
    "name -> module (dotted, without the package) of what can be imported from the package itself"
    stub = ast.parse((house.REPO / "bgrpo_nb/__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module for node in imports for alias in node.names}


class ApiPage:
    "A page of the reference, as the links of its docstrings see it"
    def __init__(self, name): # `public`, a folder, or a module
        self.name = name
        self.target = f"api/{name.replace('.', '/')}.md"
        self.path = PurePosixPath(self.target)
        self.up = "../" * (len(self.path.parts) - 1)


class Reference:
    "All pages of the API: public names, folders, and modules that no notebook exports"
    def __init__(self, stage):
        self.stage = stage
        self.modules = house.modules()
        self.folders = [name for name in house.FOLDERS if name in self.modules and self.modules[name].is_folder]
        plain = [name for name, module in self.modules.items() if not module.notebook and not module.is_folder]
        documented = [name for name in plain if definitions(self.modules[name])]
        self.public = public_names()
        self.pages = {name: ApiPage(name) for name in ["public", *self.folders, *documented]}
        self.chapters = {page.module.name: page for page in stage.pages.values() if page.module}
        self.words = self._words()

    def page_of(self, name):
        "The page that documents a module or folder: its chapter, or a page made here; None where there is neither"
        return self.chapters.get(name) or self.pages.get(name)

    def _words(self):
        "word -> (page, anchor): what a word in backticks leads to"
        found = {}
        for folder in self.folders:
            found[f"bgrpo_nb.{folder}"] = found[f"{folder}/"] = (self.pages[folder], "")
        for name in self.modules:
            page = self.page_of(name)
            if page is None or name in self.folders: continue
            found[f"bgrpo_nb.{name}"] = (page, "")
            if "." in name: found[name] = (page, "")
            if name in self.pages: found |= self._names_of(name)
        for name, home in self.public.items():
            page = self.page_of(home)
            if page is not None: found[f"bgrpo_nb.{name}"] = (page, self._anchor(home, name))
        return found

    def _anchor(self, name, word):
        "Where a module's page documents a name; constants have no heading"
        return slug(word) if find_node(self.modules[name], word) else ""

    def _names_of(self, name): # a module with a page of its own
        "The names that a plain module defines: behind the module's name, and alone where no other module defines them"
        module, page = self.modules[name], self.pages[name]
        others = [other for other in self.modules.values() if other.name != name]
        elsewhere = {node.name for other in others for node in other.definitions()}
        found = {}
        for node in definitions(module):
            dotted = [node.name]
            if isinstance(node, ast.ClassDef): dotted += [f"{node.name}.{m.name}" for m in methods(module, node)]
            for word in dotted:
                link = (page, slug(word))
                found[f"{name.split('.')[-1]}.{word}"] = found[f"bgrpo_nb.{name}.{word}"] = link
                if node.name in elsewhere: continue
                found[f"{word}()"] = link
                if self._distinctive(word): found[word] = link
        return found

    def _distinctive(self, word):
        "Can a word in backticks only be this name? `start` may be anything, `read_metrics` and `Run` may not"
        return "_" in word or "." in word or not word.islower() or word in self.public

    def find(self, word):
        "(page, anchor) for a word in backticks; (None, '') where it is only a word"
        return self.words.get(word) or self.words.get(word.removesuffix("()"), (None, ""))

    def targets(self):
        "The pages of the API in the navigation's first level"
        return [str(self.pages[name].path.with_suffix("")) for name in ["public", *self.folders]]

    def write(self, folder):
        "All pages, and the source of every module"
        writers = {name: self.module_page for name in self.pages} | {name: self.folder_page for name in self.folders}
        for name, page in self.pages.items():
            text = self.public_page(page) if name == "public" else writers[name](page)
            path = folder / page.target
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8")
        for module in self.modules.values():
            if not module.is_folder: write_source(module, folder)

    def _link(self, page, name, word=""):
        "A link from a page to a module's page, or to a name on it"
        target, label = self.page_of(name), f"`{word or f'bgrpo_nb.{name}'}`"
        anchor = self._anchor(name, word) if word else ""
        return f"[{label}]({self.stage.to(page, target, anchor)})" if target else label

    def _prose(self, page, text):
        "A docstring as markdown, its words linked"
        return outside_code(text, lambda part: self.stage.prose(page, part))

    def public_page(self, page):
        "What can be imported from the package itself"
        lead = "These names can be imported from `bgrpo_nb` itself. Each is loaded when it is first used."
        parts = ["# Public names", lead]
        for name, home in self.public.items():
            node = find_node(self.modules[home], name)
            summary = (ast.get_docstring(node) or "").split("\n\n")[0] if node else f"A constant of `{home}`"
            parts.append(f"{self._link(page, home, name)}\n: {self._prose(page, ' '.join(summary.split()))}")
        return "\n\n".join(parts)

    def folder_page(self, page):
        "A folder's docstring, and its modules with their first lines"
        folder = self.modules[page.name]
        name = f'<p class="module"><code>bgrpo_nb.{page.name}</code></p>'
        parts = [f"# {page.name}", name, self._prose(page, folder.docstring), "## Modules"]
        inside = [module for name, module in self.modules.items() if name.startswith(f"{page.name}.")]
        for module in inside:
            chapter = self.chapters.get(module.name)
            number = f", chapter {chapter_number(chapter.path.name)}" if chapter else ""
            parts.append(f"{self._link(page, module.name)}{number}\n: {self._prose(page, module.lead)}")
        children = [f"{page.name}/{m.path.stem}" for m in inside if m.name in self.pages]
        if children: parts.append(hidden_toctree(children))
        return "\n\n".join(parts)

    def module_page(self, page):
        "A plain module: its docstring, then every public name with its signature as it was written"
        module = self.modules[page.name]
        parts = [f"# {page.name}", module_line(module, page.up), self._prose(page, module.docstring)]
        for node in definitions(module):
            documented = [(2, node.name, node)]
            if isinstance(node, ast.ClassDef):
                documented += [(3, f"{node.name}.{method.name}", method) for method in methods(module, node)]
            for level, dotted, part in documented:
                prose = self._prose(page, ast.get_docstring(part) or "")
                parts.append(entry(level, module, dotted, part, page.up, prose))
        return "\n\n".join(parts)


def write_source(module, folder):
    "A module's whole source, every line with an anchor"
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer
    formatter = HtmlFormatter(cssclass="highlight module", anchorlinenos=True, linenos="inline", lineanchors="L")
    html = highlight(module.text, PythonLexer(stripnl=False), formatter).replace("L-", "L")
    path = folder / f"{source_path(module)}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"---\norphan: true\n---\n\n# bgrpo_nb.{module.name}: source"
    path.write_text(f"{title}\n\n```{{raw}} html\n{html}\n```\n", encoding="utf-8")
