"""A run at Weights & Biases (W&B): started, continued after a resume, given panels, and ended.

Configuration and metrics go through Transformers' own callback; this module adds the rest. wandb is imported only when
a run logs there. The environment variables `WANDB_MODE`, `WANDB_PROJECT` and `WANDB_RUN_ID` have priority over what
is chosen here."""
import os
import sys
import warnings
from pathlib import Path

from transformers import TrainerCallback


def start_wandb(folder=None): # the run's folder
    "W&B's run object: online if the user is logged in, else offline in the run's folder; a resumed run is continued"
    import wandb
    if wandb.run is not None: return wandb.run
    mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
    id_file = Path(folder) / "wandb_run.txt" if folder else None
    run_id = os.environ.get("WANDB_RUN_ID")
    if not run_id and id_file and id_file.exists(): run_id = id_file.read_text().strip()
    try: run = _init(mode, folder, run_id)
    except wandb.Error as e:
        if mode != "online": raise
        warnings.warn(f"W&B cannot be reached ({e}); this run is logged offline, `wandb sync` sends it later")
        run = _init("offline", folder, run_id)
    if id_file and mode != "disabled": id_file.write_text(run.id + "\n")
    return run


def _init(mode, folder, run_id): # mode: online, offline or disabled
    import wandb
    online = mode == "online"
    return wandb.init(project=os.environ.get("WANDB_PROJECT", "bgrpo"), dir=folder, mode=mode, id=run_id,
                      name=Path(folder).name if folder else None, resume="allow" if online else None,
                      settings=wandb.Settings(silent=not online))


def agent_flags(argv): # flags as given at the terminal
    """Flags of a process that a `wandb agent` started: a folder of its own, then `argv`, then what the agent chose.

    Without an agent, and with several processes (where every command line has the agent's flags): `argv` itself."""
    sweep = os.environ.get("WANDB_SWEEP_ID")
    if not sweep or int(os.environ.get("WORLD_SIZE", 1)) > 1: return argv
    run = start_wandb()
    chosen = [f"--{name}={value}" for name, value in run.config.items()]
    return [f"--output_dir=runs/sweeps/{sweep}/trials/{run.id}", *argv, *chosen]


class WandbPanels(TrainerCallback):
    "What Transformers' callback does not log: a histogram of places, a table of completions with verdicts, the figure"
    def __init__(self, folder, completions): # completions() -> columns of equal length
        self.folder, self.completions = Path(folder), completions

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        import wandb
        if not state.is_world_process_zero or wandb.run is None: return
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
