"""The figures of an evaluation and of a training run, drawn from plain numbers in the package's one style."""
from pathlib import Path

from bgrpo_nb.base.files import replacing
from bgrpo_nb.base.plotting import use_style

WORDS = { # a verdict's reason, in words
    "ok": "valid", "not_prefix_notation": "not prefix notation", "too_large": "too large",
    "degree_mismatch": "degree does not fit", "trivial": "trivial", "not_a_decomposition": "not a decomposition",
    "not_integral": "not integral"}
COLOURS = dict(zip(WORDS, ["#009E73", "#999999", "#000000", "#CC79A7", "#E69F00", "#0072B2", "#56B4E9"]))
HISTORY_PANELS = [ # title, {metric: label of its line}
    ("beam accuracy", {"greedy_accuracy": "greedy", "beam_accuracy": "beams", "wide_beam_accuracy": "wide beams",
                       "known_greedy_accuracy": "greedy, known before"}),
    ("pass@k and oracle", {"sample_accuracy": "pass@k", "oracle_accuracy": "oracle"}),
    ("beam rank score", {"beam_rank_score": None})]


def _finish(plt, fig, path):
    "The figure itself, or the file it was written to, under exactly that name"
    if path is None: return fig
    path = Path(path)
    form = path.suffix[1:] or "png"    # left out, matplotlib would append it to the name
    with replacing(path) as part: fig.savefig(part, format=form)
    plt.close(fig)
    return path


def _panels(plt, n, width, height):
    "A figure with n panels, at most four in a row, and its axes"
    across = min(n, 4)
    down = -(-n // across)
    fig, axes = plt.subplots(down, across, figsize=(width * across, height * down), squeeze=False)
    for ax in axes.flat[n:]: ax.set_axis_off()
    return fig, axes.flat[:n]


def plot_history(history, # rows with `step` and metrics, with or without `eval_`
                 path=None): # figure file; without it the figure is returned
    "Validation over training steps, in three panels"
    rows = [{name.removeprefix("eval_"): value for name, value in row.items()} for row in history]
    rows = [row for row in rows if "beam_rank_score" in row]
    if not rows:
        raise ValueError("there is no validation to draw; train with validation problems (--eval_problems)")
    with use_style() as plt:
        fig, axes = plt.subplots(1, 3, figsize=(10, 2.8))
        for ax, (title, lines) in zip(axes, HISTORY_PANELS):
            for metric, label in lines.items(): _draw_metric(ax, rows, metric, label)
            ax.set(title=title, xlabel="step")
            if len(lines) > 1: ax.legend()
        return _finish(plt, fig, path)


def _draw_metric(ax, rows, metric, label):
    points = [(row["step"], row[metric]) for row in rows if metric in row]
    if points: ax.plot(*zip(*points), marker="o", markersize=4, label=label)


def plot_degrees(cells, # title -> {(outer degree, inner degree): (share, problems)}
                 path=None):
    "One heat map for each title: outer degree up, inner degree across; each cell has its share and number of problems"
    outers = sorted({outer for found in cells.values() for outer, _ in found})
    inners = sorted({inner for found in cells.values() for _, inner in found})
    with use_style() as plt:
        fig, axes = _panels(plt, len(cells), 0.9 * len(inners) + 1.3, 0.7 * len(outers) + 1.1)
        for ax, (title, found) in zip(axes, cells.items()): image = _draw_degrees(ax, title, found, outers, inners)
        fig.colorbar(image, ax=list(axes), label="share solved")
        return _finish(plt, fig, path)


def _draw_degrees(ax, title, found, outers, inners):
    missing = (float("nan"), 0)
    values = [[found.get((outer, inner), missing)[0] for inner in inners] for outer in outers]
    image = ax.imshow(values, cmap="cividis", vmin=0, vmax=1, origin="lower", aspect="auto")
    for (outer, inner), (share, n) in found.items():
        colour = "black" if share > 0.55 else "white"
        x, y = inners.index(inner), outers.index(outer)
        ax.text(x, y, f"{share:.0%}\nn={n}", ha="center", va="center", color=colour)
    ax.set(title=title, xlabel="inner degree", ylabel="outer degree")
    ax.set_xticks(range(len(inners)), inners)
    ax.set_yticks(range(len(outers)), outers)
    ax.grid(False)
    return image


def plot_widths(panels, # title -> {label: (curve, points)}, both lists of (k, share, low, high)
                path=None):
    "Curves: the k best beams of one wide search. Points with intervals: searches of width k"
    with use_style() as plt:
        fig, axes = _panels(plt, len(panels), 3.4, 2.8)
        for ax, (title, lines) in zip(axes, panels.items()):
            for label, (curve, points) in lines.items():
                colour = _draw_curve(ax, label, curve)
                _draw_points(ax, label, points, colour)
            ax.set(title=title, xlabel="beams k", ylabel="share solved", ylim=(0, 1.03))
            ax.legend(fontsize=7)
        return _finish(plt, fig, path)


def _draw_curve(ax, label, curve):
    k, share, low, high = zip(*curve)
    line, = ax.plot(k, share, label=f"{label}, k best of one search of {k[-1]}")
    ax.fill_between(k, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    return line.get_color()


def _draw_points(ax, label, points, colour):
    below = [max(share - low, 0) for _, share, low, _ in points]
    above = [max(high - share, 0) for _, share, _, high in points]
    ks, shares = [point[0] for point in points], [point[1] for point in points]
    ax.errorbar(ks, shares, [below, above], fmt="o", markersize=4, capsize=2, color=colour,
                label=f"{label}, a search of width k")


def plot_places(panels, # title -> {label: (beams searched, {"1": problems, ..., "none": problems})}
                path=None):
    "Shares of the problems by the place of their first valid beam"
    with use_style() as plt:
        fig, axes = _panels(plt, len(panels), 3.4, 2.4)
        for ax, (title, bars) in zip(axes, panels.items()): _draw_places(ax, title, bars)
        return _finish(plt, fig, path)


def _draw_places(ax, title, bars):
    widest = max(beams for beams, _ in bars.values())
    names = [*map(str, range(1, widest + 1)), "none"]
    positions = [*range(1, widest + 1), widest + 2] # "none" apart from the places
    width = 0.8 / len(bars)
    for number, (label, (_, counts)) in enumerate(bars.items()):
        n = sum(counts.values())
        shift = (number - (len(bars) - 1) / 2) * width
        shares = [counts.get(name, 0) / n for name in names]
        ax.bar([x + shift for x in positions], shares, width, label=f"{label}, n={n}")
    step = max(1, len(names) // 12)
    shown = [*range(0, widest, step), widest]
    ax.set(title=title, xlabel="place of the first valid beam", ylabel="share of problems")
    ax.set_xticks([positions[i] for i in shown], [names[i] for i in shown])
    ax.legend(fontsize=7)


def plot_reasons(panels, # title -> {reason: beams at places 1, 2, ...}
                 path=None):
    "Shares of the verdicts' reasons at each place: why beams fail"
    seen = [reason for reason in WORDS if any(reason in counts for counts in panels.values())]
    with use_style() as plt:
        fig, axes = _panels(plt, len(panels), 3.4, 2.6)
        for ax, (title, counts) in zip(axes, panels.items()): _draw_reasons(ax, title, counts, seen)
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
        return _finish(plt, fig, path)


def _draw_reasons(ax, title, counts, seen):
    totals = [sum(column) for column in zip(*counts.values())]
    places = range(1, len(totals) + 1)
    bottom = [0.0] * len(totals)
    for reason in seen:
        beams = counts.get(reason, [0] * len(totals))
        shares = [count / total for count, total in zip(beams, totals)]
        ax.bar(places, shares, 0.9, bottom=bottom, color=COLOURS[reason], label=WORDS[reason])
        bottom = [b + share for b, share in zip(bottom, shares)]
    ax.set(title=title, xlabel="place of the beam", ylabel="share of beams", ylim=(0, 1))
    ax.grid(False)
