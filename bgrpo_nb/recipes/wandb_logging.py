"""A run at W&B: started, continued, filled with panels, and ended."""
import os
import sys
import warnings
from pathlib import Path

from transformers import TrainerCallback


def start_wandb(folder=None):
    "W&B's run: online where somebody is logged in, else offline in the run's folder; WANDB_MODE and WANDB_PROJECT have the last word"
    import wandb
    if wandb.run is not None: return wandb.run
    mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
    named = Path(folder) / "wandb_run.txt" if folder else None
    known = named.read_text().strip() if named and named.exists() else None
    def start(mode):
        return wandb.init(project=os.environ.get("WANDB_PROJECT", "bgrpo"), dir=folder, mode=mode, id=os.environ.get("WANDB_RUN_ID") or known,
                          name=Path(folder).name if folder else None, resume="allow" if mode == "online" else None,
                          settings=wandb.Settings(silent=mode != "online"))
    try: run = start(mode)
    except wandb.Error as e:
        if mode != "online": raise
        warnings.warn(f"W&B cannot be reached ({e}); this run is logged offline, `wandb sync` sends it later")
        run = start("offline")
    if named and mode != "disabled": named.write_text(run.id + "\n")
    return run


def agent_flags(argv):
    "Flags of a process that a `wandb agent` started: a folder of its own, then `argv`, then what the agent chose; otherwise `argv`"
    sweep = os.environ.get("WANDB_SWEEP_ID")
    if not sweep or int(os.environ.get("WORLD_SIZE", 1)) > 1: return argv    # several processes: the agent's flags are on every command line
    run = start_wandb()
    return [f"--output_dir=runs/sweeps/{sweep}/trials/{run.id}", *argv, *(f"--{name}={value}" for name, value in run.config.items())]


class WandbPanels(TrainerCallback):
    "What Hugging Face's callback does not log: a histogram of places, a table of completions with their verdicts, the plot"
    def __init__(self, folder, completions): # completions() -> columns of equal length
        self.folder, self.completions = Path(folder), completions

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        import wandb
        if not state.is_world_process_zero or wandb.run is None: return
        panels, plot = {}, self.folder / "plots" / "history.png"
        if places := (metrics or {}).get("eval_rank_distribution"):
            counts = [places.get(str(k), 0) for k in range(1, 1 + max((int(k) for k in places if k != "none"), default=1))] + [places.get("none", 0)]
            panels["eval/rank_histogram"] = wandb.Histogram(np_histogram=(counts, [k + 0.5 for k in range(len(counts) + 1)]))   # the last bin: no valid beam
        if plot.exists(): panels["plots/history"] = wandb.Image(str(plot))
        columns = {name: list(values)[-64:] for name, values in self.completions().items()}
        if columns and all(columns.values()): panels["completions"] = wandb.Table(columns=list(columns), data=list(zip(*columns.values())))
        wandb.log({**panels, "train/global_step": state.global_step})


def stop_wandb(best=None, failed=False):
    "End W&B's run, with the best values in its summary"
    wandb = sys.modules.get("wandb")
    if wandb is None or wandb.run is None: return
    for name, b in (best or {}).items(): wandb.run.summary[f"best/{name}"] = b["value"]
    wandb.finish(exit_code=int(failed))
