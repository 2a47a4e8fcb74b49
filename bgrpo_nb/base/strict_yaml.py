"""YAML files of settings, read as their author means them.

YAML 1.1 reads `3_2` as the number 32 and `1e-5` as text, and takes the last of two equal names without a word. Here
`3_2` is text, `1e-5` a number, and a name that is given twice is an error. No file can name objects of Python."""
import re
from functools import cache
from pathlib import Path

INTEGER = r"[-+]?(0|[1-9][0-9]*)"
DECIMAL = r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?"
MOST_CHARACTERS = 1_000_000


def read_yaml(path):
    "The `name: value` lines of a file as a dict, `{}` for an empty file; ValueError says what is wrong with it"
    if not Path(path).is_file(): raise FileNotFoundError(f"there is no file {path}")
    try: content = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except ValueError as e: raise ValueError(f"{path}: {e}") from None
    if content is None: return {}
    if not isinstance(content, dict): raise ValueError(f"{path} must hold lines `name: value`")
    for name in content:
        if not isinstance(name, str): raise ValueError(f"{path}: {name!r} is no name; write lines `name: value`")
    return content


def parse_yaml(text):
    "The value of a YAML text; ValueError if it is no YAML, or nested too deeply"
    import yaml
    if len(text) > MOST_CHARACTERS: raise ValueError(f"{len(text)} characters are too long for a file of settings")
    try: return yaml.load(text, _loader())
    except RecursionError: raise ValueError("the lists or maps are nested too deeply; write them flat") from None
    except yaml.YAMLError as e: raise ValueError(f"this is no YAML ({' '.join(str(e).split())})") from None


def is_number(text):
    "Does a text look like a number of such a file?"
    return re.fullmatch(f"{INTEGER}|{DECIMAL}", text) is not None


@cache
def _loader():
    "The class that reads; made on first use, because importing yaml takes time"
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {first: _not_a_number(found)
                                   for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()}

        def construct_mapping(self, node, deep=False):
            seen = set()
            for name in (key.value for key, _ in node.value if isinstance(key.value, str)):
                if name in seen: raise ValueError(f"`{name}` is given twice and the last would win silently; keep one")
                seen.add(name)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(f"{INTEGER}$"), list("-+0123456789"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"{DECIMAL}$"), list("-+.0123456789"))
    return Loader


def _not_a_number(resolvers): # the pairs (tag, pattern) of one first character, without YAML 1.1's numbers
    return [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float"))]
