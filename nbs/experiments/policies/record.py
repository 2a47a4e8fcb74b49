"""What the bundled policies can do, as the file that the tutorial loads.

    python nbs/experiments/policies/record.py

`small` on nine sets of 300 generated problems, and on those of the authors' sets that lie in $BGRPO_SHARED (../shared). Several variables: 300
generated problems, and the authors' problems rewritten in our order of terms: how many the first, the ten best and all of 25 beams solve. One thread;
what was computed of the nine degrees is kept in runs/policies and not computed again."""
import os
from pathlib import Path

import torch

from bgrpo_nb.solve.beam_filter import search_problems
from bgrpo_nb.algebra.problems import Problem, generate_multivariate, generate_problems, read_problems, write_problems
from bgrpo_nb.solve.evaluation import METRICS, evaluate
from bgrpo_nb.policy.model import load_model, load_tokenizer
from bgrpo_nb.algebra.notation import from_text
from bgrpo_nb.algebra.polynomial import verify
from bgrpo_nb.base.files import write_json
from bgrpo_nb.base.run_folder import provenance
from bgrpo_nb.solve.test_sets import evaluate_files, published_figures

HERE, OUT = Path(__file__).parent, Path("runs/policies")
SHARED = Path(os.environ.get("BGRPO_SHARED", "../shared")) / "data/published"
DEGREES, N, SEED = [f"{o}_{i}" for o in (2, 3, 4) for i in (2, 3, 4)], 300, 50_000


def figures(report):
    return {m: [report.metrics[m], *report.interval(m)] for m in METRICS} | {"n": len(report), "reasons": {k: sum(v) for k, v in report.reasons().items()}}


def nine_degrees():
    for d in DEGREES:
        if not (path := OUT / f"sets/{d}.txt").exists(): write_problems(path, generate_problems(N, *map(int, d.split("_")), seed=SEED))
    published = sorted(SHARED.glob("test_dataset_*.txt"))
    reports = evaluate_files(["small"], [OUT / "sets", *published], OUT / "small", limit=N, domain="ZZ", progress=True).reports
    reports = {file: r for (_, file), r in reports.items() if not file.endswith("not trivial")}
    return {"figures": {file: figures(r) for file, r in reports.items()}, "authors": {file: found for file, r in reports.items() if (found := published_figures(r))}}


def several_variables():
    model, tokenizer, found = load_model("multivariate", device="cpu"), load_tokenizer("multivariate"), {}
    made = generate_multivariate(N, 3, 2, 2, seed=SEED, canonical=True)
    found["generated"] = figures(evaluate(model, tokenizer, made, domain="ZZ", progress="generated"))
    if (path := SHARED / "multi_variable_test.txt").is_file():
        theirs = [(p, Problem(from_text(p.expanded), "")) for p in read_problems(path)]
        searched, rows = search_problems(model, tokenizer, [q for _, q in theirs], 25, "ZZ", max_new_tokens=60, progress="published"), []
        for (p, _), s in zip(theirs, searched):
            truth = verify(p.expanded, p.answer, "ZZ").reason
            rows.append((truth if truth == "trivial" else "not trivial", s.first_valid, *(v.reason for v in s.verdicts[:10])))
        found["published"] = {kind: {"n": len(of), "first": sum(r[1] == 1 for r in of), "ten": sum(bool(r[1]) and r[1] <= 10 for r in of), "all": sum(bool(r[1]) for r in of),
                                     "reasons": {w: sum(r[2:].count(w) for r in of) for w in sorted({w for r in of for w in r[2:]})}}
                              for kind in ("trivial", "not trivial") if (of := [r for r in rows if r[0] == kind])}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_json(HERE / "record.json", {"seed": SEED, **nine_degrees(), "several_variables": several_variables(), **provenance(SEED)})
