"""Explorers: a search, a training step, a run or a sweep, with controls to move.

- `explorer`: `Explorer`, `Panel`, `explain`, `equivalence_explorer`
- `beams`: `trace_beams`, `trace_samples`, `draw_tree`, `group_table`, `beam_explorer`
- `groups`: `group_step`, `compare_group`, `group_explorer`
- `run_explorers`: `read_run`, `plot_run`, `RunMonitor`, `filter_runs`, `show_sweep`, `sweep_explorer`
"""
import lazy_loader

from bgrpo_nb.base.extras import need

need("widgets", "ipywidgets", "pandas")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)    # of __init__.pyi
