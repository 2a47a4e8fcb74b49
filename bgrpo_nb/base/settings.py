"""Fields of a config, each documented once."""
from dataclasses import field


def setting(default, help):
    "A documented field of a config"
    return field(default=default, metadata={"help": help})
