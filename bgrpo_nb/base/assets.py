"""Where the files that ship with the package are: bundled policies, vocabularies, style."""
from pathlib import Path

ASSETS = Path(__file__).parent.parent / "assets"
