"""One style for all figures of the package.

matplotlib is imported only when a figure is drawn."""
from contextlib import contextmanager

from bgrpo_nb.base.assets import ASSETS


@contextmanager
def use_style():
    "`with use_style() as plt:` figures drawn inside have the package's style; gives `matplotlib.pyplot`"
    import matplotlib.pyplot as plt
    with plt.style.context(ASSETS / "bgrpo.mplstyle"): yield plt
