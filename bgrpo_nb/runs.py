"""A run's folder: what was asked (`config.yaml`), what happened (`metrics.jsonl`), how it ended (`result.json`), and checkpoints.

Plumbing that both trainers share; it knows neither problems nor rewards."""
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from .processes import write_json

PACKAGES = ("bgrpo_nb", "torch", "transformers", "trl", "accelerate", "numpy", "sympy", "python-flint")


def setting(default, help):
    "A documented field of a config"
    return field(default=default, metadata={"help": help})


def _commit():
    "Commit of the checkout this package lies in, with `+` where files differ; None outside one"
    def git(*words): return subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent, timeout=20)
    try:
        head = git("rev-parse", "--short=12", "HEAD")
        if head.returncode: return None
        return head.stdout.strip() + ("+" if git("status", "--porcelain", "--untracked-files=no").stdout.strip() else "")
    except (OSError, subprocess.TimeoutExpired): return None


def accounts(seed):
    "What a result depends on beside its config: seed, commit, versions, machine"
    import torch
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try: found[name] = version(name)
        except PackageNotFoundError: pass
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    machine = dict(cpu=names[0] if names else platform.processor(), cores=os.cpu_count(), threads=torch.get_num_threads(),
                   gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    return dict(seed=seed, date=time.strftime("%Y-%m-%d"), commit=_commit(), versions=found, machine=machine)


def fingerprint(name, lines):
    "Which data a run saw: a file or how it was made, how many lines, and their sum"
    return dict(name=name, n=len(lines), sha256=hashlib.sha256("\n".join(lines).encode()).hexdigest())


def _is_whole(checkpoint):
    "`trainer_state.json` is written last, so a checkpoint without it, or with a part of it, was torn"
    try: return "global_step" in json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError): return False


def _checkpoint_folders(folder): return sorted((p for p in Path(folder).glob("checkpoint-*") if p.name[11:].isdigit()), key=lambda p: int(p.name[11:]))


def checkpoints(folder):
    "Whole checkpoints, oldest first"
    return [p for p in _checkpoint_folders(folder) if _is_whole(p)]


def where_to_resume(folder):
    "The newest whole checkpoint; FileNotFoundError where there is none"
    found = checkpoints(folder)
    if not found: raise FileNotFoundError(f"{folder} holds no whole checkpoint to resume from; leave out --resume to start")
    for torn in _checkpoint_folders(folder):
        if int(torn.name[11:]) > int(found[-1].name[11:]):
            warnings.warn(f"{torn} was not written to its end and is passed over; going on from {found[-1].name}")
    return found[-1]


DERIVED = {"generation_batch_size"}  # TRL refuses it beside what it follows from


def open_run(folder, config, resume=False, main=True):
    "Make or reopen a run's folder, before anything is computed; the checkpoint to resume from, or None. Only the main process writes"
    import yaml
    folder = Path(folder)
    if not resume and (checkpoints(folder) or (folder / "result.json").exists()):
        raise FileExistsError(f"{folder} holds a run already; add --resume to go on with it, or choose another --output_dir")
    checkpoint = where_to_resume(folder) if resume else None
    if not main: return checkpoint
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for torn in _checkpoint_folders(folder):
            if not _is_whole(torn): shutil.rmtree(torn)      # else it would count among the checkpoints that are kept
        _forget_after(folder / "metrics.jsonl", int(checkpoint.name[11:]) if resume else -1)
        if not resume: (folder / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in config.items() if k not in DERIVED}, allow_unicode=True, sort_keys=True), encoding="utf-8")
    except OSError as e: raise OSError(f"the run folder {folder} cannot be written ({e.strerror}); choose another --output_dir") from None
    return checkpoint


def _forget_after(path, step):
    "Drop the lines of steps that will be computed again; whole or not at all"
    kept = [row for row in read_metrics(path) if row.get("step", 0) <= step] if path.exists() else []
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in kept))
    os.replace(part, path)


def _size(n): return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def check_space(args, model):
    "OSError, before the first step, where the disk cannot hold the checkpoints that `args` keeps"
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    one = weights + 2 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)  # Adam's two moments
    every = args.save_steps if args.save_steps >= 1 else args.save_steps * args.max_steps
    saves = 0 if args.save_strategy == "no" else int(args.max_steps // max(every, 1)) + 1
    there = len(checkpoints(args.output_dir))
    n = max(min(saves, (args.save_total_limit or saves) + 1) - there, min(saves, 1))   # a new one is written before the oldest is deleted
    need, free = n * one + weights, shutil.disk_usage(args.output_dir).free
    if free < need: raise OSError(f"the disk of {args.output_dir} has {_size(free)} left, but {n} checkpoints of {_size(one)} and the policy need {_size(need)}; "
                                  "free some space, lower --save_total_limit, or choose another --output_dir")


def read_metrics(path):
    "Rows of a `metrics.jsonl`; a torn last line is passed over"
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try: rows.append(json.loads(line))
        except json.JSONDecodeError: continue
    return rows


class RunLog(TrainerCallback):
    "Appends what a trainer logs to `metrics.jsonl`, one line a time, with the seconds that the run has taken so far"
    def __init__(self, folder):
        self.path = Path(folder) / "metrics.jsonl"
        before = read_metrics(self.path) if self.path.exists() else []
        self.started = time.time() - max((row.get("runtime", 0) for row in before), default=0)

    def runtime(self): return round(time.time() - self.started, 1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs: return
        row = {"step": state.global_step, "runtime": self.runtime(), **{k: v for k, v in logs.items() if isinstance(v, (int, float, dict))}}
        try:
            with self.path.open("a", encoding="utf-8") as file: file.write(json.dumps(row) + "\n")
        except OSError as e:
            raise OSError(f"{self.path} cannot be written at step {state.global_step} ({e.strerror}); the checkpoints before it are whole: "
                          "free some space and go on with --resume") from e


def lower_is_better(metric): return metric.endswith(("loss", "kl", "kl_to_start", "seconds"))


def best_of(rows):
    "Best value of each metric among the validations of a run, and when it was reached: metric -> value, step, runtime"
    best = {}
    for row in rows:
        for key, value in row.items():
            name = key.removeprefix("eval_")
            if name == key or name == "seconds" or not isinstance(value, (int, float)): continue
            sign = -1 if lower_is_better(name) else 1
            if name not in best or sign * value > sign * best[name]["value"]: best[name] = dict(value=value, step=row["step"], runtime=row.get("runtime"))
    return best


def best_table(best):
    "`best_of` as lines of text"
    return "\n".join([f"{'best':<22}{'value':>9}{'step':>8}{'seconds':>10}", *(f"  {name:<20}{b['value']:>9.3f}{b['step']:>8}{b['runtime'] or 0:>10.0f}" for name, b in best.items())])


class PlotHistory(TrainerCallback):
    "Redraws a run's figure after each validation; in a notebook it is shown and replaced in its place"
    def __init__(self, folder, draw): # draw(rows, path)
        self.folder, self.draw, self.shown = Path(folder), draw, None

    def on_evaluate(self, args, state, control, **kwargs):
        if not state.is_world_process_zero: return
        path = self.folder / "plots" / "history.png"
        try: self.draw(read_metrics(self.folder / "metrics.jsonl"), path)
        except OSError as e: return warnings.warn(f"{path} cannot be drawn ({e})")     # no reason to end a training
        if not args.disable_tqdm and _in_notebook(): self._show(path)

    def _show(self, path):
        from IPython.display import Image, display
        if self.shown is None: self.shown = display(Image(path), display_id=True)
        else: self.shown.update(Image(path))


def _in_notebook(): return "IPython" in sys.modules and hasattr(sys.modules["IPython"].get_ipython(), "kernel")


class StopCleanly(TrainerCallback):
    "Ctrl-C or SIGTERM, at any process: all finish the step, save, end. A second Ctrl-C ends at once"
    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self): self.asked, self.everywhere, self.before = False, False, {}

    def __enter__(self):
        try: self.before = {s: signal.signal(s, self._ask) for s in self.SIGNALS}
        except ValueError: self.before = {}  # not the main thread: signals stay as they are
        return self

    def __exit__(self, *error):
        for s, handler in self.before.items(): signal.signal(s, handler)

    def _ask(self, number, frame):
        if self.asked: raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:
            from accelerate.utils import gather_object
            self.everywhere = any(gather_object([self.asked]))   # a signal does not reach all processes within the same step
        else: self.everywhere = self.asked
        if self.everywhere: control.should_save = control.should_training_stop = True


class Progress(TrainerCallback):
    "One bar with the time left and the newest value of a few logged keys"
    def __init__(self, keys): self.keys, self.values, self.bar = keys, {}, None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero: self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.values |= {k: f"{logs[k]:.3f}" for k in self.keys if isinstance((logs or {}).get(k), float)}
        if self.bar is not None: self.bar.set_postfix(self.values)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None: self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None: self.bar.close()


def show_progress(trainer, *keys):
    "`Progress` instead of a trainer's own bar and printed dictionaries; nothing at all under `disable_tqdm`"
    disable_progress_bar()  # one for each file that is read or written
    for callback in (ProgressCallback, PrinterCallback): trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm: trainer.add_callback(Progress(keys))


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
