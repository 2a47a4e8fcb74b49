"""A run's folder: what was asked (`config.yaml`), what happened (`metrics.jsonl`), how it ended (`result.json`), and checkpoints.

It knows neither problems nor rewards, and loads no torch when it is imported."""
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


PACKAGES = ("bgrpo_nb", "torch", "transformers", "trl", "accelerate", "numpy", "sympy", "python-flint")


def _commit():
    "Commit of the checkout this package lies in, with `+` where files differ; None outside one"
    def git(*words): return subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent, timeout=20)
    try:
        head = git("rev-parse", "--short=12", "HEAD")
        if head.returncode: return None
        return head.stdout.strip() + ("+" if git("status", "--porcelain", "--untracked-files=no").stdout.strip() else "")
    except (OSError, subprocess.TimeoutExpired): return None


def provenance(seed):
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


def describe_lines(name, lines):
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


def newest_checkpoint(folder):
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
    checkpoint = newest_checkpoint(folder) if resume else None
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
