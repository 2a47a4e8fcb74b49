__version__ = "0.1.0"


def __getattr__(name):
    "`bgrpo_nb.decompose` is found when it is asked for, so that `import bgrpo_nb.polynomial` loads no torch."
    if name == "decompose":
        from bgrpo_nb.evaluation import decompose
        return decompose
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
