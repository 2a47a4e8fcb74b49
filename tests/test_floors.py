"The house stands on its floors: imports only point down, and no floor loads what it must not know."
import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "bgrpo_nb"
FLOORS = ["polynomial", "notation", "data", "model", "beam_tree", "packed", "generation", "processes", "runs", "sft", "rewards", "beam_filter", "kept", "figures", "tables",
          "decomposition", "evaluation", "testsets", "trl_batching", "exact_resume", "trainer", "sweeps", "trials", "sweep_launcher", "run_sources", "run_figures", "run_report",
          "analysis", "widgets", "run_explorers", "cli", "__main__"]
UNKNOWN = {  # what a floor knows nothing of (design: the house)
    "polynomial": {"torch", "transformers", "trl"},
    "notation": {"torch", "transformers", "trl"},
    "data": {"torch", "transformers", "trl"},
    "model": {"trl", "bgrpo_nb.data", "bgrpo_nb.notation", "bgrpo_nb.polynomial"},
    **dict.fromkeys(("beam_tree", "generation"), {"trl", "bgrpo_nb.polynomial", "bgrpo_nb.notation", "bgrpo_nb.data"}),
    "sft": {"trl"},
    "rewards": {"torch", "transformers", "trl", "bgrpo_nb.model", "bgrpo_nb.generation"},
    **dict.fromkeys(("widgets", "run_explorers"), {"trl", "bgrpo_nb.trainer", "bgrpo_nb.sweeps", "bgrpo_nb.trials"}),
    "beam_filter": {"trl"},
    "evaluation": {"trl"},
    **dict.fromkeys(("run_sources", "run_figures", "run_report", "analysis"), {"trl", "bgrpo_nb.trainer", "bgrpo_nb.sweeps", "bgrpo_nb.trials"}),
    **dict.fromkeys(("trl_batching", "exact_resume"), {"bgrpo_nb.polynomial", "bgrpo_nb.notation", "bgrpo_nb.data", "bgrpo_nb.rewards"}),
}
MODULES = [m for m in FLOORS if (PACKAGE / f"{m}.py").exists()]


def imported(path):
    "Every dotted name that a file imports, at whatever depth of its code"
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ("bgrpo_nb." if node.level else "") + (node.module or "")
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def covers(known, name): return name == known or name.startswith(known + ".")


def test_every_module_has_a_floor():
    found = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__", "__main__", "_modidx"}
    assert found and found <= set(FLOORS), f"modules without a floor: {sorted(found - set(FLOORS))}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    above = {f"bgrpo_nb.{m}" for m in FLOORS[FLOORS.index(module):]}
    up = sorted(n for n in imported(PACKAGE / f"{module}.py") if any(covers(a, n) for a in above))
    assert not up, f"{module} imports from its own floor or above: {up}"


@pytest.mark.parametrize("module", [m for m in MODULES if m in UNKNOWN])
def test_a_floor_names_nothing_it_must_not_know(module):
    known = sorted(n for n in imported(PACKAGE / f"{module}.py") if any(covers(u, n) for u in UNKNOWN[module]))
    assert not known, f"{module} must know nothing of {known}"


@pytest.mark.parametrize("module,absent", [
    ("bgrpo_nb.run_explorers", ("trl", "optuna")), ("bgrpo_nb.evaluation", ("ipywidgets",)), ("bgrpo_nb.cli", ("ipywidgets",)),
    ("bgrpo_nb", ("torch", "transformers", "trl")), ("bgrpo_nb.polynomial", ("torch", "transformers", "trl", "sympy")),
    ("bgrpo_nb.notation", ("torch", "transformers", "trl", "sympy")), ("bgrpo_nb.data", ("torch", "transformers", "trl", "sympy")), ("bgrpo_nb.generation", ("trl",)),
    ("bgrpo_nb.rewards", ("torch", "trl")), ("bgrpo_nb.sweep_launcher", ("torch", "transformers", "trl", "wandb")), ("bgrpo_nb.evaluation", ("trl",)),
    ("bgrpo_nb.analysis", ("trl", "optuna", "wandb")), ("bgrpo_nb.cli", ("torch", "transformers", "trl")),
])
def test_importing_loads_no_more_than_it_says(module, absent):
    code = f"import sys, {module}; print(sorted(set({absent!r}) & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert loaded == "[]", f"import {module} loads {loaded}"
