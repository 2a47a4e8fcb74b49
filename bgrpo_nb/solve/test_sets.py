"""Many policies on many test sets: each measured, beside the exact algorithm and the authors' published figures, and all of it written down.

Results are kept problem by problem as they come; `evaluate_files` goes on where it was stopped."""
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Sequence

import torch

from bgrpo_nb import __version__
from bgrpo_nb.solve.beam_filter import in_batches
from bgrpo_nb.algebra.problems import read_problems
from bgrpo_nb.solve.evaluation import METRICS, Report, compare, evaluate, name_of, wilson
from bgrpo_nb.solve.result_store import ResultStore, describe_file, policy_fingerprint
from bgrpo_nb.policy.model import load_model, load_tokenizer
from bgrpo_nb.base.run_folder import provenance
from bgrpo_nb.solve.evaluation_report import as_markdown, save

GREEDY, TEN_BEAMS, RELEASED, AFTER = "greedy_accuracy", "beam_accuracy", "the released model", "the model after BGRPO"
PUBLISHED = {f"{outer}_{inner}": [(GREEDY, solved, 300, RELEASED)] for outer, row in ((2, (147, 68, 26)), (3, (132, 66, 30)), (4, (146, 54, 29)))
             for inner, solved in zip((2, 3, 4), row)} # degrees -> metric, solved, of the first n problems, whose; arXiv:2508.15766
PUBLISHED["4_4"] += [(TEN_BEAMS, 50, 100, RELEASED), (TEN_BEAMS, 52, 100, AFTER), (GREEDY, 17, 100, RELEASED), (GREEDY, 12, 100, AFTER)]
_SETS = {"11105c77cdd75973": "2_2", "7dc45d7278703fd0": "2_3", "6febe96f9d08097a": "3_3", "81245063b491a0cf": "4_4"} # of the first 100 polynomials


def published_degrees(report: Report) -> str | None: # "outer_inner" of the authors' test set, None where the problems are others
    "Which of the authors' test sets this is"
    if len(report) < 100: return None
    first = hashlib.sha256("\n".join(r.expanded for r in report.rows[:100]).encode()).hexdigest()[:16]
    named = report.about.get("data", {}).get("name", "").removesuffix(".txt").partition("test_dataset_")[2]
    by_name = named in PUBLISHED and named not in _SETS.values() and set(report.by_degree()) == {named.replace("_", "∘")}
    return _SETS.get(first, named if by_name else None)


def published_figures(report: Report) -> list[dict]:
    "The authors' figures for these problems, each beside this report's on the same ones"
    out = []
    for metric, solved, n, whose in PUBLISHED.get(published_degrees(report), []):
        if n > len(report) or metric == TEN_BEAMS and report.settings["num_beams"] != 10: continue
        ours, (low, high), theirs = Report(report.rows[:n], report.settings), wilson(solved, n), {}
        theirs["value"], (theirs["low"], theirs["high"]) = ours.metrics[metric], ours.interval(metric)
        out.append(dict(metric=metric, n=n, whose=whose, published=solved / n, published_low=low, published_high=high, **theirs))
    return out


@dataclass
class Results:
    "Reports of policies on test sets"
    reports: dict[tuple[str, str], Report]          # (policy, test set) -> report
    about: dict = field(default_factory=dict)       # accounts

    def table(self) -> list[dict]: # one row for each policy, test set and metric: measured, exact or published
        "Every figure, tidy"
        rows = []
        def add(model, file, n, metric, value, low, high, source): rows.append(dict(model=model, file=file, n=n, metric=metric, value=value, low=low, high=high, source=source))
        for (model, file), r in self.reports.items():
            for found in r.table(): add(model, file, len(r), *found, "measured")
        for file, r in {file: r for (_, file), r in self.reports.items()}.items():
            if (solved := r.exact_solves()) is not None: add("exact algorithm", file, len(r), "exact_accuracy", solved / len(r), *wilson(solved, len(r)), "exact")
            for p in published_figures(r): add(p["whose"], file, p["n"], p["metric"], p["published"], p["published_low"], p["published_high"], "published")
        return rows

    def differences(self) -> list[dict]: # none where there is one policy
        "Every policy minus the first, on the same problems"
        base, out = next(iter(self.reports))[0], []
        for (model, file), r in self.reports.items():
            for metric in METRICS if model != base else ():
                d = compare(self.reports[base, file], r, metric)
                out.append(dict(model=model, baseline=base, file=file, metric=metric, difference=d.mean, low=d.low, high=d.high))
        return out

    def summary(self) -> dict:
        "All that tables and figures need, without the problems"
        first = next(iter(self.reports.values()))
        def one(model, file, r):
            own = [(w["k"], w["own"], *wilson(round(w["own"] * w["n"]), w["n"])) for w in r.own_widths()]
            parts = {k: {"n": len(p)} | {m: p.metrics[m] for m in METRICS} for k, p in r.by_degree().items()}
            return dict(model=model, file=file, n=len(r), apart=r.about.get("apart", False), fingerprint=r.about.get("model", {}).get("fingerprint"), data=r.about.get("data", {}),
                        by_width=r.by_width(), points=own, own_widths=r.own_widths(), places=r.rank_distribution, reasons=r.reasons(), degrees=parts)
        return dict(about=self.about, settings=first.settings, names={m: name_of(m, first.settings) for m in METRICS}, table=self.table(), differences=self.differences(),
                    published=[dict(model=model, file=file, **p) for (model, file), r in self.reports.items() for p in published_figures(r)],
                    reports=[one(model, file, r) for (model, file), r in self.reports.items()])

    def __str__(self): return "\n".join(f"{model}, {file}: {r}" for (model, file), r in self.reports.items())

    def __repr__(self): return f"Results of {len(self.reports)} reports\n{self}"

    def _repr_markdown_(self): return as_markdown(self.summary())


def evaluate_files(models: Sequence[str],   # bundled policies' names or folders
                   problems: Sequence[str], # files of problems, or folders of `.txt` files
                   out,                     # folder for results; what it keeps from an earlier run is not computed again
                   limit: int | None = None,      # only the first problems of each file
                   without_answers: bool = False, # files without answers are measured, too
                   progress: bool = False,
                   **settings) -> Results: # num_beams and more, as `evaluate` has them
    "Measure policies on test sets; resumable"
    files = {name: (path, read_problems(path, limit)) for name, path in short_names(test_sets(problems)).items()}
    for path, found in files.values():
        if not without_answers and not any(p.answer for p in found):
            raise ValueError(f"{path} holds no answers, so the inner degrees are not known; write lines `expanded ⁇ answer`, or add --without_answers to measure it all the same")
    policies = {name: (load_model(path, device="cpu"), load_tokenizer(path)) for name, path in short_names(models).items()}
    for model, tokenizer in policies.values():
        for _, found in files.values(): next(in_batches(found, tokenizer, "cpu", 400)) # unknown words are named before anything is computed
    out, reports, about = Path(out), {}, provenance(settings.get("seed", 0))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, (model, tokenizer) in policies.items():
        who = dict(name=name, fingerprint=policy_fingerprint(model, tokenizer))
        model.to(device)
        for file, (path, found) in files.items():
            data = describe_file(path, len(found))
            store = ResultStore(out / "store", model=who["fingerprint"], data=data["sha256"], version=__version__)
            title = f"{name}, {file} ({len(reports) + 1} of {len(policies) * len(files)})"
            report = evaluate(model, tokenizer, found, store=store, progress=progress and title, **settings)
            report.about = about | dict(model=who, data=data)
            reports[name, file] = report
            if (apart := report.without_trivial(found)) is not None:
                reports[name, f"{file}, not trivial"] = Report(apart.rows, apart.settings, report.about | {"apart": True})
        model.to("cpu")
    for (name, file), report in reports.items(): report.to_json(out / "reports" / name / f"{file}.json")
    results = Results(reports, about)
    save(results.summary(), out)
    return results


def test_sets(paths: Sequence[str]) -> list[Path]:
    "Files as they are, of folders the `.txt` files in order"
    out = []
    for path in map(Path, paths):
        found = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not found: raise FileNotFoundError(f"the folder {path} holds no .txt file of problems; `bgrpo generate {path / '2_2.txt'}` makes one")
        out += found
    return list(dict.fromkeys(out))


def short_names(paths: Sequence) -> dict[str, object]: # name -> path
    "The shortest ends of paths that tell them apart"
    paths, depth = list(dict.fromkeys(map(str, paths))), 1
    def tail(p): return "/".join(p.parts[-depth - (p.name == "policy"):]).removesuffix(".txt")
    def names(): return [tail(Path(p).resolve()) for p in paths]
    while len(set(names())) < len(paths) and depth < 20: depth += 1
    return dict(zip(names(), paths))
