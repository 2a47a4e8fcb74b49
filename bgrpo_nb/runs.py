"""A run's folder: what was asked (`config.yaml`), what happened (`metrics.jsonl`), how it ended (`result.json`), and checkpoints.

Plumbing that both trainers share; it knows neither problems nor rewards."""
import json
import os
import platform
import signal
import subprocess
import time
from dataclasses import field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

PACKAGES = ("bgrpo_nb", "torch", "transformers", "trl", "accelerate", "numpy", "sympy", "python-flint")


def setting(default, help):
    "A documented field of a config"
    return field(default=default, metadata={"help": help})


def write_json(path, content):
    "Write `content` whole or not at all"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    os.replace(part, path)
    return path


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


def checkpoints(folder):
    "Whole checkpoints, oldest first; `trainer_state.json` is written last, so one without it was torn"
    whole = [p.parent for p in Path(folder).glob("checkpoint-*/trainer_state.json") if p.parent.name[11:].isdigit()]
    return sorted(whole, key=lambda p: int(p.name[11:]))


def where_to_resume(folder):
    "The newest whole checkpoint; FileNotFoundError where there is none"
    found = checkpoints(folder)
    if not found: raise FileNotFoundError(f"{folder} holds no whole checkpoint to resume from; leave out --resume to start")
    return found[-1]


def open_run(folder, config, resume=False):
    "Make or reopen a run's folder, before anything is computed; the checkpoint to resume from, or None"
    import yaml
    folder = Path(folder)
    if resume:
        checkpoint = where_to_resume(folder)
        _forget_after(folder / "metrics.jsonl", json.loads((checkpoint / "trainer_state.json").read_text())["global_step"])
        return checkpoint
    if checkpoints(folder) or (folder / "result.json").exists():
        raise FileExistsError(f"{folder} holds a run already; add --resume to go on with it, or choose another --output_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text("")
    except OSError as e: raise OSError(f"the run folder {folder} cannot be written ({e.strerror}); choose another --output_dir") from None
    (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=True), encoding="utf-8")
    return None


def _forget_after(path, step):
    "Drop the lines of steps that will be computed again"
    kept = [row for row in read_metrics(path) if row.get("step", 0) <= step] if path.exists() else []
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))


def read_metrics(path):
    "Rows of a `metrics.jsonl`; a torn last line is passed over"
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try: rows.append(json.loads(line))
        except json.JSONDecodeError: continue
    return rows


class RunLog(TrainerCallback):
    "Appends what a trainer logs to `metrics.jsonl`, one line a time"
    def __init__(self, folder): self.path = Path(folder) / "metrics.jsonl"

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs: return
        row = {"step": state.global_step, **{k: v for k, v in logs.items() if isinstance(v, (int, float, dict))}}
        with self.path.open("a", encoding="utf-8") as file: file.write(json.dumps(row) + "\n")


class StopCleanly(TrainerCallback):
    "Ctrl-C or SIGTERM: finish the step, save, end. A second Ctrl-C ends at once"
    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self): self.asked, self.before = False, {}

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
        if self.asked: control.should_save = control.should_training_stop = True


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
