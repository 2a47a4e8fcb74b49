"""The figure of the front page: BGRPO minus GRPO, seed by seed, from the recorded runs.   evidence.py [FILE.svg]

It reads `study/tidy.csv` and `factor_integers.json`, and trains nothing."""
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from bgrpo_nb.base.plotting import use_style

HERE = Path(__file__).parent
FILE = HERE.parent / "images" / "evidence.svg"
POLYNOMIALS, FACTORING = "polynomials of a new degree", "integer factoring"


class Row(NamedTuple):
    "One comparison: both arms' means, and the mean of the paired differences with its 95 % interval over seeds"
    task: str
    label: str
    bgrpo: float
    grpo: float
    difference: float
    low: float
    high: float
    seeds: int


def compare(task, label, bgrpo, grpo): # values of both arms, seed by seed
    "Student's interval of the paired differences"
    differences = np.subtract(bgrpo, grpo)
    low, high = stats.t.interval(0.95, len(differences) - 1, differences.mean(), stats.sem(differences))
    return Row(task, label, np.mean(bgrpo), np.mean(grpo), differences.mean(), low, high, len(differences))


def study_rows():
    "The study: `tiny` learns degree 3∘2; 150 held-out problems"
    runs = pd.read_csv(HERE / "study" / "tidy.csv").set_index(["way", "seed"]).sort_index()
    def row(label, bgrpo, grpo, metric): return compare(POLYNOMIALS, label, runs.loc[bgrpo, metric], runs.loc[grpo, metric])
    ten, greedy = "eval_beam_accuracy", "eval_greedy_accuracy"
    low, high = "rate 2.5e-05", "rate 0.0001"
    return [
        row("ten beams, rate 2.5e-5", f"BGRPO without rank, {low}", f"GRPO, {low}", ten),
        row("ten beams, rate 5e-5", "BGRPO", "GRPO", ten),
        row("ten beams, rate 1e-4", f"BGRPO without rank, {high}", f"GRPO, {high}", ten),
        row("ten beams, equal time", "BGRPO", "GRPO, 27 steps", ten),
        row("greedy, rate 5e-5", "BGRPO", "GRPO", greedy),
    ]


def factoring_rows():
    "Bring your own task: a model of 0.28 M parameters factors integers; 300 held-out numbers"
    runs = json.loads((HERE / "factor_integers.json").read_text(encoding="utf-8"))["runs"]
    def last(rollout, metric): return [run["history"][-1][metric] for run in runs[rollout]]
    metrics = {"greedy": "eval_greedy_accuracy", "ten beams": "eval_beam_accuracy"}
    return [compare(FACTORING, label, last("beam", m), last("sample", m)) for label, m in metrics.items()]


def plot(rows):
    "One line a comparison: the difference in points, and both arms' shares"
    colours = {POLYNOMIALS: "#0072B2", FACTORING: "#D55E00"}
    with use_style() as plt:
        fig, ax = plt.subplots(figsize=(5.6, 3.3))
        for y, row in enumerate(rows):
            x, low, high = (100 * v for v in (row.difference, row.low, row.high))
            ax.plot([low, high], [y, y], color=colours[row.task], linewidth=2)
            ax.plot(x, y, "o", color=colours[row.task], markersize=6)
            shares = f"{100 * row.bgrpo:.1f} / {100 * row.grpo:.1f}"
            ax.text(1.02, y, shares, transform=ax.get_yaxis_transform(), va="center")
        ax.axvline(0, color="0.4", linewidth=1)
        ax.set(yticks=range(len(rows)), yticklabels=[row.label for row in rows], ylim=(len(rows) - 0.5, -0.8),
               xlabel="BGRPO minus GRPO, points, 95 % interval over seeds")
        ax.text(1.02, -0.8, "BGRPO / GRPO, %", transform=ax.get_yaxis_transform(), va="bottom", weight="bold")
        for task, colour in colours.items():
            first = next(y for y, row in enumerate(rows) if row.task == task)
            ax.text(0.99, first - 0.36, task, transform=ax.get_yaxis_transform(), ha="right", va="center",
                    color=colour, weight="bold")
        ax.grid(axis="y", visible=False)
        return fig


def main(path=FILE):
    import matplotlib
    matplotlib.use("svg")
    fig = plot(study_rows() + factoring_rows())
    fixed = {"svg.hashsalt": "evidence", "svg.fonttype": "none"}
    with matplotlib.rc_context(fixed):
        fig.savefig(path, facecolor="white", metadata=dict.fromkeys(("Date", "Creator")))


if __name__ == "__main__": main(*sys.argv[1:])
