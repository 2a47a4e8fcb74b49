"""What an evaluation of test sets writes, from its summary alone: CSV, Markdown and figures. `bgrpo plot` draws from `results.json` with it."""
import csv
import io
from pathlib import Path

from bgrpo_nb.solve.evaluation_figures import WORDS, plot_degrees, plot_places, plot_reasons, plot_widths
from bgrpo_nb.base.files import write_json, write_text


def as_csv(table): # rows with the same keys
    "Comma-separated values with a line of names"
    out = io.StringIO()
    writer = csv.DictWriter(out, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()


def _markdown(header, rows): # the first column is text, the others are numbers
    cells = [[str(c).replace("|", "\\|") for c in row] for row in [header, *rows]]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|---" + "|---:" * (len(header) - 1) + "|", *lines[1:]])


def _figure(value, low, high, metric="", sign=""): # a share in per cent, a score as it is
    if "score" in metric: return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"
    return f"{value:{sign}.1%} [{low:{sign}.1%}, {high:{sign}.1%}]"


def _metrics(summary, file):
    "One test set: a row for each policy, and the exact algorithm"
    names, rows = summary["names"], {}
    for r in summary["table"]:
        if r["file"] == file and r["source"] != "published": rows.setdefault((r["model"], r["n"]), {})[r["metric"]] = _figure(r["value"], r["low"], r["high"], r["metric"])
    return _markdown(["", "n", "exact", *names.values()],
                     [[model, n, found.get("exact_accuracy", ""), *(found.get(m, "") for m in names)] for (model, n), found in rows.items()])


def as_markdown(summary):
    "The whole evaluation as a page; shares with their 95 % intervals"
    s, about, names = summary["settings"], summary["about"], summary["names"]
    files = list(dict.fromkeys(r["file"] for r in summary["reports"]))
    rule = ("integer" if s["domain"] == "ZZ" else "rational") + " outer polynomial" + (", trivial answers count" if s["allow_trivial"] else "")
    out = ["# Evaluation", f"Rule: {rule}. Temperature of the samples {s['temperature']}, seed {s['seed']}. Values with 95 % intervals: Wilson's for shares, "
           f"BCa bootstrap for the beam rank score. Commit {about.get('commit')}, {about.get('date')}, torch {about.get('versions', {}).get('torch')}."]
    for file in files:
        data = next(r["data"] for r in summary["reports"] if r["file"] == file)
        out += [f"## {file}", f"{data['name']}, sha256 {data['sha256'][:16]}…, the first {data['n']} problems.", _metrics(summary, file)]
    if summary["differences"]:
        base = summary["differences"][0]["baseline"]
        out += [f"## Differences from {base}", "Paired problem by problem; an interval that holds 0 says that chance could explain the difference.",
                _markdown(["", "test set", *names.values()], [[m, f, *(_figure(d["difference"], d["low"], d["high"], d["metric"], "+") for d in summary["differences"]
                          if (d["model"], d["file"]) == (m, f))] for m, f in dict.fromkeys((d["model"], d["file"]) for d in summary["differences"])])]
    if summary["published"]: out += ["## Beside the authors' published figures", _published(summary)]
    out += ["## The k best of one wide search are not a search of width k", _widths(summary), "## Why beams fail", _reasons(summary),
            "Figures: `plots/degrees.png`, `plots/widths.png`, `plots/places.png`, `plots/reasons.png`."]
    return "\n\n".join(out) + "\n"


def _published(summary):
    rows = [[p["model"], p["file"], p["n"], summary["names"][p["metric"]], _figure(p["value"], p["low"], p["high"]), p["whose"],
             _figure(p["published"], p["published_low"], p["published_high"])] for p in summary["published"]]
    note = "The same problems on both sides: the first n of the set." + (
        "" if summary["settings"]["domain"] == "ZZ" else " Theirs count integer outer polynomials alone; ours here are rational ones, too: measure with `--domain ZZ` to compare.")
    return note + "\n\n" + _markdown(["", "test set", "n", "metric", "measured here", "published for", "published"], rows)


def _widths(summary):
    rows = [[r["model"], r["file"], w["n"], w["k"], f"{w['own']:.1%}", f"{w['top_k']:.1%}", _figure(w["difference"], w["low"], w["high"], sign="+"), w["differ"]]
            for r in summary["reports"] for w in r["own_widths"]]
    return ("Share solved by a search of width k, by the k best of the widest search, on the same problems, and the paired difference; the last column counts the problems on which "
            "the two disagree.\n\n" + _markdown(["", "test set", "n", "k", "search of width k", "k best of the widest", "difference", "disagree"], rows))


def _reasons(summary):
    seen = [reason for reason in WORDS if any(reason in r["reasons"] for r in summary["reports"])]
    rows = [[r["model"], r["file"], *(f"{sum(r['reasons'].get(reason, [])) / sum(map(sum, r['reasons'].values())):.1%}" for reason in seen)] for r in summary["reports"]]
    return "Verdicts on the beams, all places together.\n\n" + _markdown(["", "test set", *(WORDS[reason] for reason in seen)], rows)


def draw(summary, folder): # the files that were drawn
    "The figures, from the summary alone"
    folder, reports, names = Path(folder), summary["reports"], summary["names"]
    by_file = {}
    for r in reports: by_file.setdefault(r["file"], []).append(r)
    cells = {f"{model}, {names[m]}": found for model in dict.fromkeys(r["model"] for r in reports) for m in ("greedy_accuracy", "beam_accuracy")
             if (found := _cells([r for r in reports if r["model"] == model and not r["apart"]], m))}
    drawn = [plot_degrees(cells, folder / "degrees.png")] if cells else []
    return [*drawn,
            plot_widths({f: {r["model"]: (r["by_width"], r["points"]) for r in found if r["by_width"]} for f, found in by_file.items()}, folder / "widths.png"),
            plot_places({f: {r["model"]: (summary["settings"]["num_beams"], r["places"]) for r in found} for f, found in by_file.items()}, folder / "places.png"),
            plot_reasons({f"{r['model']}, {r['file']}": r["reasons"] for r in reports}, folder / "reasons.png")]


def _cells(reports, metric): # (outer, inner) -> (share, problems), over all test sets
    sums = {}
    for r in reports:
        for degrees, found in r["degrees"].items():
            solved, n = sums.get(degrees, (0, 0))
            sums[degrees] = solved + found[metric] * found["n"], n + found["n"]
    return {tuple(map(int, degrees.split("∘"))): (solved / n, n) for degrees, (solved, n) in sums.items() if "∘" in degrees}


def save(summary, folder):
    "`results.json`, `results.csv`, `results.md` and `plots/`"
    folder = Path(folder)
    write_json(folder / "results.json", summary)
    write_text(folder / "results.csv", as_csv(summary["table"]))
    write_text(folder / "results.md", as_markdown(summary))
    draw(summary, folder / "plots")
