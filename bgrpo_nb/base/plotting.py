"""One style for all figures of the package.

matplotlib is imported only when a figure is drawn."""
import warnings
from contextlib import contextmanager

from bgrpo_nb.base.assets import ASSETS
from bgrpo_nb.base.extras import lacking, need


@contextmanager
def use_style():
    "`with use_style() as plt:` figures drawn inside have the package's style; gives `matplotlib.pyplot`"
    need("plots", "matplotlib")
    import matplotlib.pyplot as plt
    plt.draw_if_interactive()    # loads the backend: loaded inside, a notebook would show its first figure alone
    with plt.style.context(ASSETS / "bgrpo.mplstyle"): yield plt


def can_draw():
    "Whether matplotlib is installed; a warning with the command where it is not"
    if not lacking("matplotlib"): return True
    warnings.warn("figures are left out: install matplotlib with: pip install 'bgrpo_nb[plots]'")
    return False
