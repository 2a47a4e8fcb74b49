"""Settings of Transformers' trainer that it looks at only when it starts, checked when a config is made.

Both recipes use them, so that what cannot work is one line before any work, and nothing that was given is ignored."""
import inspect
from dataclasses import MISSING, fields

import torch
from transformers import get_scheduler
from transformers.integrations import integration_utils
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from bgrpo_nb.base.files import first_line

OF_EVERY_SCHEDULER = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}


def given(config):
    "Settings that differ from their default, name -> value; one that was given with its default value is none of them"
    default_of = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(config)}
    values = {name: getattr(config, name) for name in default_of}
    return {name: value for name, value in values.items() if value != default_of[name]}


def refuse(config, **why): # name of a setting -> why it would not be read, and what to do
    "ValueError for the first of these settings that was given"
    found = given(config)
    for name, words in why.items():
        if name in found: raise ValueError(f"{name}={found[name]} {words}")


def check_reports(args): # TrainingArguments
    "ValueError if `report_to` names what is not known or not installed; without W&B a run goes on, with a warning"
    known = integration_utils.INTEGRATION_TO_CALLBACK
    there = integration_utils.get_available_reporting_integrations()
    for name in args.report_to:
        if name not in known: raise ValueError(f"report_to={name} is not known; use none or one of {', '.join(known)}")
        if name == "wandb" or name in there: continue
        try: known[name]()
        except (RuntimeError, ImportError) as e:
            raise ValueError(f"report_to={name} cannot be used ({first_line(e)}); install what it needs, or leave it "
                             "out") from None


def check_scheduler(args): # TrainingArguments
    "ValueError if `lr_scheduler_type` cannot be had with `lr_scheduler_kwargs`, which some schedulers would ignore"
    kwargs, kind = args.lr_scheduler_kwargs or {}, args.lr_scheduler_type
    if not isinstance(kwargs, dict):
        raise ValueError(f"lr_scheduler_kwargs={kwargs} cannot be read; use a map, such as {{\"min_lr_rate\": 0.1}}")
    known = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[kind]).parameters
    names = [name for name in known if name not in OF_EVERY_SCHEDULER]
    takes = ", ".join(names) or "none"
    takes_any = any(p.kind == p.VAR_KEYWORD for p in known.values())
    for name in kwargs:
        if takes_any or name in names: continue
        raise ValueError(f"lr_scheduler_kwargs has {name!r}, which lr_scheduler_type={kind.value} does not take; "
                         f"it takes: {takes}")
    try: _rates(args, kwargs)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as e:
        raise ValueError(f"lr_scheduler_type={kind.value} does not work with lr_scheduler_kwargs={kwargs} "
                         f"({first_line(e)}); it takes: {takes}") from None


def _rates(args, kwargs):
    "The scheduler, and its learning rate at a few steps; the settings of many are read in the middle of a run"
    steps = max(args.max_steps, 1)
    warmup = args.get_warmup_steps(steps)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate or 1.0)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup, steps, dict(kwargs))
    for rate in getattr(scheduler, "lr_lambdas", ()):
        for step in (0, warmup, (warmup + steps) // 2, steps): float(rate(step))
