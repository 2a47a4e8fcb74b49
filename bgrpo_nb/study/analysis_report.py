"""One HTML file of a table of runs that needs no network, and beside it the numbers of every table and figure."""
import html
import io
import re
from pathlib import Path

import numpy as np
import pandas as pd

from bgrpo_nb.base.assets import ASSETS
from bgrpo_nb.study.analysis_figures import ARM, label_of, plot_importance
from bgrpo_nb.study.run_readers import METRIC


def _svg(fig, name: str) -> str: # colours follow the page
    "A figure as markup"
    import matplotlib
    import matplotlib.pyplot as plt
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "axes.unicode_minus": True}):
        fig.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")), transparent=True)
    plt.close(fig)
    text = re.sub(r"<metadata>.*?</metadata>", "", out.getvalue()[out.getvalue().index("<svg"):], flags=re.S)
    for colour, role in (("#000000", "currentColor"), ("#e6e6e6", "var(--line)"), ("#ffffff", "var(--paper)"), ("#cccccc", "var(--line)")): text = text.replace(colour, role)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"([^>]*?) width="[^"]*"', r"\1\2", re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1', text, count=1), count=1)
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text).replace("<svg ", '<svg role="img" ', 1)

def _table(frame: pd.DataFrame) -> str:
    "A table that sorts"
    def show(v): return "" if v is None or v is pd.NA or v is pd.NaT or (isinstance(v, float) and np.isnan(v)) else f"{v:.4g}" if isinstance(v, float) else html.escape(str(v))
    head = "".join(f'<th aria-sort="none"><button>{html.escape(str(c))}</button></th>' for c in frame)
    body = "".join("<tr>" + "".join(f"<td>{show(v)}</td>" for v in row) + "</tr>" for row in frame.itertuples(index=False))
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def write_report(runs, out,                      # folder
           metric: str = METRIC, arm: str = ARM, baseline=None,
           minimize: bool = False, n_best: int = 5, seed: int = 0) -> Path: # report.html; beside it tidy.csv and data/*.csv
    "Write everything into one HTML file that needs no network"
    out, done = Path(out), runs.finished(metric)
    (out / "data").mkdir(parents=True, exist_ok=True)
    runs.to_csv(out / "tidy.csv")
    def keep(name, frame): frame.to_csv(out / "data" / f"{name}.csv", index=False); return frame
    def table(name, make): return lambda: _table(found) if len(found := keep(name, make())) else "<p>None.</p>"
    def figure(name, make, plot): return lambda: f"<figure>{_svg(plot(keep(name, make())), name)}</figure>"
    def said(): return "".join(f"<p class=say>{html.escape(line)}</p>" for line in runs.conclusion(metric, arm, baseline, seed))
    def weighed(cache=[]): return cache[0] if cache else cache.append(runs.importance(metric, seed=seed)) or cache[0]
    def next_step(): return "<pre>" + html.escape("\n".join(runs.rerun(metric, arm, minimize=minimize))) + "</pre>"
    try: treatments = [c.treatment for c in runs.differences(metric, arm, baseline, seed) if c.unit == "pairs"]
    except ValueError: treatments = []
    sections = [
        (f"The difference between arms of {arm}", "", said, table("differences", lambda: pd.DataFrame(runs.differences(metric, arm, baseline, seed)).drop(columns="notes", errors="ignore")),
         *(figure(f"pairs{i or ''}", lambda t=t: runs.pairs(metric, arm, baseline, t), lambda _, t=t: runs.plot_pairs(metric, arm, baseline, t)) for i, t in enumerate(treatments))),
        ("Best runs", "The best of many is partly the luckiest of many.", table("best", lambda: runs.best(metric, n_best, minimize))),
        ("Configurations", "Mean and standard deviation over seeds; Student's interval, none for a single seed.", table("configurations", lambda: runs.configurations(metric, minimize))),
        ("By setting", "", figure("runs", lambda: done[["run", *runs.parameters, "seed", metric]], lambda _: runs.plot_parameters(metric, arm))),
        ("Importance", "Shares of the variance by fANOVA. They sum to 1 even where nothing matters: where a forest explains little out of bag, they are shares of noise.",
         figure("importance", weighed, plot_importance)),
        ("Every run across its settings", "", lambda: f"<figure>{_svg(runs.plot_parallel(metric, arm), 'parallel')}</figure>"),
        ("Over training", "Finished runs; bands are 95 % intervals over runs.", figure("history", lambda: runs.bands(metric, arm), lambda _: runs.plot_history(metric, arm))),
        ("Across degrees", "", figure("degrees", lambda: runs.degrees(metric, arm), lambda _: runs.plot_degrees(metric, arm))),
        ("Missing cells of the grid", "", table("missing", runs.missing)),
        ("Failed, pruned, running and retried", "", table("troubles", runs.troubles)),
        ("What to do next", "The best configuration was chosen by its luck, too. Train it again, every arm of it, on seeds that the sweep did not see, and analyze those runs alone: "
         "bgrpo analyze runs/fresh", next_step),
        ("All runs", "", lambda: _table(runs.table.drop(columns="folder"))),
    ]
    title = f"{label_of(metric)}: {len(runs)} runs"
    intro = (f"{runs.counts()}. Metric {metric}, {'lower' if minimize else 'higher'} is better; parameters {', '.join(runs.parameters) or 'none'}. Intervals are 95 %; they say what other "
             "seeds would show on the same validation problems, not what other problems would.")
    body = [f"<h1>{html.escape(title)}</h1><p class=soft>{html.escape(intro)}</p>", *(_section(*s) for s in sections)]
    page = (ASSETS / "report.html").read_text(encoding="utf-8").replace("{{title}}", html.escape(title)).replace("{{body}}", "\n".join(body))
    (out / "report.html").write_text(page, encoding="utf-8")
    return out / "report.html"

def _section(title: str, caption: str, *makers) -> str:
    "A heading and its parts; a message where there is nothing to show"
    def made(make):
        try: return make()
        except ValueError as e: return f"<p class=say>{html.escape(str(e))}</p>"
    parts = list(dict.fromkeys(map(made, makers)))      # what cannot be compared is said once
    return f"<section><h2>{html.escape(title)}</h2>" + (f"<p class=soft>{html.escape(caption)}</p>" if caption else "") + "".join(parts) + "</section>"
