"""Explorers: a search, a training step, a run or a sweep, with controls to move.

- `explorer`: `Explorer`, `Panel`, `explain`, `equivalence_explorer`
- `beams`: `trace_beams`, `trace_samples`, `draw_tree`, `group_table`, `beam_explorer`
- `groups`: `group_step`, `compare_group`, `group_explorer`
- `run_explorers`: `read_run`, `plot_run`, `RunMonitor`, `filter_runs`, `show_sweep`, `sweep_explorer`
"""
from importlib import import_module

from bgrpo_nb.base.extras import need

need("widgets", "ipywidgets", "pandas")

_EXPORTS = { # module -> names that can be imported from here; a module is loaded when one of its names is asked for
    "explorer": "Explorer Panel explain equivalence_explorer",
    "beams": "trace_beams trace_samples draw_tree group_table beam_explorer",
    "groups": "group_step compare_group group_explorer",
    "run_explorers": "read_run plot_run RunMonitor filter_runs show_sweep sweep_explorer",
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names.split()}

__all__ = sorted(_MODULE_OF)


def __getattr__(name):
    "A name from its module: `import bgrpo_nb.show` alone loads no torch"
    if name not in _MODULE_OF: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__(): return sorted({*globals(), *__all__})
