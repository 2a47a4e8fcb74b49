"""Fields of a config dataclass, each with its help text.

The text is written once. `bgrpo train --help`, the notebooks' tables and the API pages all read it from here."""
from dataclasses import field


def setting(default, help):
    "A field of a config dataclass: its default value, and the sentence that explains it"
    return field(default=default, metadata={"help": help})
