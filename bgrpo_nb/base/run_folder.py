"""The folder of a run: what was asked (`config.yaml`), what happened (`metrics.jsonl`), how it ended (`result.json`),
and checkpoints in the format of Hugging Face.

This module opens such a folder, reads it, and records what a result depends on. Importing it loads no torch."""
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

from bgrpo_nb.base.files import write_text

PACKAGES = ("bgrpo_nb", "torch", "transformers", "trl", "accelerate", "numpy", "sympy", "python-flint")


# Provenance

def _git(*words):
    "A git command in this package's checkout"
    return subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent, timeout=20)


def _commit():
    "Commit of this package's checkout, with `+` if tracked files differ from it; None outside a checkout"
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        if head.returncode: return None
        changed = _git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    except (OSError, subprocess.TimeoutExpired): return None
    return head.stdout.strip() + ("+" if changed else "")


def _versions():
    "Versions of Python and of the packages that a result depends on"
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try: found[name] = version(name)
        except PackageNotFoundError: pass
    return found


def _cpu():
    "The processor's name"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def provenance(seed):
    "What a result depends on besides its config: seed, date, commit, versions, machine; loads torch"
    import torch
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = dict(cpu=_cpu(), cores=os.cpu_count(), threads=torch.get_num_threads(), gpu=gpu)
    return dict(seed=seed, date=time.strftime("%Y-%m-%d"), commit=_commit(), versions=_versions(), machine=machine)


def describe_lines(name, lines):
    "Which data a run saw: its name (a file, or how it was made), the number of lines, and their SHA-256"
    return dict(name=name, n=len(lines), sha256=hashlib.sha256("\n".join(lines).encode()).hexdigest())


# Checkpoints

def _step_of(checkpoint): # a folder `checkpoint-STEP`
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _is_whole(checkpoint):
    "Was this checkpoint written to its end? `trainer_state.json` is the last of its files"
    try: return "global_step" in json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError): return False


def _checkpoint_folders(folder):
    "Folders named `checkpoint-STEP`, whole or not, oldest first"
    found = Path(folder).glob("checkpoint-*")
    numbered = [path for path in found if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(numbered, key=_step_of)


def checkpoints(folder):
    "The whole checkpoints in a run's folder, oldest first"
    return [path for path in _checkpoint_folders(folder) if _is_whole(path)]


def newest_checkpoint(folder):
    "The newest whole checkpoint in a run's folder; FileNotFoundError if there is none"
    whole = checkpoints(folder)
    if not whole:
        raise FileNotFoundError(f"{folder} holds no whole checkpoint to resume from; leave out --resume to start")
    newest = whole[-1]
    for torn in _checkpoint_folders(folder):
        if _step_of(torn) > _step_of(newest):
            warnings.warn(f"{torn} was not written to its end and is ignored; the run continues from {newest.name}")
    return newest


# Opening a run

DERIVED = {"generation_batch_size"}  # not written to config.yaml: TRL refuses it together with what it follows from


def open_run(folder, config, resume=False, main=True):
    """Make the folder of a run, or open it again, before anything is computed.

    Returns the checkpoint to resume from, or None. Only the `main` process writes. FileExistsError if the folder holds
    another run, FileNotFoundError if there is nothing to resume, OSError if the folder cannot be written."""
    folder = Path(folder)
    if not resume and (checkpoints(folder) or (folder / "result.json").exists()):
        raise FileExistsError(f"{folder} already holds a run; "
                              "add --resume to continue it, or choose another --output_dir")
    checkpoint = newest_checkpoint(folder) if resume else None
    if not main: return checkpoint
    try: _prepare(folder, config, checkpoint)
    except OSError as e:
        message = f"the run folder {folder} cannot be written ({e.strerror}); choose another --output_dir"
        raise OSError(message) from None
    return checkpoint


def _prepare(folder, config, checkpoint): # None: a new run
    "Remove what a killed run left half done, and write the config of a new one"
    folder.mkdir(parents=True, exist_ok=True)
    for path in _checkpoint_folders(folder):
        if not _is_whole(path): shutil.rmtree(path)      # the trainer would count it among its save_total_limit
    _forget_after(folder / "metrics.jsonl", _step_of(checkpoint) if checkpoint else -1)
    if not checkpoint: _write_config(folder / "config.yaml", config)


def _write_config(path, config):
    import yaml
    asked = {name: value for name, value in config.items() if name not in DERIVED}
    path.write_text(yaml.safe_dump(asked, allow_unicode=True, sort_keys=True), encoding="utf-8")


def _forget_after(path, step):
    "Drop the rows of steps that will be computed again"
    rows = read_metrics(path) if path.exists() else []
    earlier = [row for row in rows if row.get("step", 0) <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in earlier))


# Space on the disk

def _megabytes(n): # bytes
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def _bytes_of(parameters): return sum(p.numel() * p.element_size() for p in parameters)


def _most_checkpoints(args):
    "How many further checkpoints a run with these TrainingArguments will hold at one time"
    if args.save_strategy == "no": saves = 0
    elif args.max_steps < 1: saves = args.save_total_limit or 1   # epochs: how many steps they have is not known yet
    else:
        every = args.save_steps if args.save_steps >= 1 else args.save_steps * args.max_steps   # below 1: a share
        saves = int(args.max_steps // max(every, 1)) + 1
    at_one_time = min(saves, (args.save_total_limit or saves) + 1)    # the oldest is deleted after a new one is written
    return max(at_one_time - len(checkpoints(args.output_dir)), min(saves, 1))


def check_space(args, model):
    "OSError, before the first step, if the disk is too small for the checkpoints that these TrainingArguments keep"
    trained = _bytes_of(p for p in model.parameters() if p.requires_grad)
    whole = _bytes_of(model.parameters())
    policy = trained if hasattr(model, "peft_config") else whole         # of adapters, they alone are written
    adam_moments = 2 * trained
    reference = whole if getattr(args, "sync_ref_model", False) else 0
    checkpoint = policy + adam_moments + reference
    n = _most_checkpoints(args)
    need = n * checkpoint + policy
    free = shutil.disk_usage(args.output_dir).free
    if free < need:
        raise OSError(f"the disk of {args.output_dir} has {_megabytes(free)} left, but {n} checkpoints of "
                      f"{_megabytes(checkpoint)} and the policy need {_megabytes(need)}; "
                      "free some space, lower --save_total_limit, or choose another --output_dir")


# Reading a run

def read_metrics(path):
    "Rows of a `metrics.jsonl`; a line that was not written to its end is ignored"
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try: rows.append(json.loads(line))
        except json.JSONDecodeError: continue
    return rows


def lower_is_better(metric):
    "Is a smaller value of this metric the better one? So it is for losses, divergences and seconds"
    return metric.endswith(("loss", "kl", "kl_to_start", "seconds"))


def _validation(row):
    "The metrics of a row that a validation wrote, without the time it took"
    found = {key.removeprefix("eval_"): value for key, value in row.items() if key.startswith("eval_")}
    return {metric: value for metric, value in found.items()
            if metric != "seconds" and isinstance(value, (int, float))}


def best_of(rows):
    "Best value of each metric among a run's validations, and when: metric -> dict(value, step, runtime in seconds)"
    best = {}
    for row in rows:
        for metric, value in _validation(row).items():
            sign = -1 if lower_is_better(metric) else 1
            if metric not in best or sign * value > sign * best[metric]["value"]:
                best[metric] = dict(value=value, step=row["step"], runtime=row.get("runtime"))
    return best


def best_table(best):
    "`best_of` as lines of text"
    lines = [f"{'best':<22}{'value':>9}{'step':>8}{'seconds':>10}"]
    for metric, b in best.items():
        lines.append(f"  {metric:<20}{b['value']:>9.3f}{b['step']:>8}{b['runtime'] or 0:>10.0f}")
    return "\n".join(lines)
