"""What pyproject.toml cannot say: the groups of settings.ini, the configs in the package, a README that leads anywhere.

Everything else about the package is in pyproject.toml."""
import re
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


def requirements(): # group -> what it installs
    "The groups of settings.ini, and `all`: every one but gpu, which needs a GPU's compiler"
    settings = ConfigParser(delimiters=["="])
    settings.read_string((HERE / "settings.ini").read_text(encoding="utf-8"))
    groups = {name.removesuffix("requirements").strip("_"): value.split()
              for name, value in settings["DEFAULT"].items() if name.endswith("requirements")}
    extras = {name: reqs for name, reqs in groups.items() if name not in ("", "gpu")}
    return groups | {"all": sorted({req for reqs in extras.values() for req in reqs})}


def readme():
    "README.md for a package index, where links into the repository lead nowhere: their text stays"
    text = (HERE / "README.md").read_text(encoding="utf-8")
    without_pictures = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]+\)", "", text)
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)[^)]+\)", r"\1", without_pictures)


class BuildWithConfigs(build_py):
    "An installed package has `configs/` among its assets"
    def run(self):
        super().run()
        if not self.editable_mode: shutil.copytree(HERE / "configs", f"{self.build_lib}/bgrpo_nb/assets/configs",
                                                   dirs_exist_ok=True)


groups = requirements()
setup(
    install_requires=groups.pop(""),
    extras_require=groups,
    long_description=readme(),
    long_description_content_type="text/markdown",
    cmdclass={"build_py": BuildWithConfigs},
)
