"""A run at Weights & Biases (W&B): started, continued after a resume, given panels, and ended.

Configuration and metrics go through Transformers' own callback; this module adds the rest. Whatever goes wrong with W&B
is a warning, and the training continues without it. wandb is imported only when a run logs there. The environment
variables `WANDB_MODE`, `WANDB_PROJECT`, `WANDB_NAME` and `WANDB_RUN_ID` have priority over what is chosen here."""
import os
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import WandbCallback

from bgrpo_nb.base.extras import need
from bgrpo_nb.base.files import first_line
from bgrpo_nb.base.network import report_nothing, wandb_mode
from bgrpo_nb.recipes.flags import override

SECONDS_TO_START, SECONDS_TO_END = 30, 60    # without an answer of the server


@contextmanager
def at_wandb(config, main=True): # gives a dict for the best values: metric -> what `best_of` says
    "W&B's run around a training, if the config asks for it and W&B can be had"
    summary, failed = {}, True
    asked = "wandb" in config.report_to
    named = config.run_name, _project_of(config)
    if asked and main and _attempt(start_wandb, config.output_dir, *named) is None: config.report_to.remove("wandb")
    try:
        yield summary
        failed = False
    except KeyboardInterrupt:
        asked = False    # asked twice to stop: nothing is waited for
        raise
    finally:
        if asked: _attempt(stop_wandb, summary, failed)


def _attempt(call, *arguments):
    "What a call to W&B gives; None and a warning where it fails"
    try: return call(*arguments)
    except Exception as e:
        warnings.warn(f"W&B cannot be used ({first_line(e)}); the training continues without it")
        return None


def _project_of(config):
    "The setting `project`; None where it is the default, which is meant for other places"
    project = getattr(config, "project", None)
    return None if project == getattr(TrainingArguments, "project", None) else project


def start_wandb(folder=None, name=None, project=None): # the run's folder; left out: the folder's name, and bgrpo
    "W&B's run object: online if the user is logged in, else offline in the run's folder; a resumed run is continued"
    report_nothing()
    need("wandb", "wandb")
    import wandb
    if wandb.run is not None: return wandb.run
    mode = wandb_mode()
    id_file = Path(folder) / "wandb_run.txt" if folder else None
    run_id = os.environ.get("WANDB_RUN_ID")
    if not run_id and id_file and id_file.exists(): run_id = id_file.read_text().strip()
    named = dict(name=name or (Path(folder).name if folder else None), project=project or "bgrpo")
    try: run = _init(mode, folder, run_id, **named)
    except wandb.Error as e:
        if mode != "online": raise
        warnings.warn(f"W&B cannot be reached ({e}); this run is logged offline, `wandb sync` sends it later")
        run = _init("offline", folder, run_id, **named)
    if id_file and mode != "disabled": id_file.write_text(run.id + "\n")
    return run


def _init(mode, folder, run_id, name, project): # mode: online, offline or disabled
    import wandb
    online = mode == "online"
    settings = wandb.Settings(silent=not online, init_timeout=SECONDS_TO_START, finish_timeout=SECONDS_TO_END)
    return wandb.init(project=os.environ.get("WANDB_PROJECT") or project, dir=folder, mode=mode, id=run_id,
                      name=os.environ.get("WANDB_NAME") or name, resume="allow" if online else None, settings=settings)


def agent_flags(argv, first=()): # flags as given at the terminal, and those that all others override
    """Flags of a process that a `wandb agent` started: a folder of its own, `first`, `argv`, then the agent's choice.

    Without an agent, and with several processes (where every command line has the agent's flags): `argv` itself."""
    sweep = os.environ.get("WANDB_SWEEP_ID")
    if not sweep or int(os.environ.get("WORLD_SIZE", 1)) > 1: return argv
    run = start_wandb()
    chosen = [f"--{name}={value}" for name, value in run.config.items()]
    below = [f"--output_dir=runs/sweeps/{sweep}/trials/{run.id}", *first]
    return override(override(below, argv), chosen)


class Guarded(TrainerCallback):
    "Other callbacks; the first error of one is a warning, and after it none of them is called again"
    def __init__(self, *callbacks): self.callbacks = callbacks

    def hear(self, event, *args, **kwargs):
        "Pass an event on"
        try:
            for callback in self.callbacks: getattr(callback, event)(*args, **kwargs)
        except Exception as e:
            self.callbacks = ()
            warnings.warn(f"W&B failed ({first_line(e)}); the training continues without it")


def _passed_on(event):
    def answer(self, *args, **kwargs): self.hear(event, *args, **kwargs)
    return answer


for _event in [name for name in dir(TrainerCallback) if name.startswith("on_")]:
    setattr(Guarded, _event, _passed_on(_event))


def guard_wandb(trainer, *panels):
    "Where a trainer logs to W&B: add these callbacks, and let no error of W&B reach the training"
    stock = trainer.pop_callback(WandbCallback)
    if stock is not None: trainer.add_callback(Guarded(stock, *panels))


class WandbPanels(TrainerCallback):
    "What Transformers' callback does not log: a histogram of places, a table of completions with verdicts, the figure"
    def __init__(self, folder, completions): # completions() -> columns of equal length
        self.folder, self.completions = Path(folder), completions

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        import wandb
        if not state.is_world_process_zero or wandb.run is None: return
        wandb.config.update({"baseline": args.baseline}, allow_val_change=True)    # chosen by the first evaluation
        panels = {"train/global_step": state.global_step}
        places = (metrics or {}).get("eval_rank_distribution")
        if places: panels["eval/rank_histogram"] = _histogram(places)
        figure = self.folder / "plots" / "history.png"
        if figure.exists(): panels["plots/history"] = wandb.Image(str(figure))
        columns = {name: list(values)[-64:] for name, values in self.completions().items()}
        if columns and all(columns.values()):
            panels["completions"] = wandb.Table(columns=list(columns), data=list(zip(*columns.values())))
        wandb.log(panels)


def _histogram(places): # place of the first valid beam ("1", "2", ... or "none") -> problems
    "One bin for each place; the last one counts the problems without a valid beam"
    import wandb
    width = max((int(place) for place in places if place != "none"), default=1)
    counts = [places.get(str(place), 0) for place in range(1, width + 1)]
    counts.append(places.get("none", 0))
    edges = [k + 0.5 for k in range(len(counts) + 1)]
    return wandb.Histogram(np_histogram=(counts, edges))


def stop_wandb(best=None, failed=False): # best: as `best_of` gives it
    "End W&B's run, with the best values in its summary; nothing happens where no run was started"
    wandb = sys.modules.get("wandb")
    if wandb is None or wandb.run is None: return
    for metric, b in (best or {}).items(): wandb.run.summary[f"best/{metric}"] = b["value"]
    wandb.finish(exit_code=int(failed))
