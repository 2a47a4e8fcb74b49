"""Runs, wherever they are told of: folders, an Optuna storage, W&B, and what was exported from it.

Plumbing of `11_analysis`; it knows no engine, and ends in a list of `Run`."""
import ast
import csv
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import yaml

METRIC = "eval_beam_rank_score"
SETTINGS_CALLED_EVAL = {f"eval_{name}" for name in ("strategy", "steps", "on_start", "limit", "problems", "delay", "accumulation_steps", "do_concat_batches", "use_gather_object")}

@dataclass
class Run:
    "One trial; parameters by their flags' names, history one dictionary a validation"
    run: str                    # its name
    state: str                  # finished, failed, pruned or running
    parameters: dict
    history: list[dict] = field(default_factory=list) # `step` and metrics named `eval_*`
    attempt: int | None = None  # 0 the first
    planned: int | None = None  # number of its point in the plan
    seed: int | None = None
    seconds: float | None = None
    commit: str | None = None
    date: str | None = None     # YYYY-MM-DD
    folder: str | None = None
    reason: str = ""            # why it is not finished


def mend(value): # None, bool, int, float or text
    "What a value was before somebody wrote it down"
    if isinstance(value, np.generic): value = value.item()
    if isinstance(value, str) and re.fullmatch(r"\s*\[.*\]\s*", value, re.S):
        try: value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError): pass
    if isinstance(value, (list, tuple)): return ", ".join(map(str, value))
    if not isinstance(value, str): return value
    text = value.strip()
    if text.lower() in ("", "none", "null"): return None
    if text.lower() in ("true", "false"): return text.lower() == "true"
    if re.fullmatch(r"[-+]?\d+", text): return int(text)
    try: return text if "_" in text else float(text)
    except ValueError: return text


def metrics_of(row: dict) -> dict[str, float]: # by the name `eval_*`
    "The numbers of a validation"
    by_degree = {f"eval_{m}_{degree}": v for key in ("eval_by_degree", "eval/by_degree") for degree, part in (row.get(key) or {}).items() for m, v in part.items()}
    row = {re.sub(r"^eval[/_]by_degree\.([^.]+)\.(.+)$", r"eval_\2_\1", k): v for k, v in row.items()} # W&B's history has no dictionaries
    named = {f"eval_{found[1]}": mend(v) for k, v in (row | by_degree).items() if (found := re.fullmatch(r"eval[/_](.+)", k)) and not isinstance(v, (dict, list))}
    return {k: float(v) for k, v in named.items() if k not in SETTINGS_CALLED_EVAL and isinstance(v, (int, float)) and not isinstance(v, bool)}

def validations(rows: list[dict]) -> list[dict]: # `step` and metrics
    "The rows of a log that validate"
    steps = [next((mend(r[k]) for k in ("step", "train/global_step", "_step") if r.get(k) is not None), None) for r in rows]
    return [{"step": step, **m} for step, r in zip(steps, rows) if (m := metrics_of(r))]


def _load(path: Path):
    "JSON or YAML, None where there is no file"
    if not path.is_file(): return None
    text = path.read_text(encoding="utf-8")
    try: return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as e: raise ValueError(f"{path} cannot be read ({' '.join(str(e).split())}); mend it, or leave this run out") from None

def _rows(path: Path) -> list[dict]: # a torn line is passed over
    def read(line):
        try: return json.loads(line)
        except ValueError: return None
    return [row for line in path.read_text(encoding="utf-8").splitlines() if isinstance(row := read(line), dict)] if path.is_file() else []

def read_folder(folder) -> Run:
    "A run's or a trial's folder"
    folder = Path(folder).resolve()
    trial, result, failure = (_load(folder / f"{name}.json") for name in ("config", "result", "failure"))
    config, trial, result = _load(folder / "config.yaml") or {}, trial or {}, result or {}
    state = "failed" if failure else "pruned" if (folder / "pruned.json").is_file() else "finished" if result and not result.get("stopped") else "running"
    reason = failure.get("reason") or "no reason was written" if failure else {"pruned": "lagged behind", "running": "no result.json yet: it runs, or was killed"}.get(state, "")
    seed = next((v for v in (trial.get("seed"), trial.get("parameters", {}).get("seed"), result.get("seed"), config.get("seed")) if v is not None), None)
    return Run(folder.name, state, (trial.get("fixed") or {}) | trial["parameters"] if "parameters" in trial else config, validations(_rows(folder / "metrics.jsonl")),
               trial.get("attempt"), trial.get("planned"), mend(seed), result.get("seconds"), result.get("commit"), result.get("date"), str(folder), reason)


def read_study(where, study: str | None = None, metric: str = METRIC) -> list[Run]: # metric: what Optuna was told
    "Trials of a study; those that wait in the queue are no runs yet"
    import optuna
    from optuna.storages.journal import JournalFileBackend
    path = Path(str(where)).resolve()
    file = path if path.is_file() else Path(str(where).removeprefix("sqlite:///"))
    if "://" not in str(where) or str(where).startswith("sqlite:///"):
        if not file.is_file(): raise ValueError(f"there is no file {file}; give an Optuna journal, or the URL of a storage that exists")   # Optuna would make an empty one
    try:
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(path))) if path.is_file() else str(where)
        names = sorted(optuna.get_all_study_names(storage))
    except Exception as e: raise ValueError(f"{where} is no Optuna storage ({type(e).__name__}: {' '.join(str(e).split())[:200]}); give a journal file or a storage's URL") from None
    if study is None and len(names) == 1: study = names[0]
    if not names: raise ValueError(f"{where} holds no Optuna study; give a journal file or a storage's URL")
    if study not in names: raise ValueError(f"{where} holds the studies {', '.join(names)}; name one of them with --study")
    beside = path.parent if path.is_file() else Path("runs/sweeps") / study # where a sweep of that name puts its trials
    loaded = optuna.load_study(study_name=study, storage=storage)
    told = (loaded.user_attrs.get("account") or {}).get("metric") or metric
    return [_of_trial(t, beside, told) for t in loaded.get_trials(deepcopy=False) if t.state.name != "WAITING"]

def _of_trial(trial, beside: Path, metric: str) -> Run:
    "An Optuna trial, and what its folder adds"
    a, state = trial.user_attrs, {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}.get(trial.state.name, "running")
    folder = beside / a["folder"] if "folder" in a else None
    if folder and folder.is_dir():
        found = read_folder(folder)
        return found if state == "running" else replace(found, state=state, reason="" if state == "finished" else found.reason)
    values = trial.intermediate_values or ({} if trial.value is None else {None: trial.value})
    duration = trial.duration.total_seconds() if trial.duration else None
    return Run(Path(a["folder"]).name if folder else f"{trial.number:04d}", state, trial.params, [{"step": s, metric: v} for s, v in sorted(values.items())], a.get("attempt"),
               a.get("planned"), a.get("seed", trial.params.get("seed")), duration, date=str(trial.datetime_start)[:10], reason="" if state == "finished" else "its folder is not here")


STATES = {"crashed": "failed", "killed": "failed", "preempted": "failed", "pending": "running", "preempting": "running", "stopped": "pruned", "early_stopped": "pruned"}
NAMES = dict(run=("run", "Name", "name", "displayName", "display_name", "id", "ID"), state=("state", "State"), attempt=("attempt",), planned=("planned",), seed=("seed", "Seed"),
             seconds=("seconds", "Runtime", "_runtime", "runtime"), commit=("commit", "Commit"), date=("date", "Created", "created_at", "createdAt"), folder=("folder", "output_dir"))
OF_THE_PAGE = {"Notes", "User", "Tags", "Sweep", "End Time", "Updated", "Hostname", "Job Type", "Github", "Group", "Host", "GPU Type", "GPU Count", "ID", "reason"}

def _as_dict(value) -> dict: # W&B's wrapping of settings, {"value": ..., "desc": ...}, taken off
    "A dictionary, its JSON, or Python's way of writing it"
    if isinstance(value, str):
        try: value = json.loads(value)
        except ValueError: value = ast.literal_eval(re.sub(r"(?<![\w'\"])(-?)(nan|inf)(?![\w'\"])", r"'\1\2'", value))
    return {k: v["value"] if isinstance(v, dict) and "value" in v else v for k, v in (value or {}).items()}

def read_record(record: dict) -> Run:
    "One run of W&B or of an export"
    nested = "config" in record
    config, summary = _as_dict(record.get("config")), _as_dict(record.get("summary", record.get("summaryMetrics")))
    flat = {re.sub(r"^(config|summary)[./]", "", k): v for k, v in record.items() if k not in ("config", "summary", "summaryMetrics", "history")}
    everything = summary | config | flat
    said = {name: next((everything[k] for k in keys if everything.get(k) not in (None, "")), None) for name, keys in NAMES.items()}
    state = str(said["state"] or "finished").lower()
    known = OF_THE_PAGE | {k for keys in NAMES.values() for k in keys}
    tried = {k: v for k, v in (config if nested else flat).items() if k not in known and k not in metrics_of(flat) and "/" not in k and not k.startswith("_")}
    rows = [r for r in record.get("history") or [summary | {"step": everything.get("train/global_step")} if nested else flat]]
    whole = {k: mend(said[k]) for k in ("attempt", "planned", "seed")}
    return Run(str(said["run"]), STATES.get(state, state), tried, validations(rows), **whole, seconds=seconds if isinstance(seconds := mend(said["seconds"]), (int, float)) else None,
               commit=said["commit"] and (str(said["commit"])[:12] if len(str(said["commit"])) > 13 else str(said["commit"])), date=said["date"] and str(said["date"])[:10], folder=said["folder"] and str(said["folder"]),
               reason=str(everything.get("reason") or ("" if state == "finished" else f"W&B says {state}")))


def read_export(path) -> list[Run]:
    "A CSV, JSON or JSON Lines file of runs"
    path = Path(path)
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file: records = list(csv.DictReader(file))
    elif path.suffix == ".jsonl": records = _rows(path)
    else: records = _load(path)
    if isinstance(records, dict): records = records.get("runs", [])
    if not records or not all(isinstance(r, dict) for r in records): raise ValueError(f"{path} holds no run; a run is a line of a CSV, or an object in a JSON list")
    return [read_record(r) for r in records]

def read_wandb(path: str, # entity/project, entity/project/sweep, or their page's address
               api=None,  # default: wandb.Api()
               ) -> tuple[list[Run], dict]: # runs by date of creation; the sweep's settings
    "Runs at W&B"
    import wandb
    entity, project, *rest = re.sub(r"^(wandb:|https?://[^/]+/)", "", path).strip("/").split("?")[0].split("/")
    if api is None and not wandb.login(prompt=False, verify=False):           # wandb.Api would ask for a key
        raise ValueError(f"{path} is no file or folder here, and to look for it at W&B somebody must be logged in: `wandb login`; or export the runs as CSV and give that file")
    try:
        api = api or wandb.Api()
        sweep = api.sweep(f"{entity}/{project}/{rest[-1]}") if rest and rest[-1] not in ("sweeps", "runs", "table", "workspace") else None
        records = [dict(name=r.name, state=r.state, created_at=r.created_at, commit=getattr(r, "commit", None), config=dict(r.config),
                        summary={k: r.summary[k] for k in r.summary.keys()}, history=r.history(samples=10_000, pandas=False))
                   for r in (sweep.runs if sweep else api.runs(f"{entity}/{project}"))]
    except wandb.Error as e: raise ValueError(f"W&B does not give {path} ({' '.join(str(e).split())}); log in with `wandb login`, or export the runs as CSV and give that file") from None
    return [read_record(r) for r in sorted(records, key=lambda r: str(r["created_at"]))], dict(sweep.config) if sweep else {}


def run_folders(path: Path) -> list[Path]:
    "The runs below a folder, or the folder itself"
    def is_run(p): return any((p / name).is_file() for name in ("config.json", "metrics.jsonl", "result.json")) and not (p / "tokenizer.json").is_file()
    if is_run(path): return [path]
    below = sorted(p for where in ((path / "trials",) if (path / "trials").is_dir() else (path,)) for p in where.glob("*") if p.is_dir() and is_run(p))
    if not below: raise ValueError(f"{path} holds no run; a run's folder has metrics.jsonl and, at its end, result.json")
    return below


def collect(sources, study=None, api=None):
    "Runs of any sources, and what the sweep's file says of them"
    found, account = [], {}
    for source in sources:
        path, text = Path(str(source)), str(source)
        if path.is_dir(): new, more = [read_folder(p) for p in run_folders(path)], _load(path / "sweep.yaml")
        elif path.suffix in (".csv", ".json", ".jsonl") and path.is_file(): new, more = read_export(path), {}
        elif path.is_file():
            more = _load(path.parent / "sweep.yaml") or {}
            new = read_study(path, study, (more.get("metric") or {}).get("name", METRIC))
        elif text.startswith("wandb:") or "wandb.ai/" in text: new, more = read_wandb(text, api)
        elif "://" in text: new, more = read_study(text, study), {}
        elif re.fullmatch(r"[\w.-]+/[\w.-]+(/(sweeps/)?[a-z0-9]{6,12})?", text) and not path.parent.is_dir(): new, more = read_wandb(text, api)
        else:
            raise ValueError(f"there is no {source}; a source is a sweep's folder, a run's folder, a folder of runs, an Optuna journal or storage URL, "
                             "a CSV or JSON export of W&B, or entity/project/sweep")
        found, account = found + new, account | (more or {})
    return found, account
