"The explorers. Each is imported from its module when it is first asked for."

from .explorer import Explorer, Panel, explain, equivalence_explorer
from .beams import trace_beams, trace_samples, draw_tree, group_table, beam_explorer
from .groups import group_step, compare_group, group_explorer
from .run_explorers import read_run, plot_run, RunMonitor, filter_runs, show_sweep, sweep_explorer

__all__ = [
    "Explorer", "Panel", "RunMonitor", "beam_explorer", "compare_group", "draw_tree", "equivalence_explorer",
    "explain", "filter_runs", "group_explorer", "group_step", "group_table", "plot_run", "read_run", "show_sweep",
    "sweep_explorer", "trace_beams", "trace_samples",
]
