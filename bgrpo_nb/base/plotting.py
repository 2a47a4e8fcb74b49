"""The package's one style of figures."""
from contextlib import contextmanager

from bgrpo_nb.base.assets import ASSETS


@contextmanager
def use_style():
    "The package's look for figures drawn inside"
    import matplotlib.pyplot as plt
    with plt.style.context(ASSETS / "bgrpo.mplstyle"): yield plt
