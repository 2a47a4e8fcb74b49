"""What the repository says of itself is true: README's code runs, its links lead somewhere, its map is that of the imports.

Executed as they stand: the Python blocks, in order, in one namespace (the training run is cut to one step of six prompts), and their output is compared with
README's; every `bgrpo` command of the terminal block, with fewer problems and one step. Parsed, and their targets and
flags looked up: `make ...`, `pip install ...`."""
import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO / "nbs" / "_build"))
import house

PACKAGE = REPO / "bgrpo_nb"
README = (REPO / "README.md").read_text()
QUARTO = (REPO / "_quarto.yml").read_text()
FENCES = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in FENCES if language == "python"]
COMMANDS = [shlex.split(line, comments=True) for language, code in FENCES if language == "sh" for line in code.splitlines() if line.strip()]

RUN_BLOCKS = """
import ast, json, sys
import bgrpo_nb, bgrpo_nb.learn.config as config
class OneStep(config.BGRPOConfig):     # the same run, one small step long
    def __init__(self, **settings):
        super().__init__(**settings | dict(max_steps=1, prompts_per_step=6, use_cpu=True, disable_tqdm=True, save_strategy="no"))
config.BGRPOConfig = OneStep
bgrpo_nb.BGRPOConfig = OneStep
names, values = {}, []
for block in json.load(sys.stdin):
    body = ast.parse(block).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "README", "exec"), names)
    values.append(repr(eval(compile(ast.Expression(last.value), "README", "eval"), names)) if last else None)
json.dump(values, open("values.json", "w"))
"""

RUN_COMMANDS = """
import json, sys
from bgrpo_nb.cli import main
for words in json.load(sys.stdin):
    status = main(words)
    if status: sys.exit(f"bgrpo {' '.join(words)} ended with {status}")
"""


def run(code, given, folder):
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(given), cwd=folder, env=environment, text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_python_blocks_run_and_print_what_readme_says(tmp_path):
    assert len(PYTHON) >= 2 and any(".train()" in block for block in PYTHON)
    run(RUN_BLOCKS, PYTHON, tmp_path)
    values = json.loads((tmp_path / "values.json").read_text())
    shown = re.findall(r"^```python\n.*?^```\n\n((?:    [^\n]*\n)+)", README, re.MULTILINE | re.DOTALL)
    assert len(shown) == 1, "one block of README shows its output"
    assert ast.literal_eval(values[0]) == ast.literal_eval(shown[0].strip())


SMALLER = {"generate": ["--n", "40"], "filter": [], "train": ["--max_steps", "1", "--prompts_per_step", "2", "--num_generations", "4", "--held_out", "4",
           "--num_samples", "2", "--use_cpu", "True"], "evaluate": ["--limit", "2"], "sweep": [], "analyze": []}
SMALLER_SWEEP = dict(learning_rate=5e-5, seed=0, num_problems=45, held_out=4, max_steps=1, eval_steps=1, save_steps=1, num_generations=4, prompts_per_step=2,
                     num_samples=2, wide_beams=10)


def test_the_terminals_commands_run_one_after_the_other(tmp_path):
    commands = [words[1:] for words in COMMANDS if words[0] == "bgrpo"]
    assert [words[0] for words in commands] == list(SMALLER)
    for words in commands:
        if "--n" in words: del words[words.index("--n"):words.index("--n") + 2]
        words[:] = ["problems.txt" if w == "FILE" else w for w in words] + SMALLER[words[0]]
    (tmp_path / "configs/sweeps").mkdir(parents=True)
    sweep = yaml.safe_load((REPO / "configs/sweeps/small.yaml").read_text())
    sweep["parameters"] |= {name: {"value": value} for name, value in SMALLER_SWEEP.items()}
    (tmp_path / "configs/sweeps/small.yaml").write_text(yaml.safe_dump(sweep))
    run(RUN_COMMANDS, commands, tmp_path)
    assert len(list((tmp_path / "runs/sweeps/small/trials").glob("*/result.json"))) == 2 and (tmp_path / "runs/sweeps/small/analysis/report.html").is_file()
    assert (tmp_path / "hard.txt").read_text().strip() and (tmp_path / "runs/bgrpo/result.json").is_file()


@pytest.mark.parametrize("target", sorted({w for words in COMMANDS if words[0] == "make" for w in words[1:]} | set(re.findall(r"`make (\w+)`", README))))
def test_make_knows_its_targets(target):
    assert re.search(rf"^{target}:", (REPO / "Makefile").read_text(), re.MULTILINE), f"Makefile has no target {target}"


def test_the_command_without_make_names_what_exists():
    words = shlex.split(re.search(r"`(pip install [^`]*)`", README).group(1))
    assert (REPO / words[words.index("-c") + 1]).is_file()
    extras = re.findall(r"^(\w+)_requirements", (REPO / "settings.ini").read_text(), re.MULTILINE)
    assert set(re.search(r"\[(.*)\]", words[-1]).group(1).split(",")) <= {*extras, "all"}


def test_links_lead_somewhere():
    links = [url for url in re.findall(r"\]\(([^)\s]+)\)", README) if not url.startswith(("http:", "https:", "#"))]
    assert len(links) > 10 and not [url for url in links if not (REPO / url.split("#")[0]).exists()]


def test_the_evidence_is_drawn_from_the_recordings(tmp_path):
    drawn = tmp_path / "evidence.svg"
    subprocess.run([sys.executable, REPO / "nbs/experiments/evidence.py", drawn], check=True, env=os.environ | {"PYTHONPATH": str(REPO)})
    assert drawn.read_text() == (REPO / "nbs/images/evidence.svg").read_text(), "run nbs/experiments/evidence.py"


def test_every_page_of_the_site_is_linked():
    listed = set(re.findall(r"- +(\S+\.ipynb)", QUARTO)) - {"index.ipynb"}
    assert listed and not [page for page in listed if f"(nbs/{page})" not in README], "add it to the tables of nbs/index.ipynb"


def test_the_map_is_that_of_the_imports():
    (drawn,) = (code for language, code in FENCES if language == "mermaid")
    assert drawn.strip() == house.diagram(), "run make export"


def test_the_citation_is_the_papers_and_of_this_version():
    cited = yaml.safe_load((REPO / "CITATION.cff").read_text())
    paper = cited["preferred-citation"]
    assert paper["title"] in " ".join(README.split()) and "2508.15766" in paper["url"]
    assert all(f"{a['given-names']} {a['family-names']}" in README for a in paper["authors"])
    assert cited["version"] == re.search(r'__version__ = "(.*)"', (PACKAGE / "__init__.py").read_text()).group(1)
    assert f"## {cited['version']}" in (REPO / "CHANGELOG.md").read_text()


def test_hooks_name_what_exists():
    hooks = [hook for repo in yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text())["repos"] for hook in repo["hooks"]]
    for words in (shlex.split(hook["entry"]) for hook in hooks):
        if words[0] == "make": assert re.search(rf"^{words[-1]}:", (REPO / "Makefile").read_text(), re.MULTILINE)
        else: assert (REPO / words[-1]).is_file()
