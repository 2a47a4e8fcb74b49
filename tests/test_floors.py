"The house: folders are floors, imports only point down, and no floor loads what it must not know."
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO / "nbs" / "_build"))
import house

PACKAGE = REPO / "bgrpo_nb"
FLOORS = [*house.FOLDERS, "__main__"]
UNKNOWN = { # what a floor knows nothing of
    "algebra": {"torch", "transformers", "trl"},
    "search": {"trl", "bgrpo_nb.algebra"},
    "policy": {"trl", "bgrpo_nb.algebra"},
    "learn": {"bgrpo_nb.algebra"},
    "solve": {"trl", "bgrpo_nb.learn.trainer", "bgrpo_nb.learn.gradients", "bgrpo_nb.learn.trl_batching",
              "bgrpo_nb.learn.trie"},
    "recommend": {"trl", "bgrpo_nb.algebra", "bgrpo_nb.solve", "bgrpo_nb.learn.trainer", "bgrpo_nb.learn.gradients"},
    "study": {"trl", "bgrpo_nb.recipes", "bgrpo_nb.learn", "bgrpo_nb.search"},
    "show": {"trl", "bgrpo_nb.learn.trainer", "bgrpo_nb.learn.gradients", "bgrpo_nb.recipes", "bgrpo_nb.study.sweeps",
             "bgrpo_nb.study.trials"},
}
MODULES = sorted(p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
INITS = sorted(p for p in PACKAGE.glob("*/__init__.py"))


def imported(module):
    "Every dotted name that a module imports, at whatever depth of its code"
    return house.imported(PACKAGE / module)


def floor_of(module): return module.parts[0].removesuffix(".py")


def covers(known, name): return name == known or name.startswith(known + ".")


def cycles(edges):
    "Modules that import one another, directly or through others"
    def reached(start):
        seen, todo = set(), list(edges.get(start, ()))
        while todo:
            if (module := todo.pop()) in seen: continue
            seen.add(module)
            todo += edges.get(module, ())
        return seen
    return [module for module in edges if module in reached(module)]


def test_every_module_is_on_a_floor():
    assert MODULES and {floor_of(m) for m in MODULES} == set(FLOORS)
    assert {p.parent.name for p in INITS} == set(FLOORS) - {"cli", "__main__"}, "every folder says in its __init__ what it is"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_point_down(module):
    floor = floor_of(module)
    above = {f"bgrpo_nb.{name}" for name in FLOORS[FLOORS.index(floor) + 1:]}
    up = sorted(n for n in imported(module) if any(covers(a, n) for a in above))
    assert not up, f"{module} imports from a floor above its own: {up}"


def test_no_two_modules_import_each_other():
    names = {"bgrpo_nb." + ".".join(m.with_suffix("").parts): m for m in MODULES}
    edges = {name: {n for n in imported(m) if n in names} for name, m in names.items()}
    assert cycles({"a": {"b"}, "b": {"a"}, "c": {"a"}}) == ["a", "b"]
    assert not cycles(edges)


@pytest.mark.parametrize("module", [m for m in MODULES if floor_of(m) in UNKNOWN], ids=str)
def test_a_floor_names_nothing_it_must_not_know(module):
    known = sorted(n for n in imported(module) if any(covers(u, n) for u in UNKNOWN[floor_of(module)]))
    assert not known, f"{module} must know nothing of {known}"


@pytest.mark.parametrize("module,absent", [
    ("bgrpo_nb", ("torch", "transformers", "trl")),
    *((f"bgrpo_nb.base.{name}", ("torch", "transformers", "trl", "matplotlib", "wandb"))
      for name in ("assets", "files", "plotting", "processes", "run_folder", "settings")),
    *((f"bgrpo_nb.algebra.{name}", ("torch", "transformers", "trl", "sympy"))
      for name in ("polynomial", "notation", "exact_decomposition", "problems")),
    ("bgrpo_nb.search.generation", ("trl",)),
    ("bgrpo_nb.policy.model", ("trl",)),
    ("bgrpo_nb.learn.rewards", ("torch", "transformers", "trl")),
    ("bgrpo_nb.solve.evaluation", ("trl", "ipywidgets")),
    ("bgrpo_nb.study.launcher", ("torch", "transformers", "trl", "wandb")),
    ("bgrpo_nb.study.analysis", ("torch", "transformers", "trl", "optuna", "wandb")),
    ("bgrpo_nb.show.run_explorers", ("trl", "optuna")),
    ("bgrpo_nb.cli", ("torch", "transformers", "trl", "ipywidgets")),
])
def test_importing_loads_no_more_than_it_says(module, absent):
    code = f"import sys, {module}; print(sorted(set({absent!r}) & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert loaded == "[]", f"import {module} loads {loaded}"


def test_public_names_come_from_the_package_itself():
    names = """verify verify_batch same_inner canonical_inner decompose_exact PrefixError Problem read_problems write_problems
        generate_problems generate_multivariate generate_on_singlets filter_by_degree mix load_tokenizer PRESETS load_model
        convert_checkpoint beam_search sample greedy evaluate roll_out trie_logps BGRPOConfig BGRPOTrainer decompose"""
    code = f"""
import sys, bgrpo_nb
names = {names.split()!r}
assert set(names) <= set(dir(bgrpo_nb)), set(names) - set(dir(bgrpo_nb))
assert "torch" not in sys.modules
for name in names: assert getattr(bgrpo_nb, name).__class__
from bgrpo_nb import *
assert verify("^ a P 4", "^ a P 2")
try: bgrpo_nb.no_such_name
except AttributeError as e: print(e)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "No bgrpo_nb attribute no_such_name"
