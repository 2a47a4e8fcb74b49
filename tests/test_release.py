"""What is declared is what is imported; an extra that is missing is asked for by its command; a release is built and tried."""
import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
PACKAGE = REPO / "bgrpo_nb"

# The names under which packages are imported, where they differ from those under which they are installed
INSTALLED_AS = {"yaml": "pyyaml", "sklearn": "scikit-learn", "flint": "python-flint", "IPython": "ipywidgets",
                "psycopg": "psycopg", "traitlets": "ipywidgets", "PIL": "matplotlib", "huggingface_hub": "transformers"}
EXTRAS_OF = {"study": {"study", "plots", "wandb"}, "show": {"widgets"}, "recipes": {"wandb", "widgets"},
             "base": {"plots"}, "policy": {"gpu", "lora"}}


@pytest.fixture(scope="module")
def groups():
    "Group -> names of packages, as setup.py reads them"
    import setuptools
    called = {}
    before, setuptools.setup = setuptools.setup, called.update
    try: runpy.run_path(str(REPO / "setup.py"))
    finally: setuptools.setup = before
    found = called["extras_require"] | {"": called["install_requires"]}
    return {group: {re.split(r"[\[<>=~!]", req)[0] for req in reqs} for group, reqs in found.items()}, called


def imports(path):
    "Third-party packages that a module imports, anywhere in it"
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level: names = [node.module]
        for name in names:
            top = name.partition(".")[0]
            if top not in sys.stdlib_module_names and top != "bgrpo_nb": yield top


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_import_is_declared(path, groups):
    groups, _ = groups
    floor = path.relative_to(PACKAGE).parts[0]
    allowed = set(groups[""]).union(*(groups[extra] for extra in EXTRAS_OF.get(floor, ())))
    lacking = {name for name in imports(path) if INSTALLED_AS.get(name, name) not in allowed}
    assert not lacking


def test_all_installs_every_extra_but_the_gpus(groups):
    groups, _ = groups
    for name, reqs in groups.items():
        if name not in ("", "gpu"): assert reqs <= groups["all"], name


def test_the_users_packages_are_declared(groups):
    groups, _ = groups
    declared = set().union(*groups.values())
    assert {"nbdev", "jupyterlab", "torch", "transformers", "trl", "sympy", "wandb", "ipywidgets", "flash-attn"} <= declared


def test_links_of_the_index_page_lead_somewhere(groups):
    "On a package index a link into the repository leads nowhere"
    text = groups[1]["long_description"]
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links and all(link.startswith(("http", "#")) for link in links)
    assert "```python" in text and "bgrpo demo" in text


HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden}: raise ModuleNotFoundError(name=name)
sys.meta_path.insert(0, Hidden())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.partition(".")[0] in {hidden} else real(name, *a)
"""


def without(hidden, code):
    "Runs code in a process that has not these packages"
    return subprocess.run([sys.executable, "-W", "always", "-c", HIDE.format(hidden=set(hidden)) + code],
                          capture_output=True, text=True)


@pytest.mark.parametrize("hidden, imported, extra", [
    (["optuna"], "bgrpo_nb.study.analysis", "study"),
    (["sklearn"], "bgrpo_nb.study", "study"),
    (["ipywidgets"], "bgrpo_nb.show", "widgets"),
])
def test_a_missing_extra_is_asked_for_by_its_command(hidden, imported, extra):
    done = without(hidden, f"import {imported}")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].endswith(f"pip install 'bgrpo_nb[{extra}]'")


def test_a_figure_that_cannot_be_drawn_costs_no_result(tmp_path):
    done = without(["matplotlib"], f"""
from bgrpo_nb.solve.evaluation_report import draw
print(draw(dict(reports=[]), {str(tmp_path)!r}))
from bgrpo_nb.base.plotting import use_style
with use_style(): pass
""")
    assert done.stdout.strip() == "[]"
    last = done.stderr.strip().splitlines()[-1]
    assert "UserWarning: figures are left out" in done.stderr and "MissingExtra" in last and "bgrpo_nb[plots]" in last


def test_the_lean_package_needs_no_extra():
    "Training, search and verification import none of them"
    extras = ["optuna", "sklearn", "matplotlib", "ipywidgets", "wandb", "IPython"]
    done = without(extras, "import bgrpo_nb.recipes.train, bgrpo_nb.recipes.sft, bgrpo_nb.cli, bgrpo_nb.solve.decomposition")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_a_release_is_built_installed_and_tried(tmp_path):
    done = subprocess.run([REPO / ".ci/release", tmp_path / "dist"], capture_output=True, text=True,
                          env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    names = {path.suffix for path in (tmp_path / "dist").iterdir()}
    assert names == {".whl", ".gz", ".json", ".txt"}


def mypy(*files):
    done = subprocess.run([sys.executable, "-m", "mypy", *files], cwd=REPO, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_a_type_checker_accepts_right_use_of_the_public_names():
    pytest.importorskip("mypy")
    assert mypy("tests/typed_use.py").startswith("Success")


@pytest.mark.parametrize("wrong", [
    "verify('^ a P 4', 5)", "verify_batch('a', ['a'])[0].no_such_field", "write_problems([], 'problems.txt')",
    "x: int = decompose_exact('a')", "no_such_name", "beam_search(None, None, num_beams='4')",
])
def test_and_finds_what_is_wrong(wrong, tmp_path):
    pytest.importorskip("mypy")
    path = tmp_path / "wrong.py"
    names = "verify, verify_batch, write_problems, decompose_exact, beam_search"
    path.write_text(f"from bgrpo_nb import {names if wrong != 'no_such_name' else wrong}\n{wrong}\n")
    assert "Found" in mypy(path)


@pytest.mark.parametrize("package", ["bgrpo_nb", "bgrpo_nb.show"])
def test_a_stub_lists_each_name_that_it_imports(package):
    from importlib import import_module
    stub = ast.parse((REPO / package.replace(".", "/") / "__init__.pyi").read_text())
    listed = next(ast.literal_eval(node.value) for node in stub.body if isinstance(node, ast.Assign))
    assert sorted(listed) == sorted(import_module(package).__all__)
    assert all(hasattr(import_module(package), name) for name in listed)
