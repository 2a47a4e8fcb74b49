"""Fields of a config dataclass, each with its help text, its type and the range of its values.

Text and range are written once. The reader of flags and files, `bgrpo train --help`, the notebooks' tables and the API
pages all take them from here."""
import json
import math
import types
import typing
from dataclasses import dataclass, field, fields
from functools import cache

from bgrpo_nb.base.strict_yaml import is_number, parse_yaml

WIDEST = 10_000    # beams or samples for one problem
INHERITED = { # (smallest, largest) of fields whose class names no range
    **{name: (1, None) for name in """
        per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps steps_per_generation
        generation_batch_size num_iterations save_total_limit max_completion_length max_steps prompts_per_step
        prompts_at_once trie_elements""".split()},
    **{name: (0, None) for name in """
        weight_decay adam_epsilon max_grad_norm num_train_epochs warmup_steps warmup_ratio logging_steps
        eval_steps save_steps eval_delay dataloader_num_workers dataloader_prefetch_factor temperature top_k
        repetition_penalty epsilon epsilon_high delta beta ddp_timeout label_smoothing_factor""".split()},
    **{name: (0, 1) for name in ("adam_beta1", "adam_beta2", "top_p", "min_p", "top_entropy_quantile",
                                 "ref_model_mixup_alpha")},
    **{name: (0, 2**32 - 1) for name in ("seed", "data_seed")},
    "learning_rate": (0, 1000), # above it optimizers overflow float32
    "num_generations": (2, WIDEST), "num_generations_eval": (1, WIDEST),
}


class Help(str):
    "A help text that carries the range of its field: `HfArgumentParser` takes nothing else in a field's metadata"
    def __new__(cls, text, low=None, high=None):
        self = super().__new__(cls, text)
        self.low, self.high = low, high
        return self

    def __getnewargs__(self): return str(self), self.low, self.high


def setting(default, help, low=None, high=None):
    """A field of a config: its default value, the sentence that explains it, and the range of a number.

    Without `low` a number is 0 or more, unless `INHERITED` says otherwise."""
    return field(default=default, metadata={"help": Help(help, low, high)})


def range_of(name, low=None, high=None, documented=True):
    "The smallest and largest value of a field, None where there is no bound"
    known_low, known_high = INHERITED.get(name, (0 if documented else None, None))
    return known_low if low is None else low, known_high if high is None else high


@dataclass(frozen=True)
class Setting:
    "What is known of one field"
    name: str
    type: typing.Any
    default: typing.Any
    help: str
    low: float | None
    high: float | None

    @property
    def range(self):
        "The range in words, for numbers; empty for others"
        if not {int, float} & types_of(self.type): return ""
        kind = "whole number" if float not in types_of(self.type) else "number"
        if self.low is None and self.high is None: return kind
        if self.high is None: return f"{kind} of {self.low} or more"
        return f"{kind} from {self.low} to {self.high}"


@cache
def settings_of(cls):
    "Name -> `Setting`, of all fields of a config dataclass that can be given"
    known = typing.get_type_hints(cls)
    found = {}
    for f in fields(cls):
        text = f.metadata.get("help", "")
        low, high = range_of(f.name, getattr(text, "low", None), getattr(text, "high", None), isinstance(text, Help))
        if f.init: found[f.name] = Setting(f.name, known[f.name], f.default, str(text), low, high)
    return found


def _alternatives(annotation):
    "The parts of a union; a type that is none is its only part"
    if typing.get_origin(annotation) in (typing.Union, types.UnionType): return typing.get_args(annotation)
    return (annotation,)


def types_of(annotation):
    "The types of a field, e.g. {int, NoneType} for `int | None`, {list} for `list[str]`"
    found = {typing.get_origin(part) or part for part in _alternatives(annotation)}
    return {str if kind is typing.Literal else kind for kind in found}


def check_ranges(config):
    "ValueError for the first number of a config that is out of its range, or no finite number"
    for known in settings_of(type(config)).values(): _check_range(known, getattr(config, known.name))


def _check_range(known, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)): return
    inside = (known.low is None or value >= known.low) and (known.high is None or value <= known.high)
    if math.isfinite(value) and inside: return
    raise ValueError(f"{known.name}={value} is out of range; use a {known.range}")


# Reading a value

def read_value(known, given):
    "The value of a setting from a flag's text or a file's value; ValueError if it cannot be meant"
    expected = types_of(known.type)
    if given is None:
        if type(None) in expected: return None
        raise ValueError(f"{known.name} is empty; give it a value, or leave it out")
    if not expected & set(_READ): return given    # a class of Transformers, which reads it itself
    found = _first_meaning(expected, given)
    if list in expected and isinstance(found, list): found = [_element(known, each) for each in found]
    if found is None: raise ValueError(f"{known.name}={_short(given)} cannot be read; use {_wanted(known, expected)}")
    _check_range(known, found)
    return found


def _first_meaning(expected, given):
    "The value as the first type that it can be of; None if it can be of none"
    for kind, read in _READ.items():
        found = read(given) if kind in expected else None
        if found is not None: return found
    return None


def _element(known, given):
    "An element of a list, of the type that the annotation names"
    kind = next((typing.get_args(t)[0] for t in _alternatives(known.type) if typing.get_args(t)), str)
    found = _READ.get(kind, _read_str)(given)
    if found is None: raise ValueError(f"{known.name} holds {_short(given)}; it must be a list of {kind.__name__}")
    return found


def _read_bool(given):
    if isinstance(given, bool): return given
    return {"true": True, "false": False}.get(given.lower()) if isinstance(given, str) else None


def _read_int(given):
    if isinstance(given, str) and is_number(given): given = parse_yaml(given)
    return given if isinstance(given, int) and not isinstance(given, bool) else None


def _read_float(given):
    if isinstance(given, str) and is_number(given): given = parse_yaml(given)
    return float(given) if isinstance(given, (int, float)) and not isinstance(given, bool) else None


def _read_str(given): return None if isinstance(given, (bool, list, dict)) else str(given)


def _read_list(given):
    "A list; a word or number alone is a list of one"
    if isinstance(given, dict): return None
    return given if isinstance(given, list) else [given]


def _read_dict(given):
    "A map, or its JSON text"
    if isinstance(given, str) and given.lstrip().startswith("{"):
        try: given = json.loads(given)
        except (ValueError, RecursionError): return None
    return given if isinstance(given, dict) else None


_READ = {bool: _read_bool, int: _read_int, float: _read_float, list: _read_list, dict: _read_dict, str: _read_str}


def _wanted(known, expected):
    "What could have been given, in words"
    words = {bool: "true or false", int: f"a {known.range}", float: f"a {known.range}", list: "a list of words",
             dict: "a map", str: "a text"}
    return " or ".join(dict.fromkeys(words[kind] for kind in _READ if kind in expected))


def _short(given):
    text = str(given)
    return text if len(text) <= 60 else text[:57] + "..."
