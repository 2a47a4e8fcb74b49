"""The lowest versions that settings.ini declares, one requirement a line, as constraints for pip.   lowest_versions.py"""
import re
from configparser import ConfigParser
from pathlib import Path

settings = ConfigParser(delimiters=["="])
settings.read_string((Path(__file__).parents[1] / "settings.ini").read_text(encoding="utf-8"))
reqs = [req for name, value in settings["DEFAULT"].items() for req in value.split()]
lowest = dict(re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", req).groups() for req in reqs if ">=" in req)
print("\n".join(f"{name}=={version}" for name, version in lowest.items()))
