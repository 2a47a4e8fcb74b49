"""What an evaluation of test sets writes, made from its summary alone: CSV, Markdown and figures.

`bgrpo plot` redraws the figures of an evaluation from its `results.json` with this module, without torch."""
import csv
import io
from pathlib import Path

from bgrpo_nb.base.files import write_json, write_text
from bgrpo_nb.base.plotting import can_draw
from bgrpo_nb.solve.evaluation_figures import WORDS, plot_degrees, plot_places, plot_reasons, plot_widths


def save(summary, folder):
    "Write `results.json`, `results.csv`, `results.md` and `plots/`"
    folder = Path(folder)
    write_json(folder / "results.json", summary)
    write_text(folder / "results.csv", as_csv(summary["table"]))
    write_text(folder / "results.md", as_markdown(summary))
    draw(summary, folder / "plots")


def was_evaluation(folder):
    "Whether an earlier version, which wrote no mark, made this folder"
    names = {path.name for path in Path(folder).iterdir()}
    return "store" in names and names <= {"store", "plots", "reports", "results.json", "results.csv", "results.md"}


def as_csv(table) -> str: # rows with the same keys
    "Comma-separated values with a line of names"
    out = io.StringIO()
    writer = csv.DictWriter(out, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()


# The page

def as_markdown(summary) -> str:
    "The whole evaluation as a page; every value with its 95 % interval"
    parts = ["# Evaluation", _conditions(summary)]
    for file in _unique(report["file"] for report in summary["reports"]):
        parts += [f"## {file}", _data(summary, file), _metrics_table(summary, file)]
    if summary["differences"]: parts += _differences(summary)
    if summary["published"]: parts += ["## Beside the authors' published figures", _published(summary)]
    parts += ["## The k best of one wide search are not a search of width k", _widths(summary)]
    parts += ["## Why beams fail", _reasons(summary)]
    parts.append("Figures: `plots/degrees.png`, `plots/widths.png`, `plots/places.png`, `plots/reasons.png`.")
    return "\n\n".join(parts) + "\n"


def _conditions(summary):
    "By which rule, with which settings and code it was measured"
    settings, about = summary["settings"], summary["about"]
    coefficients = "integer" if settings["domain"] == "ZZ" else "rational"
    rule = f"{coefficients} outer polynomial" + (", trivial answers count" if settings["allow_trivial"] else "")
    torch_version = about.get("versions", {}).get("torch")
    return (f"Rule: {rule}. Temperature of the samples {settings['temperature']}, seed {settings['seed']}. "
            "Values with 95 % intervals: Wilson's for shares, BCa bootstrap for the beam rank score. "
            f"Commit {about.get('commit')}, {about.get('date')}, torch {torch_version}.")


def _data(summary, file):
    data = next(report["data"] for report in summary["reports"] if report["file"] == file)
    return f"{data['name']}, sha256 {data['sha256'][:16]}…, the first {data['n']} problems."


def _metrics_table(summary, file):
    "One test set: a row for each policy, and one for the exact algorithm"
    found = {} # (model, n) -> {metric: cell}
    for row in summary["table"]:
        if row["file"] == file and row["source"] != "published":
            cell = _cell(row["value"], row["low"], row["high"], row["metric"])
            found.setdefault((row["model"], row["n"]), {})[row["metric"]] = cell
    metrics = ["exact_accuracy", *summary["names"]]
    rows = [[model, n, *(cells.get(metric, "") for metric in metrics)] for (model, n), cells in found.items()]
    return _table(["", "n", "exact", *summary["names"].values()], rows)


def _differences(summary):
    "Every policy minus the first, problem by problem"
    differences = summary["differences"]
    rows = {} # (model, file) -> cells
    for d in differences:
        cells = rows.setdefault((d["model"], d["file"]), [d["model"], d["file"]])
        cells.append(_cell(d["difference"], d["low"], d["high"], d["metric"], "+"))
    return [f"## Differences from {differences[0]['baseline']}",
            "Paired problem by problem. Where an interval contains 0, chance could explain the difference.",
            _table(["", "test set", *summary["names"].values()], rows.values())]


def _published(summary):
    "The authors' figures beside ours, on the same problems"
    note = "Both sides are measured on the same problems: the first n of the set."
    if summary["settings"]["domain"] != "ZZ":
        note += (" The authors count integer outer polynomials alone, this evaluation counts rational ones too;"
                 " measure with `--domain ZZ` to compare.")
    rows = []
    for p in summary["published"]:
        ours = _cell(p["value"], p["low"], p["high"])
        theirs = _cell(p["published"], p["published_low"], p["published_high"])
        rows.append([p["model"], p["file"], p["n"], summary["names"][p["metric"]], ours, p["whose"], theirs])
    header = ["", "test set", "n", "metric", "measured here", "published for", "published"]
    return f"{note}\n\n{_table(header, rows)}"


def _widths(summary):
    "Searches of width k beside the k best beams of the widest search"
    note = ("Share solved by a search of width k and by the k best beams of the widest search, on the same problems, "
            "and the paired difference. The last column counts the problems on which the two disagree.")
    rows = []
    for report in summary["reports"]:
        for w in report["own_widths"]:
            difference = _cell(w["difference"], w["low"], w["high"], sign="+")
            rows.append([report["model"], report["file"], w["n"], w["k"], f"{w['own']:.1%}", f"{w['top_k']:.1%}",
                         difference, w["differ"]])
    header = ["", "test set", "n", "k", "search of width k", "k best of the widest", "difference", "disagree"]
    return f"{note}\n\n{_table(header, rows)}"


def _reasons(summary):
    "Shares of the verdicts' reasons, all places together"
    reports = summary["reports"]
    seen = [reason for reason in WORDS if any(reason in report["reasons"] for report in reports)]
    rows = []
    for report in reports:
        beams = {reason: sum(counts) for reason, counts in report["reasons"].items()}
        total = sum(beams.values())
        shares = [f"{beams.get(reason, 0) / total:.1%}" for reason in seen]
        rows.append([report["model"], report["file"], *shares])
    return "Verdicts on the beams, all places together.\n\n" + _table(["", "test set", *map(WORDS.get, seen)], rows)


def _table(header, rows): # the first column is text, the others are numbers
    "A table in Markdown"
    escaped = [[str(cell).replace("|", "\\|") for cell in row] for row in [header, *rows]]
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    alignment = "|---" + "|---:" * (len(header) - 1) + "|"
    return "\n".join([lines[0], alignment, *lines[1:]])


def _cell(value, low, high, metric="", sign=""):
    "A share in per cent or a score, with its interval"
    form = f"{sign}.3f" if "score" in metric else f"{sign}.1%"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _unique(values): return list(dict.fromkeys(values))


# The figures

def draw(summary, folder) -> list[Path]: # the files that were drawn
    "The figures, from the summary alone; none where matplotlib is missing"
    if not can_draw(): return []
    return [plot(panels, Path(folder) / name) for name, (plot, panels) in _figures(summary).items()]


def figure_files(summary, folder) -> list[Path]:
    "The files that `draw` writes"
    return [Path(folder) / name for name in _figures(summary)]


def _figures(summary): # name of the file -> its function, and what that draws
    reports = summary["reports"]
    files = _unique(report["file"] for report in reports)
    by_file = {file: [report for report in reports if report["file"] == file] for file in files}
    places = _place_panels(by_file, summary["settings"]["num_beams"])
    reasons = {f"{report['model']}, {report['file']}": report["reasons"] for report in reports}
    degrees = _degree_panels(summary)
    known = {"degrees.png": (plot_degrees, degrees)} if degrees else {}
    return known | {"widths.png": (plot_widths, _width_panels(by_file)), "places.png": (plot_places, places),
                    "reasons.png": (plot_reasons, reasons)}


def _width_panels(by_file):
    panels = {}
    for file, reports in by_file.items():
        panels[file] = {r["model"]: (r["by_width"], r["points"]) for r in reports if r["by_width"]}
    return panels


def _place_panels(by_file, num_beams):
    return {file: {r["model"]: (num_beams, r["places"]) for r in reports} for file, reports in by_file.items()}


def _degree_panels(summary):
    "Title -> cells of one heat map, for each policy and two metrics; empty where no degrees are known"
    panels = {}
    for model in _unique(report["model"] for report in summary["reports"]):
        reports = [r for r in summary["reports"] if r["model"] == model and not r["apart"]]
        for metric in ("greedy_accuracy", "beam_accuracy"):
            cells = _degree_cells(reports, metric)
            if cells: panels[f"{model}, {summary['names'][metric]}"] = cells
    return panels


def _degree_cells(reports, metric): # (outer degree, inner degree) -> (share, problems), over all test sets
    solved, problems = {}, {}
    for report in reports:
        for degrees, found in report["degrees"].items():
            if "∘" not in degrees: continue # the inner degree is not known
            solved[degrees] = solved.get(degrees, 0) + found[metric] * found["n"]
            problems[degrees] = problems.get(degrees, 0) + found["n"]
    return {tuple(map(int, degrees.split("∘"))): (solved[degrees] / n, n) for degrees, n in problems.items()}
