"""Packages that only some uses need: asked for with the exact command where one is missing.

The groups are those of `settings.ini`; `pip install 'bgrpo_nb[all]'` installs every one of them."""
from importlib.util import find_spec


class MissingExtra(ImportError):
    "A package of an optional group is not installed"


def lacking(*modules): # names as in `import name`
    "Those that are not installed"
    return [name for name in modules if find_spec(name) is None]


def need(extra, *modules): # the group in settings.ini
    "MissingExtra, with the command that installs the group, unless all modules are there"
    missing = lacking(*modules)
    if missing:
        raise MissingExtra(f"{', '.join(missing)} is not installed; install it with: pip install 'bgrpo_nb[{extra}]'")
