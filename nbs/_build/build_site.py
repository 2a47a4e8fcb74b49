"""The site, without Quarto.   build_site.py [--out _docs]

nbdev processes the notebooks as for Quarto, `Stage` translates what it made from Quarto's markup to MyST's, Sphinx
builds the pages. Title and navigation are those of `_quarto.yml`; pages of the API are made from the modules' source.
A warning, a link that leads nowhere or a request to another host ends the build with a message."""
import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from functools import cache, cached_property
from html import escape
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from urllib.parse import unquote, urlsplit

import nbformat
import yaml

import house
from reference import (Reference, chapter_number, entry, find_node, heading, hidden_toctree, module_line, outside_code,
                       patched_class, slug, source_parts)

REPO = house.REPO
WORK = REPO / "build" / "site"               # staged pages and fetched scripts
PACKAGES = {                                 # npm package -> version, file -> name in the site
    "mathjax": ("3.2.2", "package/es5/tex-svg.js", "mathjax.js"),
    "mermaid": ("11.17.2", "package/dist/mermaid.min.js", "mermaid.js"),
    "@jupyter-widgets/html-manager": ("1.0.15", "package/dist/embed.js", "widgets.js"),
}
CALLOUTS = ("note", "tip", "important", "warning", "caution")
WIDGET, STATE = "application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json"
EXPORTED = '#| code-summary: "Exported source"'      # nbdev's mark on a cell with `#| exports`
CALLOUT = re.compile(r"^::: *\{\.callout-(\w+)(?:[^}]*title=\"([^\"]*)\")?[^}]*\}\n(?:## (.*)\n)?(.*?)^:::$",
                     flags=re.MULTILINE | re.DOTALL)
IMAGES = (".svg", ".png", ".jpg", ".gif")


def fail(message): sys.exit(f"site: {message}")


# Navigation

def read_quarto():
    "`website` of _quarto.yml"
    return yaml.safe_load((REPO / "_quarto.yml").read_text())["website"]


def sections(contents):
    "(caption, [notebook, ...]) for each section of a sidebar; entries outside of any have the caption ''"
    found = []
    for item in contents:
        if isinstance(item, dict) and "section" in item:
            pages = [item["href"]] if "href" in item else []
            for _, inner in sections(item.get("contents", [])): pages += inner
            found.append((item["section"], pages))
        else:
            page = item if isinstance(item, str) else item["href"]
            if found and not found[-1][0]: found[-1][1].append(page)
            else: found.append(("", [page]))
    return found


def numbered(title, number):
    "A title with its chapter's number before it, once"
    return f"{number} {title}" if number and not title.startswith(f"{number} ") else title


# nbdev's half

def process():
    "nbs -> _proc, as `nbdev-docs` does before it calls Quarto: show_doc run, hidden cells gone, names linked"
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    os.chdir(REPO)
    refresh_quarto_yml()
    return Path(proc_nbs(n_workers=0, force=True))


# Notebooks on their way to pages

def documented_name(cell):
    "What a `show_doc` cell shows"
    return re.search(r"^show_doc\(([\w.]+)", "".join(cell["source"]), re.MULTILINE).group(1)


def is_show_doc(cell):
    if cell["cell_type"] != "code": return False
    return bool(cell.get("has_sd")) or "".join(cell["source"]).rstrip().split("\n")[-1].startswith("show_doc(")


def is_exported(cell):
    "Is the cell's code part of the library and of the page (`#| exports`)?"
    return cell["cell_type"] == "code" and EXPORTED in "".join(cell["source"])


def is_image(output): return any(mime.startswith("image/") for mime in output.get("data", ()))


def options_and_code(cell):
    "(Quarto's options, the code below them) of a code cell"
    lines = "".join(cell["source"]).splitlines()
    given = cell.get("written_options") or [line[2:] for line in lines if line.startswith("#|")]
    options = yaml.safe_load("\n".join(given)) or {}
    return options, "\n".join(line for line in lines if not line.startswith("#|")).strip()


def folded_options(source):
    "Quarto's options of a cell as they were written, if one of them goes over several lines; nbdev cuts those apart"
    lines = [line[2:] for line in source.splitlines() if line.startswith("#|")]
    options = [line for line in lines if re.match(r"  | ?[\w-]+:", line)]    # an option, or what continues one
    return options if any(line.startswith("  ") for line in options) else None


def names_in(cell):
    "Names that an exported cell defines, as `show_doc` calls them"
    functions = [node for node in ast.parse(options_and_code(cell)[1]).body if hasattr(node, "name")]
    owners = [patched_class(node) for node in functions]
    return [f"{owner}.{node.name}" if owner else node.name for owner, node in zip(owners, functions)]


class Page:
    "A notebook on its way to a page"
    def __init__(self, path, root):
        self.path = PurePosixPath(path.relative_to(root))
        self.nb = json.loads(path.read_text())
        raw = next((c for c in self.nb["cells"] if c["cell_type"] == "raw"), None)
        self.front = yaml.safe_load("".join(raw["source"]).strip().strip("-")) if raw else {}
        self.nb["cells"] = [c for c in self.nb["cells"] if c is not raw]
        self.name = Path(self.front.get("output-file", self.path.name)).stem
        self.target = str(self.path.with_name(f"{self.name}.ipynb"))
        self.up = "../" * (len(self.path.parts) - 1)
        self.title = numbered(self.front["title"], chapter_number(self.path.name))
        self.module = exported_modules().get(f"nbs/{self.path}")
        self.has_h2 = False
        self.restore_options()
        self.names = {documented_name(c).lower() for c in self.nb["cells"] if c.get("has_sd")}

    @property
    def level(self): return 3 if self.has_h2 else 2     # of the headings of names

    @cached_property
    def widgets(self): return self.nb["metadata"].get("widgets", {}).get(STATE, {}).get("state", {})

    def restore_options(self):
        "Options over several lines, from the notebook itself"
        source = REPO / "nbs" / self.path
        if not source.is_file(): return
        written = {c["id"]: "".join(c["source"]) for c in json.loads(source.read_text())["cells"] if "id" in c}
        for cell in self.nb["cells"]:
            options = folded_options(written.get(cell.get("id"), ""))
            if options: cell["written_options"] = options

    def node(self, dotted):
        "The definition of a name in the page's module, or None"
        return find_node(self.module, dotted) if self.module and dotted else None

    def in_source_order(self):
        "The cells, neighbouring `show_doc` cells in the order of the source: nbdev reverses those of one cell"
        def line(cell): return getattr(self.node(documented_name(cell)), "lineno", 0)
        ordered, run = [], []
        for cell in self.nb["cells"]:
            if cell.get("has_sd"): run.append(cell)
            else:
                ordered += [*sorted(run, key=line), cell]
                run = []
        return ordered + sorted(run, key=line)


@cache
def exported_modules():
    "notebook -> the module that is exported from it"
    return {module.notebook: module for module in house.modules().values() if module.notebook}


# Quarto's markup -> MyST's

class Stage:
    "All pages, so that each can link to the others"
    def __init__(self, root):
        self.root = root
        files = [f for f in sorted(root.rglob("*.ipynb")) if not f.name.startswith(".")]
        self.pages = {str(page.path): page for page in (Page(f, root) for f in files)}
        self.by_name = {page.name: page for page in self.pages.values() if page.module}
        self.short = {str(p.path.with_suffix("")): p for p in self.pages.values() if p.path.stem != "index"}
        self.reference = Reference(self)

    # Links

    def to(self, page, target, anchor=""):
        "A link from one staged page to another"
        return relpath(target.target, str(PurePosixPath(page.target).parent)) + (f"#{anchor}" if anchor else "")

    def name_link(self, page, match):
        "nbdev's link of a name; a word that only happens to be a command's stays a word"
        text, name, anchor = match.groups()
        target = self.by_name.get(name)
        if target is None or anchor not in target.names or (name == "cli" and page is not target): return text
        return f"[{text}]({self.to(page, target, slug(anchor))})"

    def file_link(self, page, match):
        "A link to a notebook leads to its page; one to a file that is no part of the site is an error"
        bang, text, url = match.groups()
        parts = urlsplit(url)
        if parts.scheme or url.startswith("#") or not parts.path: return match.group(0)
        path = normpath(str(page.path.parent / unquote(parts.path)))
        if path in self.pages: return f"{bang}[{text}]({self.to(page, self.pages[path], parts.fragment)})"
        if (self.root / path).is_file() and not path.startswith(".."): return match.group(0) + self.narrow(path, match)
        if parts.path.endswith(".html") or path in {p.target for p in self.pages.values()}: return match.group(0)
        fail(f"nbs/{page.path} links to {url}, which is no page and no file under nbs; "
             "link to a notebook, or name the file in backticks")

    def narrow(self, path, match):
        "The variant of an image for phones (`x.narrow.svg` beside `x.svg`), if any; the style shows one"
        bang, text, url = match.groups()
        name, suffix = os.path.splitext(url)
        has_one = bang and (self.root / PurePosixPath(path).with_suffix(f".narrow{suffix}")).is_file()
        return f"![{text}]({name}.narrow{suffix})" if has_one else ""

    def word_link(self, page, match):
        "A word in backticks that is a chapter's file, a module, or a name that no notebook exports"
        word = match.group(1)
        if word in self.short: target, anchor = self.short[word], ""
        else: target, anchor = self.reference.find(word)
        if target is None or (target.target == page.target and not anchor): return match.group(0)
        return f"[`{word}`]({self.to(page, target, anchor)})"

    # Markdown

    def prose(self, page, text):
        "Markdown outside of fences"
        text = re.sub(r"^<!-- .*? -->$", "", text, flags=re.MULTILINE)
        text = re.sub(r"(\]\([^()\s]*\))\{[^}]*\}", r"\1", text)
        text = re.sub(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(((?!/)[^()\s]+)\)", lambda m: self.file_link(page, m), text)
        text = re.sub(r"\[(`[^`]+`)\]\(/(\w+)\.html#([\w.]+)\)", lambda m: self.name_link(page, m), text)
        text = re.sub(r"(?<![\[`\w])`([\w./]+(?:\(\))?)`(?![\]`])", lambda m: self.word_link(page, m), text)
        return re.sub(r"^#+ .*$", without_links, text, flags=re.MULTILINE)

    def markdown(self, page, text):
        "A markdown cell"
        text = CALLOUT.sub(callout, text)
        text = re.sub(r"^```\{?mermaid\}?\n(.*?)^```$", mermaid, text, flags=re.MULTILINE | re.DOTALL)
        return outside_code(text, lambda part: self.prose(page, part))

    # Code

    def documentation(self, page, cell):
        "show_doc's markdown with the signature as it was written and a link to the module's source"
        markdown = "\n".join("".join(output["data"]["text/markdown"]) for output in cell["outputs"])
        dotted = documented_name(cell)
        node = page.node(dotted)
        if node is None: return re.sub(r"^---\n|^\[source\].*\n", "", markdown, flags=re.MULTILINE)
        prose = re.sub(r"\A.*?^```python\n.*?^```", "", markdown, flags=re.DOTALL | re.MULTILINE).strip()
        prose = re.sub(r"\A\*([^\n]+)\*$", r"\1", prose, flags=re.MULTILINE)   # upright, as all prose
        return entry(page.level, page.module, dotted, node, page.up, prose)

    def exported(self, page, cell):
        "A cell whose code is part of the page: each definition under its name"
        for i, (dotted, piece) in enumerate(source_parts(options_and_code(cell)[1])):
            node = page.node(dotted)
            if node is not None:
                above = heading(page.level, page.module, dotted, node, page.up)
                yield nbformat.v4.new_markdown_cell(above, id=f"{cell['id']}-name{i}")
            yield nbformat.v4.new_code_cell(piece, id=f"{cell['id']}-code{i}", metadata={"tags": ["exported"]})

    def code(self, page, cell):
        "A code cell: Quarto's options become MyST-NB's; a captioned figure follows the cell's other output"
        options, source = options_and_code(cell)
        off = {key for key, value in options.items() if value is False or str(value).lower() == "false"}
        if "include" in off or not (source or cell["outputs"]): return
        tags = [tag for option, tag in (("echo", "remove-input"), ("output", "remove-output")) if option in off]
        if str(options.get("code-fold", "")).lower() == "true": tags.append("hide-input")
        outputs = [o for o in (self.output(page, o) for o in cell["outputs"]) if o]
        figures = [o for o in outputs if "fig-cap" in options and is_image(o)]
        rest = [o for o in outputs if o not in figures]
        if source or rest:
            yield nbformat.v4.new_code_cell(source, id=cell["id"], metadata={"tags": tags}, outputs=rest)
        for i, figure in enumerate(figures):
            metadata = {"tags": [*tags, "remove-input"], "mystnb": self.caption(page, options, first=i == 0)}
            name = f"{cell['id']}-figure{i or ''}"
            yield nbformat.v4.new_code_cell("# its figure", id=name, metadata=metadata, outputs=[figure])

    def caption(self, page, options, first): # is it the first figure of its cell?
        "MyST-NB's settings of a figure: caption, label, text for those who do not see it"
        caption, label = options["fig-cap"], options.get("label")
        figure = {"caption": self.prose(page, caption)}
        if label and first: figure["name"] = f"{page.name}-{label}"
        return {"figure": figure, "image": {"alt": options.get("fig-alt") or re.sub(r"[`*$]", "", caption)}}

    def output(self, page, output):
        "An output; a widget keeps what is stored of it, a figure first"
        output = nbformat.from_dict(output)
        if isinstance(output.get("text"), list): output["text"] = "".join(output["text"])
        if "data" not in output: return output
        data = {mime: "".join(v) if isinstance(v, list) else v for mime, v in output["data"].items()}
        if WIDGET in data: data = self.widget(page, data)
        if "text/markdown" in data: data["text/markdown"] = self.markdown(page, data["text/markdown"])
        output["data"] = data
        return output

    def widget(self, page, data):
        "A widget's output: alive where its state is stored, else what is stored beside it, else a word about it"
        if data[WIDGET].get("model_id") in page.widgets: return {WIDGET: data[WIDGET]}
        beside = {mime: value for mime, value in data.items() if mime != WIDGET}
        if set(beside) != {"text/plain"}: return beside
        return {"text/markdown": ":::{note}\nA running notebook has a widget here; `make lab` opens it.\n:::"}

    # Pages

    def title(self, page):
        "The cell at a page's top: title, lead, the module and its source"
        lead = page.front.get("description", "")
        if lead and "`" not in lead: lead = f"*{lead}*"
        line = module_line(page.module, page.up) if page.module else ""
        return nbformat.v4.new_markdown_cell(f"# {page.title}\n\n{self.prose(page, lead)}\n\n{line}", id="title")

    def cells(self, page):
        "The page's cells, its title first"
        yield self.title(page)
        shown_as_code = {name for cell in page.nb["cells"] if is_exported(cell) for name in names_in(cell)}
        for cell in page.in_source_order():
            text = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                page.has_h2 = page.has_h2 or re.search(r"^## ", text, re.MULTILINE) is not None
                text = self.markdown(page, text)
                if text.strip(): yield nbformat.v4.new_markdown_cell(text, id=cell["id"])
            elif is_show_doc(cell):
                if cell.get("has_sd") and documented_name(cell) in shown_as_code: continue
                text = self.markdown(page, self.documentation(page, cell))
                yield nbformat.v4.new_markdown_cell(text, id=cell["id"])
            elif is_exported(cell): yield from self.exported(page, cell)
            else: yield from self.code(page, cell)

    def navigation(self):
        "(caption, [page, ...]) of each section; what _quarto.yml lists and what there is must be the same"
        shown = sections(read_quarto()["sidebar"]["contents"])
        listed = [name for _, names in shown for name in names]
        missing = [name for name in listed if name not in self.pages]
        unlisted = sorted(set(self.pages) - set(listed))
        if missing: fail(f"_quarto.yml lists {', '.join(missing)}, which is not under nbs")
        if unlisted: fail(f"in no section of _quarto.yml: {', '.join(unlisted)}; add a line for each")
        return [(caption, [self.pages[name] for name in names]) for caption, names in shown]

    def write(self, target):
        "Every page, the images, and the reference"
        navigation = self.navigation()
        for page in self.pages.values():
            cells = list(self.cells(page))
            if str(page.path) == "index.ipynb":
                for caption, pages in navigation:
                    names = [other.target.removesuffix(".ipynb") for other in pages if other is not page]
                    if names: cells.append(nbformat.v4.new_markdown_cell(hidden_toctree(names, caption)))
                cells.append(nbformat.v4.new_markdown_cell(hidden_toctree(self.reference.targets(), "API")))
            write_notebook(target / page.target, cells, page)
        for file in self.root.rglob("*"):
            if file.suffix not in IMAGES: continue
            path = target / file.relative_to(self.root)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, path)
        self.reference.write(target)


def without_links(match):
    "A heading whose names are no links: the first would be one to the heading itself"
    return re.sub(r"\[(`[^`]+`)\]\([^)]*\)", r"\1", match.group(0))


def callout(match):
    kind, titled, above, body = match.groups()
    kind, title = kind if kind in CALLOUTS else "note", titled or above
    if title: return f"::::{{admonition}} {title}\n:class: {kind}\n\n{body.strip()}\n::::"
    return f"::::{{{kind}}}\n{body.strip()}\n::::"


def mermaid(match): return f'```{{raw}} html\n<pre class="mermaid">\n{escape(match.group(1))}</pre>\n```'


def write_notebook(path, cells, page):
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    if page.widgets: metadata["widgets"] = page.nb["metadata"]["widgets"]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)


# Scripts

def vendor(wanted, target):
    "Scripts that pages need, from npm's packages; fetched once and cached under build/site/js"
    cache = WORK / "js"
    cache.mkdir(parents=True, exist_ok=True)
    for package in wanted:
        version, inside, name = PACKAGES[package]
        file = cache / f"{version}-{name}"
        if not file.exists(): fetch(package, version, inside, file)
        shutil.copy(file, target / name)


def fetch(package, version, inside, file):
    "One file of an npm package"
    if not shutil.which("npm"):
        fail(f"npm is not on PATH; pages need {package}@{version} from it, once. "
             "Install Node.js with npm (Debian: apt-get install npm), and run this again")
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", f"{package}@{version}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode: fail(f"`{' '.join(command)}` failed; can the registry be reached?\n{done.stderr.strip()}")
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as tar: data = tar.extractfile(inside).read()
    part = file.with_suffix(f".{os.getpid()}")
    part.write_bytes(data)
    part.rename(file)


def scripts_of(folder):
    "npm packages that staged pages need"
    texts = [f.read_text() for f in [*folder.rglob("*.ipynb"), *(folder / "api").rglob("*.md")]]
    needs = {
        "mathjax": any(re.search(r"\$|text/latex", text) for text in texts),
        "mermaid": any('class=\\"mermaid\\"' in text for text in texts),
        "@jupyter-widgets/html-manager": any(WIDGET in text for text in texts),
    }
    return [package for package, needed in needs.items() if needed]


# Sphinx's half

def finish(staged, out):
    "Staged pages, with style and scripts, -> HTML; a warning is an error"
    from sphinx.cmd.build import build_main
    static = staged / "_static"
    static.mkdir()
    shutil.copy(REPO / "nbs" / "styles.css", static)
    vendor(scripts_of(staged), static)
    shutil.rmtree(out, ignore_errors=True)
    settings = ["-c", Path(__file__).parent, "-d", staged / ".doctrees", "-D", f"html_static_path={static}"]
    failed = build_main([str(o) for o in ["-q", "-W", "--keep-going", *settings, staged, out]])
    shutil.rmtree(Path(out).parent / "jupyter_execute", ignore_errors=True)   # myst-nb's copies of the outputs
    if failed: fail("Sphinx warned (see above); correct the notebook or module that it names")


class Tags(HTMLParser):
    "Anchors of a page, and (tag, URL) of all that it points to"
    def __init__(self, text):
        super().__init__()
        self.anchors, self.urls = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes.get("id"), attributes.get("name") if tag == "a" else None}
        self.urls += [(tag, attributes[key]) for key in ("href", "src", "data") if attributes.get(key)]

    handle_startendtag = handle_starttag


def check(out):
    "Faults: links to a page, an anchor or a file that lead nowhere, and what is fetched from another host"
    pages = {p: Tags(p.read_text()) for p in sorted(out.rglob("*.html")) if "_static" not in p.parts}
    faults = []
    for page, tags in pages.items():
        for tag, url in dict.fromkeys(tags.urls):
            message = fault_of(page, tag, url, pages)
            if message: faults.append(f"{page.relative_to(out)}: {message}")
    return faults


def fault_of(page, tag, url, pages):
    "What is wrong with a link of a page, or None"
    parts = urlsplit(url)
    if parts.netloc and tag != "a": return f"{tag} is fetched from {url}"
    if parts.netloc or parts.scheme: return None
    target = page.parent.joinpath(unquote(parts.path)).resolve() if parts.path else page
    if not target.exists(): return f"{url} leads nowhere"
    anchor = unquote(parts.fragment)
    if anchor and target in pages and anchor not in pages[target].anchors: return f"{url} has no such anchor"
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=REPO / "_docs", type=Path, help="folder of the site")
    out = parser.parse_args().out.resolve()
    staged = WORK / f"pages-{os.getpid()}"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        Stage(process()).write(staged)
        finish(staged, out)
    finally: shutil.rmtree(staged, ignore_errors=True)
    if faults := check(out): fail("\n".join(["links to correct:", *faults]))
    print(f"{len(list(out.rglob('*.html')))} pages in {out}")


if __name__ == "__main__": main()
