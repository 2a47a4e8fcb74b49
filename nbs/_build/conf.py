"Sphinx's settings for `build_site.py`; the title is that of _quarto.yml."
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from tables import mark_all

NBS = Path(__file__).resolve().parents[1]

project = yaml.safe_load((NBS / "_quarto.yml").read_text())["website"]["title"]
html_title = project
language = "en"
extensions = ["myst_nb", "sphinx.ext.mathjax"]
exclude_patterns = ["_static", "images"]

nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_merge_streams = True
nb_ipywidgets_js = {"widgets.js": {}}
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
mathjax_path = "mathjax.js"
mathjax3_config = {"svg": {"scale": 0.94}}

html_theme = "furo"
html_css_files = ["styles.css"]
html_favicon = str(NBS / "images" / "favicon.svg")
html_extra_path = [str(NBS / "llms.txt")]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": False}   # arrow keys move sliders
pygments_style = "friendly"
pygments_dark_style = "github-dark"

# Drawn once the page is there: the script is as large as all else together
DIAGRAMS = """addEventListener("load", () => {
  const script = Object.assign(document.createElement("script"), {src: "%s"});
  script.onload = () => { mermaid.initialize({startOnLoad: false, theme: "neutral"}); mermaid.run(); };
  document.head.append(script);
});"""
# Widgets call MathJax 2; the page's MathJax 3 has drawn its formulas without being asked
WIDGETS = """{
  let mathjax;
  const set = m => { mathjax = m; m.Hub = {Queue() {}}; };
  Object.defineProperty(window, "MathJax", {get: () => mathjax, set});
}"""


def complete(app, pagename, templatename, context, doctree):
    "What only some pages need: classes for the cells of tables, scripts"
    body = context.get("body", "")
    if "<table" in body: context["body"] = mark_all(body)
    if 'class="mermaid"' in body: app.add_js_file(None, body=DIAGRAMS % context["pathto"]("_static/mermaid.js", 1))
    if "jupyter.widget-view" in body: app.add_js_file(None, body=WIDGETS, priority=100)


def setup(app): app.connect("html-page-context", complete)
