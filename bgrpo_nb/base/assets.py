"""The files that ship with the package: bundled policies, vocabularies, the style of figures, configs."""
from pathlib import Path

ASSETS = Path(__file__).parent.parent / "assets"


def find_config(path):
    "The file; where there is none, the package's own of that name, as in configs/train/original.yaml"
    path, shipped = Path(path), ASSETS / path
    return shipped if path.parts[:1] == ("configs",) and not path.exists() and shipped.is_file() else path
