"Reads the requirement groups of settings.ini; everything else about the package is in pyproject.toml."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

settings = ConfigParser(delimiters=["="])
settings.read_string((Path(__file__).parent / "settings.ini").read_text(encoding="utf-8"))
groups = {name: value.split() for name, value in settings["DEFAULT"].items() if name.endswith("requirements")}

setup(
    install_requires=groups.pop("requirements"),
    extras_require={name.removesuffix("_requirements"): reqs for name, reqs in groups.items()},
)
