"""Figures of a table of runs. What they draw they ask of the table: `pairs`, `bands`, `degrees`, `finished`."""
import numpy as np
import pandas as pd

from bgrpo_nb.base.plotting import use_style
from bgrpo_nb.study.run_readers import METRIC

ARM = "rollout"


def _colour(i: int) -> str: # matplotlib looks up C0, C1, … when it draws, and then the style is gone
    "Of the style in use"
    import matplotlib.pyplot as plt
    return plt.rcParams["axes.prop_cycle"].by_key()["color"][i % 7]

def label_of(metric): return metric.removeprefix("eval_").replace("_", " ")


def _is_log(values): return pd.api.types.is_numeric_dtype(values) and values.min() > 0 and values.max() >= 10 * values.min()


def shown(values: pd.Series) -> list: # at most 12, in order
    "Values that get a box each; empty where there are too many"
    found = sorted(values.dropna().unique().tolist(), key=lambda v: (isinstance(v, str), v))
    return found if len(found) <= 12 else []


def _boxes(ax, groups, i, of, label):
    at = np.arange(len(groups)) + (i - (of - 1) / 2) * 0.8 / of
    ax.boxplot(groups, positions=at, widths=0.6 / of, showfliers=False, manage_ticks=False, boxprops=dict(color=_colour(i)), whiskerprops=dict(color=_colour(i)),
               capprops=dict(color=_colour(i)), medianprops=dict(color=_colour(i)))
    for k, (x, group) in enumerate(zip(at, groups)): ax.plot(np.full(len(group), x), group, "o", markersize=3, alpha=0.6, color=_colour(i), label=None if k else label)


def _axis(values: pd.Series) -> tuple[np.ndarray, list]: # heights 0 to 1; (height, text) of the ticks
    "Where the values of one setting lie"
    if not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
        codes, names = pd.factorize(values.astype(str), sort=True)
        return codes / max(len(names) - 1, 1), [(i / max(len(names) - 1, 1), str(n)) for i, n in enumerate(names)]
    log = _is_log(values)
    v = np.log(values.astype(float)) if log else values.astype(float)
    low, high = v.min(), v.max()
    at = ((v - low) / ((high - low) or 1)).fillna(0.5).to_numpy()
    ticks = shown(values) if 0 < len(shown(values)) <= 6 else [np.exp(t) if log else t for t in (low, (low + high) / 2, high)]
    return at, [(((np.log(t) if log else t) - low) / ((high - low) or 1), f"{t:.3g}") for t in ticks]


def plot_importance(found: pd.DataFrame): # of `RunTable.importance`
    "A bar a parameter"
    with use_style() as plt:
        fig, ax = plt.subplots(figsize=(6, 0.8 + 0.3 * len(found)))
        ax.barh(found.parameter, found.importance, height=0.6)
        ax.invert_yaxis()
        ax.set(xlabel="share of the variance", title=f"explained out of bag: {found.explained[0]:.0%}")
        return fig


class Figures:
    "What `RunTable` can draw; each method returns a figure"

    def plot_pairs(self, metric: str = METRIC, arm: str = ARM, baseline=None, treatment=None):
        "A line a pair, from baseline to treatment, and the differences"
        found = self.pairs(metric, arm, baseline, treatment)
        treatments, baseline = self.arms(arm, baseline, metric)
        names = [str(baseline), str(treatment if treatment is not None else treatments[0])]
        with use_style() as plt:
            fig, (left, right) = plt.subplots(1, 2, figsize=(6, 2.6), width_ratios=[2, 1])
            for b, t in zip(found.baseline, found.treatment): left.plot([0, 1], [b, t], color=_colour(int(t <= b)), marker="o", markersize=3, linewidth=1, alpha=0.7)
            left.set(xticks=[0, 1], xticklabels=names, xlim=(-0.3, 1.3), ylabel=label_of(metric), title=f"{len(found)} pairs")
            right.axhline(0, color="black", linewidth=0.8)
            right.plot(np.linspace(-0.1, 0.1, len(found)), np.sort(found.difference), "o", markersize=3, color=_colour(2))
            right.set(xticks=[], xlim=(-0.5, 0.5), title=" − ".join(names[::-1]))
            return fig

    def plot_parameters(self, metric: str = METRIC, arm: str | None = ARM):
        "Box and strip of each arm, parameter by parameter"
        done = self.finished(metric)
        arm = arm if arm in self.parameters and shown(done[arm]) else None
        drawn = [p for p in self.parameters if p != arm and done[p].nunique() > 1]
        if arm and not drawn: drawn, arm = [arm], None
        if not drawn: raise ValueError("no setting differs between the runs")
        arms = shown(done[arm]) if arm else [None]
        with use_style() as plt:
            fig, axes = plt.subplots(-(-len(drawn) // 2), min(2, len(drawn)), figsize=(6, 2.4 * -(-len(drawn) // 2)), squeeze=False, sharey=True)
            for ax, p in zip(axes.flat, drawn):
                values = shown(done[p])
                for i, a in enumerate(arms):
                    part = done if a is None else done[done[arm] == a]
                    if values: _boxes(ax, [part[part[p] == v][metric].to_numpy(float) for v in values], i, len(arms), str(a))
                    else: ax.plot(part[p].astype(float), part[metric], "o", markersize=3, alpha=0.7, color=_colour(i), label=str(a))
                if values: ax.set_xticks(range(len(values)), [f"{v:.3g}" if isinstance(v, float) else str(v) for v in values])
                elif _is_log(done[p]): ax.set_xscale("log")
                ax.set(xlabel=p)
            for ax in axes.flat[len(drawn):]: ax.set_axis_off()
            for ax in axes[:, 0]: ax.set_ylabel(label_of(metric))
            if arm: axes[0, 0].legend(title=arm)
            return fig

    def plot_parallel(self, metric: str = METRIC, arm: str | None = ARM):
        "A line a run across its settings, to the metric; colour: the arm"
        done = self.finished(metric)
        columns = [p for p in [*self.parameters, "seed"] if done[p].nunique() > 1] + [metric]
        arms = shown(done[arm]) if arm in columns else []
        with use_style() as plt:
            fig, ax = plt.subplots(figsize=(6, 2.8))
            heights = []
            for x, c in enumerate(columns):
                at, ticks = _axis(done[c])
                heights.append(at)
                ax.axvline(x, color="black", linewidth=0.8)
                for y, text in ticks: ax.text(x + 0.03, y, text, fontsize=7, va="center", bbox=dict(boxstyle="square,pad=0.1", facecolor="white", edgecolor="none", alpha=0.7), zorder=4)
            order = done.reset_index(drop=True).sort_values([*([arm] if arms else []), metric]).index
            heights[:-1] = [h + 0.06 * (np.argsort(order) / len(order) - 0.5) for h in heights[:-1]]      # runs with equal settings beside one another
            for line, a in zip(np.transpose(heights), done[arm] if arms else [None] * len(done)):
                ax.plot(range(len(columns)), line, linewidth=0.9, color=_colour(arms.index(a) if a in arms else 0))
            for i, a in enumerate(arms): ax.plot([], [], color=_colour(i), label=str(a))
            if arms: ax.legend(title=arm, loc="center left", bbox_to_anchor=(1.05, 0.5))
            ax.set_xticks(range(len(columns)), [c.removeprefix("eval_").replace("_", "\n") for c in columns])
            ax.set_yticks([])
            ax.grid(False)
            for side in ax.spines.values(): side.set_visible(False)
            return fig

    def plot_history(self, metric: str = METRIC, arm: str | None = ARM):
        "Mean of each arm over training steps, with bands"
        found = self.bands(metric, arm)
        with use_style() as plt:
            fig, ax = plt.subplots()
            for name, part in found.groupby(arm) if arm in found else [("all runs", found)]:
                ax.plot(part.step, part["mean"], marker="o", markersize=3, label=f"{name} ({part.n.max()} runs)")
                ax.fill_between(part.step.astype(float), part.low.astype(float), part.high.astype(float), alpha=0.2)
            ax.set(xlabel="step", ylabel=label_of(metric))
            ax.legend()
            return fig

    def plot_degrees(self, metric: str = METRIC, arm: str | None = ARM):
        "Metrics degree by degree, with bands; ValueError where no run carries them"
        found = self.degrees(metric, arm)
        if found.empty: raise ValueError("no run carries its metrics degree by degree; log eval_by_degree, or metrics named like eval_beam_accuracy_3∘2")
        names = found.metric.unique()
        with use_style() as plt:
            across = min(len(names), 3)
            down = -(-len(names) // across)
            fig, axes = plt.subplots(down, across, figsize=(max(6, 3 * across), 2.6 * down), squeeze=False)
            for ax in axes.flat[len(names):]: ax.set_axis_off()
            for ax, m in zip(axes.flat, names):
                for name, part in found[found.metric == m].groupby(arm) if arm in found else [("all runs", found[found.metric == m])]:
                    ax.plot(part.degree, part["mean"], marker="o", markersize=3, label=str(name))
                    ax.fill_between(part.degree, part.low, part.high, alpha=0.2)
                ax.set(xlabel="outer∘inner degree" if "∘" in found.degree.iloc[0] else "degree", title=label_of(m))
            axes[0, 0].legend()
            return fig
