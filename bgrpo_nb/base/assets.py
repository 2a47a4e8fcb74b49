"""The folder of the files that ship with the package: bundled policies, vocabularies, the style of figures."""
from pathlib import Path

ASSETS = Path(__file__).parent.parent / "assets"
