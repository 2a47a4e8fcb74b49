"""Figures in the package's one quiet style. They are handed numbers, and know no policy and no report."""
from pathlib import Path

from bgrpo_nb.base.plotting import use_style

WORDS = {"ok": "valid", "not_prefix_notation": "not prefix notation", "too_large": "too large", "degree_mismatch": "degree does not fit",
         "trivial": "trivial", "not_a_decomposition": "not a decomposition", "not_integral": "not integral"}
COLOURS = dict(zip(WORDS, ["#009E73", "#999999", "#000000", "#CC79A7", "#E69F00", "#0072B2", "#56B4E9"]))


def _finish(plt, fig, path):
    "The figure itself, or the file it was written to"
    if path is None: return fig
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)
    plt.close(fig)
    return Path(path)


def _panels(plt, n, width, height):
    "A figure with n panels, at most four in a row, and its axes"
    across = min(n, 4)
    down = -(-n // across)
    fig, axes = plt.subplots(down, across, figsize=(width * across, height * down), squeeze=False)
    for ax in axes.flat[n:]: ax.set_axis_off()
    return fig, axes.flat[:n]


def plot_history(history, # rows with `step` and metrics, with or without `eval_`
                 path=None): # figure file; returned as a figure where it is left out
    "Three panels over training steps"
    rows = [{k.removeprefix("eval_"): v for k, v in r.items()} for r in history]
    rows = [r for r in rows if "beam_rank_score" in r]
    if not rows: raise ValueError("there is no validation to draw; train with validation problems (--eval_problems)")
    panels = [("beam accuracy", {"greedy_accuracy": "greedy", "beam_accuracy": "beams", "wide_beam_accuracy": "wide beams"}),
              ("pass@k and oracle", {"sample_accuracy": "pass@k", "oracle_accuracy": "oracle"}), ("beam rank score", {"beam_rank_score": None})]
    with use_style() as plt:
        fig, axes = plt.subplots(1, 3, figsize=(10, 2.8))
        for ax, (title, lines) in zip(axes, panels):
            for metric, label in lines.items():
                points = [(r["step"], r[metric]) for r in rows if metric in r]
                if points: ax.plot(*zip(*points), marker="o", markersize=4, label=label)
            ax.set(title=title, xlabel="step")
            if len(lines) > 1: ax.legend()
        return _finish(plt, fig, path)


def plot_degrees(cells, # title -> {(outer degree, inner degree): (share, problems)}
                 path=None):
    "A heat map for each title: outer degree up, inner degree across; a cell says its share and how many problems stand behind it"
    outers, inners = (sorted({key[i] for found in cells.values() for key in found}) for i in (0, 1))
    with use_style() as plt:
        fig, axes = _panels(plt, len(cells), 0.9 * len(inners) + 1.3, 0.7 * len(outers) + 1.1)
        for ax, (title, found) in zip(axes, cells.items()):
            values = [[found.get((o, i), (float("nan"), 0))[0] for i in inners] for o in outers]
            drawn = ax.imshow(values, cmap="cividis", vmin=0, vmax=1, origin="lower", aspect="auto")
            for (o, i), (share, n) in found.items():
                ax.text(inners.index(i), outers.index(o), f"{share:.0%}\nn={n}", ha="center", va="center", color="black" if share > 0.55 else "white")
            ax.set(title=title, xlabel="inner degree", ylabel="outer degree", xticks=range(len(inners)), yticks=range(len(outers)))
            ax.set_xticklabels(inners)
            ax.set_yticklabels(outers)
            ax.grid(False)
        fig.colorbar(drawn, ax=list(axes), label="share solved")
        return _finish(plt, fig, path)


def plot_widths(panels, # title -> {label: ([(k, share, low, high)] of the k best of one search, the same of searches of width k of their own)}
                path=None):
    "Lines: the k best of one wide search. Points with intervals: searches of width k of their own"
    with use_style() as plt:
        fig, axes = _panels(plt, len(panels), 3.4, 2.8)
        for ax, (title, lines) in zip(axes, panels.items()):
            for label, (curve, own) in lines.items():
                k, share, low, high = zip(*curve)
                line, = ax.plot(k, share, label=f"{label}, k best of one search of {k[-1]}")
                ax.fill_between(k, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
                k, share, low, high = zip(*own) if own else ((), (), (), ())
                ax.errorbar(k, share, [[max(s - a, 0) for s, a in zip(share, low)], [max(b - s, 0) for s, b in zip(share, high)]], fmt="o", markersize=4, capsize=2,
                            color=line.get_color(), label=f"{label}, a search of width k")
            ax.set(title=title, xlabel="beams k", ylabel="share solved", ylim=(0, 1.03))
            ax.legend(fontsize=7)
        return _finish(plt, fig, path)


def plot_places(panels, # title -> {label: (beams searched, {"1": problems, ..., "none": problems})}
                path=None):
    "Where the first valid beam stands: bars by place, as shares of the problems"
    with use_style() as plt:
        fig, axes = _panels(plt, len(panels), 3.4, 2.4)
        for ax, (title, bars) in zip(axes, panels.items()):
            names = [str(k) for k in range(1, max(beams for beams, _ in bars.values()) + 1)] + ["none"]
            for j, (label, (_, counts)) in enumerate(bars.items()):
                n, width = sum(counts.values()), 0.8 / len(bars)
                ax.bar([x + (j - (len(bars) - 1) / 2) * width for x in range(len(names))], [counts.get(k, 0) / n for k in names], width, label=f"{label}, n={n}")
            step = max(1, len(names) // 12)
            shown = [i for i in range(len(names) - 1) if i % step == 0] + [len(names) - 1]
            ax.set(title=title, xlabel="place of the first valid beam", ylabel="share of problems", xticks=shown)
            ax.set_xticklabels([names[i] for i in shown])
            ax.legend(fontsize=7)
        return _finish(plt, fig, path)


def plot_reasons(panels, # title -> {reason: beams at places 1, 2, ...}
                 path=None):
    "Why beams fail, place by place: shares of the verdicts' reasons"
    with use_style() as plt:
        fig, axes = _panels(plt, len(panels), 3.4, 2.6)
        seen = [reason for reason in WORDS if any(reason in counts for counts in panels.values())]
        for ax, (title, counts) in zip(axes, panels.items()):
            totals = [sum(column) for column in zip(*counts.values())]
            base = [0.0] * len(totals)
            for reason in seen:
                share = [c / total for c, total in zip(counts[reason], totals)] if reason in counts else [0.0] * len(totals)
                ax.bar(range(1, len(totals) + 1), share, 0.9, bottom=base, color=COLOURS[reason], label=WORDS[reason])
                base = [b + s for b, s in zip(base, share)]
            ax.set(title=title, xlabel="place of the beam", ylabel="share of beams", ylim=(0, 1))
            ax.grid(False)
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
        return _finish(plt, fig, path)
