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
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bgrpo_nb.base.checkpoints import can_resume, checkpoints, newest_checkpoint, processes_of, set_aside, step_of
from bgrpo_nb.base.files import write_json, write_text
from bgrpo_nb.base.ownership import check_owner, claim_folder, locked
from bgrpo_nb.base.strict_yaml import read_yaml

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


def describe_text(path):
    "`describe_lines` of a text file; empty lines, and how a line ends, do not count"
    if not Path(path).is_file(): raise FileNotFoundError(f"there is no file {path}; `bgrpo generate` makes one")
    text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    return describe_lines(str(path), [line.strip() for line in text.splitlines() if line.strip()])


# Opening a run

DERIVED = {"generation_batch_size"}  # not written to config.yaml: TRL refuses it together with what it follows from
HISTORY = "changes.jsonl"            # what was changed when a run was resumed
INPUTS = "inputs.json"               # the content of what a run reads: setting -> name, SHA-256, lines of a text

# What may change when a run is resumed: where it runs, what it reports, how long it is, and when it validates and saves
MAY_CHANGE = frozenset("""
    output_dir resume use_cpu bf16 fp16 tf32 bf16_full_eval fp16_full_eval local_rank ddp_backend ddp_timeout
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers torch_compile torch_compile_backend
    torch_compile_mode gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing
    activation_checkpointing_kwargs per_device_train_batch_size
    per_device_eval_batch_size prompts_at_once trie_elements trie_attention torch_empty_cache_steps
    dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor dataloader_persistent_workers
    report_to run_name project trackio_space_id disable_tqdm log_level log_level_replica log_on_each_node logging_dir
    logging_steps logging_first_step logging_strategy logging_nan_inf_filter log_completions
    num_completions_to_print log_unique_prompts include_num_input_tokens_seen include_tokens_per_second
    skip_memory_metrics push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision
    max_steps num_train_epochs eval_strategy eval_steps eval_delay eval_on_start
    save_strategy save_steps save_total_limit save_on_each_node load_best_model_at_end""".split())


@contextmanager
def open_run(folder, config, resume=False, main=True, fixed=(), inputs=dict): # inputs: () -> as of `check_inputs`
    """A run's folder, made or opened again before anything is computed, and locked while the block runs.

    Gives the checkpoint to resume from, or None. Only the `main` process writes. FileExistsError if the folder holds
    another run or is somebody else's, FileNotFoundError if there is nothing to resume, ValueError for a setting that is
    not the run's (of those that may change, `fixed` may not) or an input with another content (see `check_inputs`),
    OSError if the folder cannot be written."""
    folder, config = Path(folder), _as_written(config)
    check_owner(folder, *RUNS, was_ours=is_run)
    if not resume and (can_resume(folder) or (folder / "result.json").exists()):
        raise FileExistsError(f"{folder} already holds a run; "
                              "add --resume to continue it, or choose another --output_dir")
    checkpoint = newest_checkpoint(folder) if resume else None
    if resume: check_recipe(folder, config)
    changed = _changes(folder, config, fixed) if resume else {}
    if resume:
        _check_batch(read_run_config(folder), config, processes_of(checkpoint))
        _check_length(config, checkpoint)
    found = inputs() if main or resume else {}    # now that the settings are the run's
    if resume: check_inputs(folder, found)
    if not main:
        yield checkpoint
        return
    claim_folder(folder, *RUNS, was_ours=is_run)
    with locked(folder):
        try: _prepare(folder, config, checkpoint, changed, found)
        except OSError as e:
            message = f"the run folder {folder} cannot be written ({e.strerror or e}); choose another --output_dir"
            raise OSError(message) from None
        yield checkpoint


RUNS = ("run", "demo")    # the kinds of folders that hold a run


def is_run(folder):
    "Did an earlier version, which wrote no mark, leave this run here?"
    if not (Path(folder) / "metrics.jsonl").is_file(): return False
    try: recorded = read_run_config(folder)
    except (OSError, ValueError): return False
    return {"output_dir", "held_out", "degrees", "resume"} <= recorded.keys()


def read_run_config(folder):
    "What config.yaml in a run's folder says; ValueError if it cannot be read"
    return read_yaml(Path(folder) / "config.yaml")


def describe_files(config, settings): # settings that name a text file
    "What these files hold, setting -> `describe_text`"
    return {name: describe_text(config[name]) for name in settings if config.get(name)}


def check_inputs(folder, inputs): # inputs: setting -> dict(name, sha256), and n, the lines of a text
    "ValueError where an input is not what the run in a folder was begun with"
    recorded = _read_inputs(folder)
    for setting, now in inputs.items():
        was = recorded.get(setting, now)    # a run of an earlier version has no record
        if was["sha256"] == now["sha256"]: continue
        begun, here = (f" ({each['n']} lines)" if "n" in each else "" for each in (was, now))
        raise ValueError(f"{setting}={now['name']} has another content{here} than when the run in {folder} was "
                         f"begun{begun}; restore it to resume, or begin another run in another --output_dir")


def _read_inputs(folder):
    "What a run recorded of the files that it reads; empty for a run of an earlier version"
    path = Path(folder) / INPUTS
    if not path.exists(): return {}
    try: return {name: was | dict(sha256=was["sha256"]) for name, was in json.loads(path.read_text()).items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} cannot be read; restore it, or delete it to resume without a check of the policy "
                         "and the problems that the run was begun with") from None


RECIPES = {"sft": "vocabulary", "train": "rollout"}    # command -> a setting that it alone has


def check_recipe(folder, names):
    "ValueError if the run in a folder is of another command than the one with these settings"
    recorded = read_run_config(folder)
    for command, own in RECIPES.items():
        if own not in recorded or own in names or not any(other in names for other in RECIPES.values()): continue
        raise ValueError(f"{folder} holds a run of bgrpo {command}; resume it with that command, or choose another "
                         "--output_dir")


def _prepare(folder, config, checkpoint, changed, inputs): # checkpoint None: a new run
    "Remove what a killed run left half done, and write the config of a new one"
    set_aside(folder, checkpoint)
    if inputs: write_json(folder / INPUTS, inputs)
    else: (folder / INPUTS).unlink(missing_ok=True)
    step = step_of(checkpoint) if checkpoint else -1
    _forget_after(folder / "metrics.jsonl", step)
    if checkpoint is None: _write_config(folder, config)
    elif changed:
        _write_config(folder, read_run_config(folder) | {name: new for name, (_, new) in changed.items()})
        row = json.dumps({"step": step, "date": time.strftime("%Y-%m-%d"), **changed})
        with (folder / HISTORY).open("a", encoding="utf-8") as file: file.write(row + "\n")


def _as_written(config):
    "A config as config.yaml holds it; -1 steps, which is how Transformers says that epochs decide, are left out"
    import yaml
    asked = {name: value for name, value in config.items() if name not in DERIVED}
    if asked.get("max_steps") == -1: asked["max_steps"] = None
    return yaml.safe_load(yaml.safe_dump(asked))


def _write_config(folder, config):
    import yaml
    write_text(folder / "config.yaml", yaml.safe_dump(config, allow_unicode=True, sort_keys=True))


def _changes(folder, config, fixed):
    "What differs from the run that was begun, name -> (was, is); ValueError for what may not"
    recorded = read_run_config(folder)
    found = {name: (recorded[name], value) for name, value in config.items()
             if name in recorded and recorded[name] != value and name not in ("output_dir", "resume")}
    for name, (was, now) in found.items():
        if name in MAY_CHANGE and name not in fixed: continue
        raise ValueError(f"{name}={now} is not what the run in {folder} was begun with, {name}={was}; "
                         "leave it out to resume, or begin another run in another --output_dir")
    return found


def _check_batch(recorded, config, processes):
    "ValueError if another number of processes, or of rows on each, would make batches of another size"
    name, now = "per_device_train_batch_size", int(os.environ.get("WORLD_SIZE", 1))
    if not recorded.get(name) or not config.get(name): return
    rows = recorded[name] * processes
    if config[name] * now == rows: return
    way = f"give --{name} {rows // now}" if rows % now == 0 else f"resume with {processes}"
    raise ValueError(f"{name}={config[name]} on {now} processes makes other batches than the run's, which had "
                     f"{recorded[name]} on {processes}; {way}")


def _check_length(config, checkpoint):
    "ValueError if the run is to be shorter than it is already"
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    name, taken = "max_steps", step_of(checkpoint)
    if not config.get(name): name, taken = "num_train_epochs", state.get("epoch") or 0
    asked = config.get(name)
    if not asked or asked > taken - 1e-3: return    # passes are counted as sums of shares of one
    raise ValueError(f"{name}={asked} is less than the {taken:g} that the run has behind it; give {taken:g} to end it "
                     "there, or more to continue")


def _forget_after(path, step):
    "Drop the rows of steps that will be computed again"
    rows = read_metrics(path) if path.exists() else []
    earlier = [row for row in rows if row.get("step", 0) <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in earlier))


# Space on the disk

def _megabytes(n): # bytes
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def _bytes_of(parameters): return sum(p.numel() * p.element_size() for p in parameters)


def _bytes_of_averages(args, model):
    "Of the weights of the last step, and of the average and the start in float32, where they are kept"
    along, start = getattr(args, "ema_decay", 0) > 0, getattr(args, "average_with_start", 1) < 1
    trained = [p for p in model.parameters() if p.requires_grad]
    last = _bytes_of(trained) if along or start else 0
    return last + (along + start) * 4 * sum(p.numel() for p in trained)


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
    checkpoint = policy + adam_moments + reference + _bytes_of_averages(args, model)
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
        try: row = json.loads(line)
        except (ValueError, RecursionError): continue
        if isinstance(row, dict): rows.append(row)
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
