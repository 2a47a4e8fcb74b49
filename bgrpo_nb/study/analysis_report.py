"""One HTML file of a table of runs, and beside it the numbers of every table and figure.

The page needs no network: its style, its figures and the script that sorts its tables are in the file. Every number
and sentence on it comes from a method of `RunTable` (chapter 11)."""
import html
import io
import re
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from bgrpo_nb.base.assets import ASSETS
from bgrpo_nb.study.analysis_figures import label_of, plot_importance
from bgrpo_nb.study.run_readers import ARM, METRIC

PAGE_COLOURS = {"#000000": "currentColor", "#ffffff": "var(--paper)",   # the figures' ink and paper
                "#e6e6e6": "var(--line)", "#cccccc": "var(--line)"}     # grid and frames
COMPARED = ["treatment", "baseline", "unit", "n", "mean", "low", "high", "p_value", "smallest", "comparisons", "arm",
            "metric"]   # columns of the differences
CAPTIONS = {
    "best": "The best of many runs is partly the best by chance.",
    "configurations": "Mean and standard deviation over seeds, with Student's 95 % interval; a single seed has none.",
    "importance": "Shares of the variance by fANOVA. They sum to 1 even where nothing matters: if a forest explains "
                  "little out of bag, they are shares of noise.",
    "history": "Finished runs; bands are 95 % intervals over runs.",
    "rerun": "The best configuration was chosen because it was best, partly by chance. Train it again, in every arm, "
             "on seeds that the sweep did not use, and analyze those runs alone: bgrpo analyze runs/fresh",
}


def _savefig(fig, name: str) -> str:
    "A figure as SVG text that is the same each time"
    import matplotlib
    import matplotlib.pyplot as plt
    out = io.StringIO()
    no_dates = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "axes.unicode_minus": True}):
        fig.savefig(out, format="svg", metadata=no_dates, transparent=True)
    plt.close(fig)
    return out.getvalue()


def _svg(fig, name: str) -> str:
    "A figure as markup: as wide as the page, its colours those of the page, its ids its own"
    text = _savefig(fig, name)
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg"):], flags=re.DOTALL)
    for colour, role in PAGE_COLOURS.items(): text = text.replace(colour, role)
    tag, rest = text.split(">", 1)
    tag = re.sub(r' (width|height)="[^"]*"', "", tag).replace("<svg ", '<svg role="img" ')
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", f"{tag}>{rest}")


def _cell(value) -> str:
    "A value as a cell of a table shows it"
    if value is None or value is pd.NA or value is pd.NaT: return ""
    if not isinstance(value, float): return html.escape(str(value))
    return "" if np.isnan(value) else f"{value:.4g}"


def _table(frame: pd.DataFrame) -> str:
    "A table that sorts at a click"
    heads = "".join(f'<th aria-sort="none"><button>{html.escape(str(c))}</button></th>' for c in frame)
    rows = []
    for values in frame.itertuples(index=False):
        cells = "".join(f"<td>{_cell(v)}</td>" for v in values)
        rows.append(f"<tr>{cells}</tr>")
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _said(line: str) -> str:
    return f"<p class=say>{html.escape(line)}</p>"


def _section(title: str, caption: str, *parts) -> str:
    "A heading and its parts, functions that return HTML; a part that cannot be made is replaced by the reason"
    made = []
    for part in parts:
        try: made.append(part())
        except ValueError as e: made.append(_said(str(e)))
    soft = f"<p class=soft>{html.escape(caption)}</p>" if caption else ""
    body = "".join(dict.fromkeys(made))    # parts that fail for one reason give one message
    return f"<section><h2>{html.escape(title)}</h2>{soft}{body}</section>"


class _Report:
    "The sections of a report; each method returns HTML, and saves the numbers that it shows"

    def __init__(self, runs, out: Path, metric: str, arm: str, baseline, minimize: bool, n_best: int, seed: int):
        self.runs, self.out, self.metric, self.arm, self.baseline = runs, out, metric, arm, baseline
        self.minimize, self.n_best, self.seed = minimize, n_best, seed

    def save(self, name: str, frame: pd.DataFrame) -> pd.DataFrame:
        frame.to_csv(self.out / "data" / f"{name}.csv", index=False)
        return frame

    def table(self, name: str, frame: pd.DataFrame) -> str:
        self.save(name, frame)
        return _table(frame) if len(frame) else "<p>None.</p>"

    def figure(self, name: str, frame: pd.DataFrame, fig) -> str:
        self.save(name, frame)
        return f"<figure>{_svg(fig, name)}</figure>"

    @cached_property
    def compared(self): return self.runs.differences(self.metric, self.arm, self.baseline, self.seed)

    def conclusion(self) -> str:
        lines = self.runs.conclusion(self.metric, self.arm, self.baseline, self.seed, self.compared)
        return "".join(map(_said, lines))

    def differences(self) -> str:
        return self.table("differences", pd.DataFrame(self.compared)[COMPARED])

    def all_pairs(self) -> str:
        "A figure for each treatment that has pairs"
        figures = []
        for treatment in self.runs.arms(self.arm, self.baseline, self.metric)[0]:
            asked = (self.metric, self.arm, self.baseline, treatment)
            try: frame = self.runs.pairs(*asked)
            except ValueError: continue      # the conclusion says why
            figures.append(self.figure(f"pairs{len(figures) or ''}", frame, self.runs.plot_pairs(*asked)))
        return "".join(figures)

    def best(self) -> str: return self.table("best", self.runs.best(self.metric, self.n_best, self.minimize))

    def configurations(self) -> str:
        return self.table("configurations", self.runs.configurations(self.metric, self.minimize))

    def by_setting(self) -> str:
        frame = self.runs.finished(self.metric)[["run", *self.runs.parameters, "seed", self.metric]]
        return self.figure("runs", frame, self.runs.plot_parameters(self.metric, self.arm))

    def importance(self) -> str:
        frame = self.runs.importance(self.metric, seed=self.seed)
        return self.figure("importance", frame, plot_importance(frame))

    def parallel(self) -> str:
        return f"<figure>{_svg(self.runs.plot_parallel(self.metric, self.arm), 'parallel')}</figure>"

    def history(self) -> str:
        frame = self.runs.bands(self.metric, self.arm)
        return self.figure("history", frame, self.runs.plot_history(self.metric, self.arm))

    def degrees(self) -> str:
        frame = self.runs.degrees(self.metric, self.arm)
        return self.figure("degrees", frame, self.runs.plot_degrees(self.metric, self.arm))

    def missing(self) -> str: return self.table("missing", self.runs.missing())
    def troubles(self) -> str: return self.table("troubles", self.runs.troubles())

    def rerun(self) -> str:
        lines = self.runs.rerun(self.metric, self.arm, minimize=self.minimize)
        return "<pre>" + html.escape("\n".join(lines)) + "</pre>"

    def all_runs(self) -> str: return _table(self.runs.table.drop(columns="folder"))

    def intro(self) -> str:
        better, parameters = "lower" if self.minimize else "higher", ", ".join(self.runs.parameters) or "none"
        text = (f"{self.runs.counts()}. Metric {self.metric}, {better} is better; parameters {parameters}. "
                "Intervals are 95 %; they say what other seeds would show on the same validation problems, not what "
                "other problems would.")
        return f"<h1>{html.escape(self.title())}</h1><p class=soft>{html.escape(text)}</p>"

    def title(self) -> str: return f"{label_of(self.metric)}: {len(self.runs)} runs"

    def body(self) -> str:
        sections = [
            (f"The difference between arms of {self.arm}", "", self.conclusion, self.differences, self.all_pairs),
            ("Best runs", CAPTIONS["best"], self.best),
            ("Configurations", CAPTIONS["configurations"], self.configurations),
            ("By setting", "", self.by_setting),
            ("Importance", CAPTIONS["importance"], self.importance),
            ("Every run across its settings", "", self.parallel),
            ("Over training", CAPTIONS["history"], self.history),
            ("Across degrees", "", self.degrees),
            ("Missing cells of the grid", "", self.missing),
            ("Failed, pruned, running and retried", "", self.troubles),
            ("What to do next", CAPTIONS["rerun"], self.rerun),
            ("All runs", "", self.all_runs),
        ]
        return "\n".join([self.intro(), *(_section(*parts) for parts in sections)])


def write_report(runs, out, # RunTable, folder
                 metric: str = METRIC, arm: str = ARM, baseline=None,
                 minimize: bool = False, n_best: int = 5, seed: int = 0,
                 ) -> Path: # report.html; beside it tidy.csv and data/*.csv
    "Write everything into one HTML file that needs no network"
    out = Path(out)
    runs.finished(metric)      # raises where there is nothing to report
    (out / "data").mkdir(parents=True, exist_ok=True)
    runs.to_csv(out / "tidy.csv")
    report = _Report(runs, out, metric, arm, baseline, minimize, n_best, seed)
    page = (ASSETS / "report.html").read_text(encoding="utf-8")
    page = page.replace("{{title}}", html.escape(report.title())).replace("{{body}}", report.body())
    (out / "report.html").write_text(page, encoding="utf-8")
    return out / "report.html"
