"""The site, without Quarto.   build_site.py [--out _docs]

nbdev processes the notebooks as for Quarto, `stage` puts what it made into MyST's words, Sphinx builds the pages from that. Title and navigation
are those of `_quarto.yml`. A warning, a link that leads nowhere or a request to another host ends the build with a message."""
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
from functools import cache
from html import escape
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from urllib.parse import unquote, urlsplit

import nbformat
import yaml

REPO = Path(__file__).resolve().parents[2]
WORK = REPO / "build" / "site"               # staged pages and fetched scripts
PACKAGES = {                                 # npm package -> version, file -> name in the site
    "mathjax": ("3.2.2", "package/es5/tex-svg.js", "mathjax.js"),
    "mermaid": ("11.17.2", "package/dist/mermaid.min.js", "mermaid.js"),
    "@jupyter-widgets/html-manager": ("1.0.15", "package/dist/embed.js", "widgets.js"),
}
CALLOUTS = {"note": "note", "tip": "tip", "important": "important", "warning": "warning", "caution": "caution"}
WIDGET, STATE = "application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json"


def fail(message): sys.exit(f"site: {message}")


# Navigation

def read_quarto():
    "`website` of _quarto.yml"
    return yaml.safe_load((REPO / "_quarto.yml").read_text())["website"]


def sections(contents):
    "(caption, [notebook, ...]) for each section of a sidebar; entries outside of any have the caption ''"
    found = []
    for entry in contents:
        if isinstance(entry, dict) and "section" in entry:
            inner = [entry["href"]] if "href" in entry else []
            found.append((entry["section"], inner + [p for _, pages in sections(entry.get("contents", [])) for p in pages]))
        else:
            page = entry if isinstance(entry, str) else entry["href"]
            if found and not found[-1][0]: found[-1][1].append(page)
            else: found.append(("", [page]))
    return found


# nbdev's half

def process():
    "nbs -> _proc, as `nbdev-docs` does before it calls Quarto: show_doc run, hidden cells gone, names linked"
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    os.chdir(REPO)
    refresh_quarto_yml()
    return Path(proc_nbs(n_workers=0, force=True))


# API: what stands in the source

@cache
def module(name):
    "Lines and tree of a module of the library"
    text = (REPO / "bgrpo_nb" / f"{name}.py").read_text()
    return text.splitlines(), ast.parse(text)


def find_node(name, dotted):
    "The definition of `f`, `Class` or `Class.method` (also where it is patched in) in a module, or None"
    owner, _, attribute = dotted.rpartition(".")
    nodes = module(name)[1].body
    if not owner: return next((n for n in nodes if getattr(n, "name", None) == attribute), None)
    inside = [n for c in nodes if getattr(c, "name", None) == owner for n in c.body]
    patched = [n for n in nodes if isinstance(n, ast.FunctionDef) and n.args.args and owner in ast.unparse(n.args.args[0].annotation or n)]
    return next((n for n in inside + patched if getattr(n, "name", None) == attribute), None)


def header(name, node):
    "A signature as it was written, with what its comments say of shapes and units"
    lines = module(name)[0]
    if isinstance(node, ast.ClassDef):
        fields = [i for n in node.body if isinstance(n, ast.AnnAssign) for i in range(n.lineno - 1, n.end_lineno)]
        init = next((n for n in node.body if getattr(n, "name", "") == "__init__"), None)
        bases = ", ".join(map(ast.unparse, [*node.bases, *node.keywords]))
        first = f"class {node.name}({bases}):" if bases else f"class {node.name}:"
        if fields: return "\n".join([first, *(lines[i] for i in fields)])
        return first if init is None else first + "\n" + header(name, init)
    start, end = node.lineno - 1, node.body[0].lineno - 1
    if start == end: return ast.unparse(node).split(":\n")[0] + ":"
    return "\n".join(lines[start:end])


def api(markdown, page):
    "show_doc's markdown with the signature as it was written and a link to the module's source"
    dotted = re.search(r"^#+ (.+)$", markdown, re.MULTILINE).group(1).replace("\\", "").strip()
    node = find_node(page.name, dotted) if page.module else None
    if node is None: return re.sub(r"^---\n|^\[source\].*\n", "", markdown, flags=re.MULTILINE)
    prose = re.sub(r"\A.*?^```python\n.*?^```", "", markdown, flags=re.DOTALL | re.MULTILINE)
    escaped = dotted.replace("_", "\\_")
    level = "###" if page.has_h2 else "##"
    line = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    where = f'<a class="source" href="{page.up}source/{page.name}.html#L{line}">source</a>'
    return f"{level} {escaped}\n\n{where}\n\n```python\n{header(page.name, node)}\n```\n\n{prose.strip()}"


def source_page(name, target):
    "A module's whole source, every line with an anchor"
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer
    html = highlight("\n".join(module(name)[0]), PythonLexer(), HtmlFormatter(cssclass="highlight module", anchorlinenos=True, linenos="inline", lineanchors="L"))
    html = html.replace("L-", "L")
    (target / f"{name}.md").write_text(f"---\norphan: true\n---\n\n# bgrpo_nb.{name}: source\n\n```{{raw}} html\n{html}\n```\n")


# Quarto's words -> MyST's

class Page:
    "A notebook on its way to a page"
    def __init__(self, path, root):
        self.path = PurePosixPath(path.relative_to(root))
        self.nb = json.loads(path.read_text())
        raw = next((c for c in self.nb["cells"] if c["cell_type"] == "raw"), None)
        self.front = yaml.safe_load("".join(raw["source"]).strip().strip("-")) if raw else {}
        self.nb["cells"] = [c for c in self.nb["cells"] if c is not raw]
        self.name = Path(self.front.get("output-file", self.path.name)).stem
        self.target = str(self.path.parent / f"{self.name}.ipynb") if str(self.path.parent) != "." else f"{self.name}.ipynb"
        self.up = "../" * (len(self.path.parts) - 1)
        self.module = self.path.parent == PurePosixPath(".") and (REPO / "bgrpo_nb" / f"{self.name}.py").exists()
        self.has_h2, self.names = False, set()
        for c in self.nb["cells"]:
            if c.get("has_sd"): self.names |= {n.lower() for n in re.findall(r"^show_doc\(([\w.]+)", "".join(c["source"]), re.MULTILINE)}


def outside_code(text, change):
    "Apply `change` to what is not in a fence"
    parts = re.split(r"(^ *(`{3,}|~{3,}).*?^ *\2 *$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(change(part) if i % 3 == 0 else part for i, part in enumerate(parts) if i % 3 != 2)


class Stage:
    "All pages, so that each knows where the others stand"
    def __init__(self, root):
        self.root = root
        self.pages = {str(p.path): p for f in sorted(root.rglob("*.ipynb")) if not f.name.startswith(".") for p in [Page(f, root)]}
        self.by_name = {p.name: p for p in self.pages.values() if p.module}
        self.short = {str(p.path.with_suffix("")): p for p in self.pages.values() if p.path.stem != "index"}

    def to(self, page, target, anchor=""): # a link from one staged page to another
        return relpath(target.target, str(PurePosixPath(page.target).parent)) + (f"#{anchor}" if anchor else "")

    def name_link(self, page, match):
        "nbdev's link of a name; a word that only happens to be a command's stays a word"
        text, name, anchor = match.groups()
        target = self.by_name.get(name)
        if target is None or anchor not in target.names or (name == "cli" and page is not target): return text
        return f"[{text}]({self.to(page, target, anchor.replace('.', ''))})"

    def file_link(self, page, match):
        "A link to a notebook leads to its page; one to a file that is no part of the site is an error"
        bang, text, url = match.groups()
        parts = urlsplit(url)
        if parts.scheme or url.startswith("#") or not parts.path: return match.group(0)
        path = normpath(str(page.path.parent / unquote(parts.path)))
        if path in self.pages: return f"{bang}[{text}]({self.to(page, self.pages[path], parts.fragment)})"
        if (self.root / path).is_file() and not path.startswith(".."): return match.group(0)
        if re.search(r"\.html$", parts.path) or path in {p.target for p in self.pages.values()}: return match.group(0)
        fail(f"nbs/{page.path} links to {url}, which is no page and no file under nbs; link to a notebook, or name the file in backticks")

    def prose(self, page, text):
        "Markdown outside of fences"
        text = re.sub(r"^#\| *export\b.*\n", "", text, flags=re.MULTILINE)
        text = re.sub(r"^<!-- WARNING: THIS FILE WAS AUTOGENERATED.*-->$", "", text, flags=re.MULTILINE)
        text = re.sub(r"(\]\([^()\s]*\))\{[^}]*\}", r"\1", text)
        text = re.sub(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(((?!/)[^()\s]+)\)", lambda m: self.file_link(page, m), text)
        text = re.sub(r"\[(`[^`]+`)\]\(/(\w+)\.html#([\w.]+)\)", lambda m: self.name_link(page, m), text)
        text = re.sub(r"(?<![\[`\w])`((?:tutorials/|experiments/)?\w+)`(?![\]`])", lambda m: f"[{m.group(0)}]({self.to(page, self.short[m.group(1)])})"
                      if m.group(1) in self.short and self.short[m.group(1)] is not page else m.group(0), text)
        return text

    def markdown(self, page, text):
        "A markdown cell"
        text = re.sub(r"^::: *\{\.callout-(\w+)(?:[^}]*title=\"([^\"]*)\")?[^}]*\}\n(?:## (.*)\n)?(.*?)^:::$", callout, text, flags=re.MULTILINE | re.DOTALL)
        text = re.sub(r"^```\{?mermaid\}?\n(.*?)^```$", lambda m: f'```{{raw}} html\n<pre class="mermaid">\n{escape(m.group(1))}</pre>\n```', text,
                      flags=re.MULTILINE | re.DOTALL)
        return outside_code(text, lambda part: self.prose(page, part))

    def code(self, page, cell):
        "A code cell: Quarto's options become MyST-NB's; a captioned figure stands alone, below what else its cell put out"
        lines = "".join(cell["source"]).splitlines()
        options = yaml.safe_load("\n".join(line[2:] for line in lines if line.startswith("#|"))) or {} if any(line.startswith("#|") for line in lines) else {}
        source = "\n".join(line for line in lines if not line.startswith("#|")).strip()
        off = {key for key, value in options.items() if value is False or str(value).lower() == "false"}
        if "include" in off or not (source or cell["outputs"]): return
        tags = [t for option, t in (("echo", "remove-input"), ("output", "remove-output")) if option in off]
        if str(options.get("code-fold", "")).lower() == "true": tags.append("hide-input")
        outputs = [o for o in (self.output(page, o) for o in cell["outputs"]) if o]
        figures = [o for o in outputs if "fig-cap" in options and any(mime.startswith("image/") for mime in o.get("data", ()))]
        rest = [o for o in outputs if o not in figures]
        if source or rest: yield nbformat.v4.new_code_cell(source, id=cell["id"], metadata={"tags": tags}, outputs=rest)
        for i, figure in enumerate(figures):
            caption, label = options["fig-cap"], options.get("label")
            shown = {"figure": {"caption": self.prose(page, caption), **({"name": f"{page.name}-{label}"} if label and not i else {})},
                     "image": {"alt": options.get("fig-alt") or re.sub(r"[`*$]", "", caption)}}
            yield nbformat.v4.new_code_cell("# its figure", id=f"{cell['id']}-figure{i or ''}", metadata={"tags": [*tags, "remove-input"], "mystnb": shown}, outputs=[figure])

    def output(self, page, output):
        "An output; a widget keeps what is stored of it, a figure first"
        output = nbformat.from_dict(output)
        for key in ("text",):
            if isinstance(output.get(key), list): output[key] = "".join(output[key])
        if "data" not in output: return output
        data = {mime: "".join(v) if isinstance(v, list) else v for mime, v in output["data"].items()}
        if WIDGET in data:
            known = self.state(page)
            if data[WIDGET].get("model_id") in known: data = {WIDGET: data[WIDGET]}
            else:
                data.pop(WIDGET)
                if set(data) == {"text/plain"}: data = {"text/markdown": ":::{note}\nA widget stands here in a running notebook; `make lab` opens it.\n:::"}
        if "text/markdown" in data: data["text/markdown"] = self.markdown(page, data["text/markdown"])
        output["data"] = data
        return output

    def state(self, page): return page.nb["metadata"].get("widgets", {}).get(STATE, {}).get("state", {})

    def cells(self, page):
        "The page's cells, its title first"
        lead = page.front.get("description", "")
        link = f'<p class="module"><code>bgrpo_nb.{page.name}</code> · <a href="{page.up}source/{page.name}.html">source</a></p>' if page.module else ""
        yield nbformat.v4.new_markdown_cell(f"# {page.front['title']}\n\n" + (f"*{lead}*\n\n" if lead and "`" not in lead else f"{lead}\n\n") + link, id="title")
        for cell in page.nb["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                page.has_h2 = page.has_h2 or re.search(r"^## ", text, re.MULTILINE) is not None
                if (text := self.markdown(page, text)).strip(): yield nbformat.v4.new_markdown_cell(text, id=cell["id"])
            elif cell.get("has_sd") or text.rstrip().split("\n")[-1].startswith("show_doc("):
                for output in cell["outputs"]:
                    yield nbformat.v4.new_markdown_cell(self.markdown(page, api("".join(output["data"]["text/markdown"]), page)), id=cell["id"])
            else: yield from self.code(page, cell)

    def write(self, target):
        "Every page, the images, and the sources of the modules"
        website = read_quarto()
        shown = sections(website["sidebar"]["contents"])
        listed = [name for _, names in shown for name in names]
        if missing := [n for n in listed if n not in self.pages]: fail(f"_quarto.yml lists {', '.join(missing)}, which is not under nbs")
        if unlisted := sorted(set(self.pages) - set(listed)): fail(f"in no section of _quarto.yml: {', '.join(unlisted)}; add a line for each")
        for page in self.pages.values():
            cells = list(self.cells(page))
            if str(page.path) == "index.ipynb": cells += [toctree(caption, [self.pages[n].target for n in names if n != "index.ipynb"]) for caption, names in shown]
            metadata = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}, "language_info": {"name": "python"}}
            if self.state(page): metadata["widgets"] = page.nb["metadata"]["widgets"]
            nb = nbformat.v4.new_notebook(cells=[c for c in cells if c], metadata=metadata)
            path = target / page.target
            path.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(nb, path)
        for file in self.root.rglob("*"):
            if file.suffix in (".svg", ".png", ".jpg", ".gif"):
                path = target / file.relative_to(self.root)
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, path)
        (target / "source").mkdir()
        for file in sorted((REPO / "bgrpo_nb").glob("[!_]*.py")): source_page(file.stem, target / "source")


def callout(match):
    kind, titled, heading, body = match.groups()
    title = titled or heading
    if title: return f"::::{{admonition}} {title}\n:class: {CALLOUTS.get(kind, 'note')}\n\n{body.strip()}\n::::"
    return f"::::{{{CALLOUTS.get(kind, 'note')}}}\n{body.strip()}\n::::"


def toctree(caption, targets):
    if not targets: return None
    lines = ["```{toctree}", ":hidden:", *([f":caption: {caption}"] if caption else []), "", *(t.removesuffix(".ipynb") for t in targets), "```"]
    return nbformat.v4.new_markdown_cell("\n".join(lines))


# Scripts

def vendor(wanted, target):
    "Scripts that pages need, from npm's packages; fetched once and kept under build/site/js"
    kept = WORK / "js"
    kept.mkdir(parents=True, exist_ok=True)
    for package in wanted:
        version, inside, name = PACKAGES[package]
        file = kept / f"{version}-{name}"
        if not file.exists():
            if not shutil.which("npm"):
                fail(f"npm is not on PATH; pages need {package}@{version} from it, once. Install Node.js with npm (Debian: apt-get install npm), and run this again")
            with tempfile.TemporaryDirectory() as folder:
                done = subprocess.run(["npm", "pack", "--silent", f"{package}@{version}"], cwd=folder, capture_output=True, text=True)
                if done.returncode: fail(f"`npm pack {package}@{version}` failed; is the registry in reach?\n{done.stderr.strip()}")
                with tarfile.open(next(Path(folder).glob("*.tgz"))) as tar: data = tar.extractfile(inside).read()
            part = file.with_suffix(f".{os.getpid()}")
            part.write_bytes(data)
            part.rename(file)
        shutil.copy(file, target / name)


def scripts_of(folder):
    "npm packages that staged pages need"
    texts = [f.read_text() for f in folder.rglob("*.ipynb")]
    needs = {"mathjax": any(re.search(r"\$|text/latex", t) for t in texts), "mermaid": any('class=\\"mermaid\\"' in t for t in texts),
             "@jupyter-widgets/html-manager": any(WIDGET in t for t in texts)}
    return [package for package, needed in needs.items() if needed]


# Sphinx's half

def finish(staged, out):
    "Staged pages, with style and scripts, -> HTML; a warning is an error"
    from sphinx.cmd.build import build_main
    (staged / "_static").mkdir()
    shutil.copy(REPO / "nbs" / "styles.css", staged / "_static")
    vendor(scripts_of(staged), staged / "_static")
    shutil.rmtree(out, ignore_errors=True)
    options = ["-q", "-W", "--keep-going", "-c", Path(__file__).parent, "-d", staged / ".doctrees", "-D", f"html_static_path={staged / '_static'}"]
    failed = build_main([str(o) for o in [*options, staged, out]])
    shutil.rmtree(Path(out).parent / "jupyter_execute", ignore_errors=True)   # myst-nb's copies of the outputs, beside the site
    if failed: fail("Sphinx warned (see above); the notebook named there has to be mended")


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
        def fault(message): faults.append(f"{page.relative_to(out)}: {message}")
        for tag, url in dict.fromkeys(tags.urls):
            parts = urlsplit(url)
            if parts.netloc and tag != "a": fault(f"{tag} is fetched from {url}")
            if parts.netloc or parts.scheme: continue
            target = page.parent.joinpath(unquote(parts.path)).resolve() if parts.path else page
            if not target.exists(): fault(f"{url} leads nowhere")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors: fault(f"{url} has no such anchor")
    return faults


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
    if faults := check(out): fail("\n".join(["links to mend:", *faults]))
    print(f"{len(list(out.rglob('*.html')))} pages in {out}")


if __name__ == "__main__": main()
