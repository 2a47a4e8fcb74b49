"""The figures of a table of runs.

`RunTable` inherits from `Figures`. The numbers of each figure come from a method of the table (`pairs`, `bands`,
`degrees`, `finished`), so they can be read without the figure."""
import numpy as np
import pandas as pd

from bgrpo_nb.base.plotting import use_style
from bgrpo_nb.study.run_readers import ARM, METRIC

MOST_CATEGORIES = 12  # a setting with more values is drawn on an axis of numbers
MOST_TICKS = 6        # of one axis of the parallel coordinates


def _colour(i: int) -> str:
    "The i-th colour of the style in use; matplotlib would look up C0, C1, … only after the style is gone"
    import matplotlib.pyplot as plt
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    return colours[i % len(colours)]


def label_of(metric: str) -> str:
    "A metric's name as a figure writes it"
    return metric.removeprefix("eval_").replace("_", " ")


def _is_number(values: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)


def _is_log(values: pd.Series) -> bool:
    "Numbers that span a factor of ten or more"
    return pd.api.types.is_numeric_dtype(values) and values.min() > 0 and values.max() >= 10 * values.min()


def categories(values: pd.Series) -> list:
    "The different values in order, numbers first; empty where there are too many to draw each"
    found = sorted(values.dropna().unique().tolist(), key=lambda v: (isinstance(v, str), v))
    return found if len(found) <= MOST_CATEGORIES else []


def _tick_label(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _draw_boxes(ax, groups, arm_index: int, n_arms: int, label: str):
    "A box and its points for each group of one arm, beside those of the other arms"
    offset = (arm_index - (n_arms - 1) / 2) * 0.8 / n_arms
    positions, colour = np.arange(len(groups)) + offset, _colour(arm_index)
    parts = {f"{part}props": dict(color=colour) for part in ("box", "whisker", "cap", "median")}
    ax.boxplot(groups, positions=positions, widths=0.6 / n_arms, showfliers=False, manage_ticks=False, **parts)
    for k, (x, group) in enumerate(zip(positions, groups)):
        points = np.full(len(group), x)
        ax.plot(points, group, "o", markersize=3, alpha=0.6, color=colour, label=None if k else label)


def _text_axis(values: pd.Series) -> tuple[np.ndarray, list]:
    "Heights from 0 to 1 of values that are no numbers, and (height, label) of the ticks"
    codes, names = pd.factorize(values.astype(str), sort=True)
    top = max(len(names) - 1, 1)
    return codes / top, [(i / top, str(name)) for i, name in enumerate(names)]


def _number_axis(values: pd.Series) -> tuple[np.ndarray, list]:
    "Heights from 0 to 1 of numbers, and (height, label) of the ticks"
    log = _is_log(values)
    scaled = np.log(values.astype(float)) if log else values.astype(float)
    low, high = scaled.min(), scaled.max()
    span = (high - low) or 1
    heights = ((scaled - low) / span).fillna(0.5).to_numpy()
    few = categories(values)
    if 0 < len(few) <= MOST_TICKS: ticks = np.log(few) if log else few
    else: ticks = [low, (low + high) / 2, high]
    return heights, [((t - low) / span, f"{np.exp(t) if log else t:.3g}") for t in ticks]


def _axis(values: pd.Series) -> tuple[np.ndarray, list]:
    "Where the values of one setting are on its axis of the parallel coordinates, and the axis' ticks"
    return _number_axis(values) if _is_number(values) else _text_axis(values)


def _draw_axes(ax, columns: dict[str, pd.Series]) -> list[np.ndarray]:
    "The vertical axes of the parallel coordinates; returns the runs' heights on each"
    box = dict(boxstyle="square,pad=0.1", facecolor="white", edgecolor="none", alpha=0.7)
    heights = []
    for x, values in enumerate(columns.values()):
        at, ticks = _axis(values)
        heights.append(at)
        ax.axvline(x, color="black", linewidth=0.8)
        for y, text in ticks: ax.text(x + 0.03, y, text, fontsize=7, va="center", bbox=box, zorder=4)
    ax.set_xticks(range(len(columns)), [name.removeprefix("eval_").replace("_", "\n") for name in columns])
    ax.set_yticks([])
    ax.grid(False)
    for side in ax.spines.values(): side.set_visible(False)
    return heights


def _by_arm(found: pd.DataFrame, arm: str | None):
    "Name and rows of each arm"
    return found.groupby(arm) if arm in found else [("all runs", found)]


def _draw_band(ax, x, part: pd.DataFrame, label: str):
    "A line of means and its interval"
    ax.plot(x, part["mean"], marker="o", markersize=3, label=label)
    ax.fill_between(x, part.low.astype(float), part.high.astype(float), alpha=0.2)


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
        treatment = treatments[0] if treatment is None else treatment
        with use_style() as plt:
            fig, (left, right) = plt.subplots(1, 2, figsize=(6, 2.6), width_ratios=[2, 1])
            for low, high in zip(found.baseline, found.treatment):
                colour = _colour(int(high <= low))
                left.plot([0, 1], [low, high], color=colour, marker="o", markersize=3, linewidth=1, alpha=0.7)
            left.set(xticks=[0, 1], xticklabels=[str(baseline), str(treatment)], xlim=(-0.3, 1.3),
                     ylabel=label_of(metric), title=f"{len(found)} pairs")
            right.axhline(0, color="black", linewidth=0.8)
            spread = np.linspace(-0.1, 0.1, len(found))
            right.plot(spread, np.sort(found.difference), "o", markersize=3, color=_colour(2))
            right.set(xticks=[], xlim=(-0.5, 0.5), title=f"{treatment} − {baseline}")
            return fig

    def _drawn_parameters(self, done: pd.DataFrame, arm: str | None) -> tuple[list[str], str | None]:
        "The parameters that get a panel each, and the arm that gets the colours"
        arm = arm if arm in self.parameters and categories(done[arm]) else None
        drawn = [p for p in self.parameters if p != arm and done[p].nunique() > 1]
        if arm and not drawn: return [arm], None
        if not drawn: raise ValueError("no setting differs between the runs; there is nothing to draw")
        return drawn, arm

    def plot_parameters(self, metric: str = METRIC, arm: str | None = ARM):
        "Box and points of each arm, parameter by parameter"
        done = self.finished(metric)
        drawn, arm = self._drawn_parameters(done, arm)
        parts = [("", done)]
        if arm: parts = [(str(a), done[done[arm] == a]) for a in categories(done[arm])]
        down = -(-len(drawn) // 2)
        with use_style() as plt:
            fig, axes = plt.subplots(down, min(2, len(drawn)), figsize=(6, 2.4 * down), squeeze=False, sharey=True)
            for ax, parameter in zip(axes.flat, drawn): _draw_parameter(ax, done[parameter], parts, metric)
            for ax in axes.flat[len(drawn):]: ax.set_axis_off()
            for ax in axes[:, 0]: ax.set_ylabel(label_of(metric))
            if arm: axes[0, 0].legend(title=arm)
            return fig

    def plot_parallel(self, metric: str = METRIC, arm: str | None = ARM):
        "A line a run across its settings, to the metric; colour: the arm"
        done = self.finished(metric)
        columns = [p for p in [*self.parameters, "seed"] if done[p].nunique() > 1] + [metric]
        arms = categories(done[arm]) if arm in columns else []
        colours = [arms.index(a) if a in arms else 0 for a in done[arm]] if arms else [0] * len(done)
        order = done.reset_index(drop=True).sort_values([*([arm] if arms else []), metric]).index
        beside = 0.06 * (np.argsort(order) / len(order) - 0.5)   # separates runs with equal settings
        with use_style() as plt:
            fig, ax = plt.subplots(figsize=(6, 2.8))
            *settings, last = _draw_axes(ax, {c: done[c] for c in columns})
            heights = np.transpose([h + beside for h in settings] + [last])
            for line, i in zip(heights, colours): ax.plot(range(len(columns)), line, linewidth=0.9, color=_colour(i))
            for i, a in enumerate(arms): ax.plot([], [], color=_colour(i), label=str(a))
            if arms: ax.legend(title=arm, loc="center left", bbox_to_anchor=(1.05, 0.5))
            return fig

    def plot_history(self, metric: str = METRIC, arm: str | None = ARM):
        "Mean of each arm over training steps, with bands"
        found = self.bands(metric, arm)
        with use_style() as plt:
            fig, ax = plt.subplots()
            for name, part in _by_arm(found, arm):
                _draw_band(ax, part.step.astype(float), part, f"{name} ({part.n.max()} runs)")
            ax.set(xlabel="step", ylabel=label_of(metric))
            ax.legend()
            return fig

    def plot_degrees(self, metric: str = METRIC, arm: str | None = ARM):
        "Metrics degree by degree, with bands; ValueError where no run has them"
        found = self.degrees(metric, arm)
        if found.empty:
            raise ValueError("no run has metrics degree by degree; log eval_by_degree, or metrics named like "
                             "eval_beam_accuracy_3∘2")
        names = found.metric.unique()
        across = min(len(names), 3)
        down = -(-len(names) // across)
        xlabel = "outer∘inner degree" if "∘" in found.degree.iloc[0] else "degree"
        with use_style() as plt:
            fig, axes = plt.subplots(down, across, figsize=(max(6, 3 * across), 2.6 * down), squeeze=False)
            for ax in axes.flat[len(names):]: ax.set_axis_off()
            for ax, metric in zip(axes.flat, names):
                rows = found[found.metric == metric]
                for name, part in _by_arm(rows, arm): _draw_band(ax, part.degree, part, str(name))
                ax.set(xlabel=xlabel, title=label_of(metric))
            axes[0, 0].legend()
            return fig


def _draw_parameter(ax, values: pd.Series, parts: list, metric: str):
    "The metric against one parameter: boxes where it has few values, else points; `parts` are the arms and their runs"
    few, name = categories(values), values.name
    for i, (label, part) in enumerate(parts):
        if few:
            groups = [part[part[name] == v][metric].to_numpy(float) for v in few]
            _draw_boxes(ax, groups, i, len(parts), label)
        else:
            x = part[name].astype(float)
            ax.plot(x, part[metric], "o", markersize=3, alpha=0.7, color=_colour(i), label=label)
    if few: ax.set_xticks(range(len(few)), [_tick_label(v) for v in few])
    elif _is_log(values): ax.set_xscale("log")
    ax.set(xlabel=name)
