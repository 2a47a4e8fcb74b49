"""Starts, watches and ends the processes of a sweep: Optuna workers, or W&B agents and the trials they ask for.

    python -m bgrpo_nb.study.launcher worker     one worker; its orders come in $BGRPO_SWEEP
    python -m bgrpo_nb.study.launcher wandb JSON one trial that a W&B agent asked for

Plumbing of `bgrpo sweep`; the story is in `10_sweeps` and `10a_trials`."""
import json
import math
import os
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlparse

from bgrpo_nb.base.files import last_lines, write_json
from bgrpo_nb.base.processes import end, follow, shares, start, tie_to_parent
from bgrpo_nb.study.sweeps import (
    IntDistribution, CategoricalDistribution, FloatDistribution, Sweep, SweepError, axis, draw, plan, read_sweep,
    size, words)
from bgrpo_nb.study.trials import TrialState, last_line, open_storage, open_study, return_lost, work

ORDERS, FOLDER = "BGRPO_SWEEP", "BGRPO_SWEEP_FOLDER"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    "Counts requests to stop: Ctrl-C, SIGTERM, a closed terminal"
    def __enter__(self):
        self.times = 0
        try: self.before = {s: signal.signal(s, self._count) for s in SIGNALS}
        except ValueError: self.before = {}  # not the main thread
        return self

    def __exit__(self, *error):
        for s, handler in self.before.items(): signal.signal(s, handler)

    def _count(self, number, frame): self.times += 1
    def __call__(self): return "stopped" if self.times else None


# --- what a person sees -------------------------------------------------------------------------------------------------------------------------

def describe(sweep, points):
    "The plan in words"
    yield f"{sweep.name}: {sweep.method}, {size(sweep, points)} trials" + (f", seeds {', '.join(map(str, sweep.seeds))} for each configuration" if sweep.seeds else "")
    for name, d in sweep.swept.items(): yield f"  {name}: {_in_words(d)}"
    if sweep.fixed: yield "  the same in all: " + ", ".join(f"{k}={v}" for k, v in sweep.fixed.items())
    yield f"  {sweep.goal} {sweep.metric}" + (", hyperband ends what lags behind" if sweep.early_terminate else "")
    full = math.prod(len(axis(d)) for d in sweep.swept.values()) * max(1, len(sweep.seeds)) if sweep.method == "grid" else 0
    if full > len(points): yield f"  run_cap: the first {len(points)} of {full} points"
    for note in sweep.notes: yield f"  note: {note}"


def _in_words(d):
    if isinstance(d, CategoricalDistribution): return ", ".join(map(str, d.choices))
    step = f" in steps of {d.step}" if d.step not in (None, 1) else ""
    return f"{'whole numbers ' if isinstance(d, IntDistribution) else ''}{d.low:g} to {d.high:g}{', by its logarithm' if d.log else ''}{step}"


def table(sweep, study, total):
    "The trials as lines: what runs, what ended last, the best, the time left"
    trials = [t for t in study.get_trials(deepcopy=False) if "folder" in t.user_attrs]
    by = {s: [t for t in trials if t.state == s] for s in TrialState}
    done, running = by[TrialState.COMPLETE], by[TrialState.RUNNING]
    ended = done + by[TrialState.PRUNED]
    others = ((TrialState.RUNNING, "running"), (TrialState.FAIL, "failed"), (TrialState.PRUNED, "pruned"))
    counts = f"{len(ended)} of {total} done" + "".join(f", {len(by[s])} {name}" for s, name in others if by[s])
    if ended and running and (left := total - len(ended)) > 0:
        counts += f", about {_time(statistics.mean(t.duration.total_seconds() for t in ended) * left / len(running))} left"
    lines = [counts]
    shown = sorted((t for t in trials if t.state != TrialState.RUNNING), key=lambda t: t.datetime_complete)[-8:] + running
    if shown: lines += _columns([["trial", "state", *sweep.swept, "seed", sweep.metric, "time"], *(_row(t, sweep) for t in shown)])
    if done:
        best = (max if sweep.goal == "maximize" else min)(done, key=lambda t: t.value)
        lines.append(f"best: {best.value:.4g} in {best.user_attrs['folder']}, " + ", ".join(f"{k}={_short(v)}" for k, v in best.params.items()))
    return lines


def _row(t, sweep):
    value = t.value if t.value is not None else list(t.intermediate_values.values())[-1] if t.intermediate_values else None
    state = {TrialState.COMPLETE: "finished", TrialState.FAIL: "failed", TrialState.PRUNED: "pruned", TrialState.RUNNING: "running"}[t.state]
    seconds = t.duration.total_seconds() if t.duration else time.time() - t.datetime_start.timestamp()
    return [t.user_attrs["folder"].removeprefix("trials/"), state, *(_short(t.params.get(k, "")) for k in sweep.swept), str(t.user_attrs.get("seed", "")), _short(value), _time(seconds)]


def _short(v): return "" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v)
def _time(seconds): return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _columns(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]


class Screen:
    "On a terminal the table is redrawn in place; elsewhere a line is printed when the counts change"
    def __init__(self, out=None): self.out, self.height, self.last = out or sys.stdout, 0, None

    def __call__(self, lines):
        if self.out.isatty():
            width = shutil.get_terminal_size().columns
            self.out.write(f"\x1b[{self.height}F\x1b[J" * bool(self.height) + "\n".join(line[:width] for line in lines) + "\n")
            self.height = len(lines)
        elif (head := lines[0].split(", about")[0]) != self.last: self.out.write(head + "\n"); self.last = head
        self.out.flush()


# --- Optuna -------------------------------------------------------------------------------------------------------------------------------------

def run_optuna(sweep: Sweep, file, folder, workers=1, storage=None, seed=0, resume=False, retry_failed=False, gpus=None, threads=None, show=None):
    "Run a sweep with `workers` processes; exit status 0, 1 (none finished, or points are left), 130 (stopped)"
    folder, show = Path(folder).resolve(), show or Screen()
    folder.mkdir(parents=True, exist_ok=True)
    study = open_study(sweep, folder, storage, seed, resume)
    if not resume or not (folder / "sweep.yaml").exists(): shutil.copyfile(file, folder / "sweep.yaml")
    if retry_failed: _retry_failed(study)
    orders = json.dumps(dict(folder=str(folder), storage=storage, name=sweep.name))
    environments = [os.environ | share | {ORDERS: orders} for share in shares(workers, gpus, threads)]
    total, crew, replaced = size(sweep, plan(sweep, seed)), {}, 0
    with Stop() as stop:
        for i in range(workers): crew[i] = _start_worker(folder, i, environments[i])
        while crew and not stop():
            show(table(sweep, study, total))
            time.sleep(0.3)
            for i, process in list(crew.items()):
                if process.poll() is None: continue
                del crew[i]
                return_lost(study, folder)
                if process.returncode > 0: print(f"worker {i} failed: {last_lines(folder / 'workers' / f'{i}.txt')}", file=sys.stderr, flush=True)
                if process.returncode < 0 and _unfinished(study) and replaced < 3 * total:  # killed: another takes its place
                    replaced += 1
                    crew[i] = _start_worker(folder, i, environments[i])
        if stop():
            print("stopping: the trials that run are ended and stay in the queue; Ctrl-C again ends them at once", file=sys.stderr, flush=True)
            _end_all(list(crew.values()), stop)
    return_lost(study, folder)
    show(table(sweep, study, total))
    return _status(study, sweep, folder, bool(stop.times))


def _start_worker(folder, i, env):
    (folder / "workers").mkdir(exist_ok=True)
    return start([sys.executable, "-m", "bgrpo_nb.study.launcher", "worker"], folder / "workers" / f"{i}.txt", env, signal.SIGTERM)


def _end_all(processes, stop, grace=90):
    "SIGTERM to all; SIGKILL where the grace is over or stop was asked for twice"
    for p in processes:
        if p.poll() is None: p.terminate()
    deadline = time.monotonic() + grace
    while any(p.poll() is None for p in processes) and time.monotonic() < deadline and stop.times < 2: time.sleep(0.1)
    for p in processes: end(p, 0) if stop.times < 2 else (p.kill(), p.wait())


def _unfinished(study): return study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING))


def _retry_failed(study):
    "Every point that failed and neither finished nor waits goes back into the queue"
    trials = [t for t in study.get_trials(deepcopy=False) if "folder" in t.user_attrs or t.state == TrialState.WAITING]
    settled = {t.user_attrs["planned"] for t in trials if t.state != TrialState.FAIL}
    last = {t.user_attrs["planned"]: t for t in trials if t.user_attrs["planned"] not in settled}
    for t in last.values(): study.enqueue_trial(t.params, user_attrs=dict(planned=t.user_attrs["planned"], seed=t.user_attrs["seed"], attempt=t.user_attrs["attempt"] + 1))


def _status(study, sweep, folder, stopped):
    trials = [t for t in study.get_trials(deepcopy=False) if "folder" in t.user_attrs]
    settled = {t.user_attrs["planned"] for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)}
    failed = {t.user_attrs["planned"]: t for t in trials if t.state == TrialState.FAIL and t.user_attrs["planned"] not in settled}
    left = len(_unfinished(study))
    waiting = {t.user_attrs.get("planned") for t in _unfinished(study)}
    for t in list(failed.values())[:10]:
        if t.user_attrs["planned"] in waiting: continue
        where = folder / t.user_attrs["folder"] / "failure.json"
        print(f"failed: {t.user_attrs['folder']}: {json.loads(where.read_text())['reason'] if where.exists() else 'no reason was left'}", file=sys.stderr)
    if left: print(f"{left} trials are left; go on with the same command and --resume", file=sys.stderr)
    if stopped: return 130
    return 0 if not left and any(t.state == TrialState.COMPLETE for t in trials) else 1


def worker():
    "One worker process"
    import optuna
    orders = json.loads(os.environ.pop(ORDERS))
    storage = open_storage(orders["folder"], orders["storage"])
    account = {t.study_name: t.user_attrs for t in optuna.get_all_study_summaries(storage)}[orders["name"]]["account"]
    sweep = read_sweep(Path(orders["folder"]) / "sweep.yaml", tuple(account["seeds"]), account["run_cap"], orders["name"])
    with Stop() as stop:
        print(work(open_study(sweep, orders["folder"], orders["storage"], account["seed"], resume=True), sweep, orders["folder"], stop), flush=True)


def dry_run(sweep: Sweep, workers=1, seed=0, gpus=None, threads=None, show=print):
    "Print the plan and what it will cost, by one trial that is run, timed and thrown away; exit status"
    points = plan(sweep, seed)
    for line in describe(sweep, points): show(line)
    for p in points[:6]: show(f"  {p.planned:04d} {'chosen when it begins' if not p.parameters and sweep.swept else p.parameters}{'' if p.seed is None else f' seed {p.seed}'}")
    if len(points) > 6: show(f"  … {points[-1].planned:04d}")
    parameters = points[0].parameters or draw(sweep.swept, 1, seed)[0] if sweep.swept else {}
    show("the first trial is run now to time it; its results are thrown away" + (f" ({parameters})" if sweep.method == "bayes" else ""))
    with Stop() as stop, tempfile.TemporaryDirectory() as place:
        where, began = Path(place).resolve(), time.monotonic()
        os.environ |= shares(workers, gpus, threads)[0]
        status, why = follow(words(sweep.command, sweep.fixed | parameters | dict(seed=points[0].seed, output_dir=str(where))), where, lambda row: None, stop)
        seconds, said = time.monotonic() - began, last_lines(where / "log.txt")
    if why: return 130
    if status: raise SweepError(f"the first trial failed with exit status {status}: {said}")
    show(f"it took {_time(seconds)}: {size(sweep, points)} such trials, {workers} at a time, take about {_time(seconds * math.ceil(size(sweep, points) / workers))}; "
         "trials with more steps, beams or problems than the first take longer, and trials beside one another are slower than alone")
    return 0


# --- W&B ----------------------------------------------------------------------------------------------------------------------------------------

def logged_in():
    "Whether a W&B key is at hand for the server in use, and W&B is not switched off"
    if os.environ.get("WANDB_MODE", "online") not in ("online", "shared"): return False
    if os.environ.get("WANDB_API_KEY"): return True
    import netrc
    try: return netrc.netrc(os.environ.get("NETRC")).authenticators(urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname) is not None
    except (OSError, netrc.NetrcParseError): return False


def wandb_config(sweep: Sweep):
    "The sweep as W&B takes it: the same parameters as Optuna gets, the trial of this package as the program"
    def spec(d):
        if isinstance(d, CategoricalDistribution) or sweep.method == "grid": return dict(values=axis(d))
        if isinstance(d, IntDistribution): return dict(distribution="int_uniform", min=d.low, max=d.high)
        if d.step: return dict(distribution="q_uniform", min=d.low, max=d.high, q=d.step)
        return dict(distribution="log_uniform_values" if d.log else "uniform", min=d.low, max=d.high)
    if len(sweep.seeds) > 1 and sweep.method != "grid":
        raise SweepError(f"W&B would draw the seed like any parameter in a {sweep.method} search; use --engine optuna, method: grid, or one seed")
    seeds = {} if not sweep.seeds else dict(seed=dict(values=list(sweep.seeds)))
    trial = json.dumps(dict(command=sweep.command, swept=list(sweep.swept), metric=sweep.metric, goal=sweep.goal))
    return {**sweep.about, "name": sweep.name, "method": sweep.method, "metric": dict(name=sweep.metric, goal=sweep.goal), **({"run_cap": sweep.run_cap} if sweep.run_cap else {}),
            **({"early_terminate": sweep.early_terminate} if sweep.early_terminate else {}), "program": "bgrpo_nb",
            "command": ["${env}", "${interpreter}", "-m", "bgrpo_nb.study.launcher", "wandb", trial],
            "parameters": {**{k: dict(value=v) for k, v in sweep.fixed.items()}, **{k: spec(d) for k, d in sweep.swept.items()}, **seeds}}


def run_wandb(sweep, file, folder, agents=1, entity=None, project=None, join=None, gpus=None, threads=None, show=None):
    "Run a sweep at W&B with `agents` processes, or help one that runs (`join`: ENTITY/PROJECT/ID); exit status 0, 1 (no run finished), 130 (stopped)"
    import wandb
    show = show or Screen()
    try:
        path = _sweep_path(wandb, join, entity, project) if join else _create(wandb, sweep, entity, project)
        wandb.Api().sweep(path)  # an agent would wait for one that does not exist
        print(f"sweep {path}; help it from another machine with: bgrpo sweep --join {path}", flush=True)
        folder = Path(folder or Path("runs/sweeps") / path.split("/")[-1]).resolve()
        (folder / "agents").mkdir(parents=True, exist_ok=True)
        if file: shutil.copyfile(file, folder / "sweep.yaml")
        write_json(folder / "wandb.json", dict(path=path))
        common = os.environ | {FOLDER: str(folder), "WANDB_DIR": str(folder), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
        with Stop() as stop:
            crew = [start([sys.executable, "-m", "wandb", "agent", path], folder / "agents" / f"{i}.txt", common | share, signal.SIGTERM)
                    for i, share in enumerate(shares(agents, gpus, threads))]
            looked = 0
            while any(p.poll() is None for p in crew) and not stop():
                if time.monotonic() - looked > 10: show(_wandb_table(wandb, path)); looked = time.monotonic()
                time.sleep(0.3)
            if stop(): _end_all(crew, stop)
        show(_wandb_table(wandb, path))
        runs = list(wandb.Api().sweep(path).runs)  # an agent ends with 0 even when every run failed
    except (wandb.errors.Error, ValueError, OSError) as e:
        raise e if isinstance(e, SweepError) else SweepError(f"W&B: {last_line(e)}; check --entity, --project and the login, or use --engine optuna") from None
    for i, p in enumerate(crew):
        if p.returncode and not stop.times: print(f"agent {i} ended with status {p.returncode}: {last_lines(folder / 'agents' / f'{i}.txt')}", file=sys.stderr)
    return 130 if stop.times else 0 if any(r.state == "finished" for r in runs) else 1


def _create(wandb, sweep, entity, project):
    config = wandb_config(sweep)
    project = project or sweep.about.get("project") or "bgrpo_nb"
    made = wandb.sweep(config, entity=entity or sweep.about.get("entity"), project=project)
    return f"{os.environ.get('WANDB_ENTITY') or wandb.Api().default_entity}/{project}/{made}"


def _sweep_path(wandb, join, entity, project):
    parts = join.strip("/").split("/")
    if len(parts) == 3: return "/".join(parts)
    if len(parts) != 1: raise SweepError(f"--join {join} is no sweep; give ENTITY/PROJECT/ID, or ID with --project")
    if not project: raise SweepError(f"--join {join}: in which project? Add --project, or give ENTITY/PROJECT/ID")
    return f"{entity or wandb.Api().default_entity}/{project}/{join}"


def _wandb_table(wandb, path):
    sweep = wandb.Api().sweep(path)
    name = sweep.config["metric"]["name"]
    runs = list(sweep.runs)
    count = {s: sum(r.state == s for r in runs) for s in ("finished", "running", "failed", "crashed", "killed")}
    keys = [k for k, v in sweep.config["parameters"].items() if "value" not in v]
    rows = [[r.id, r.state, *(_short(r.config.get(k)) for k in keys), _short(r.summary.get(name))] for r in runs[-12:]]
    return [", ".join(f"{n} {s}" for s, n in count.items() if n) or "no runs yet", *_columns([["run", "state", *keys, name], *rows])]


def wandb_trial(order):
    "One trial that a W&B agent asked for: the same program, its metrics sent on as they come"
    import wandb
    tie_to_parent(os.getppid(), signal.SIGTERM)
    order = json.loads(order)
    run = wandb.init()
    flags = dict(run.config)  # typed; on the command line a boolean would be text
    seed, parameters = flags.get("seed"), {k: flags[k] for k in order["swept"]}
    where = (Path(os.environ.get(FOLDER) or f"runs/sweeps/{run.sweep_id}") / "trials" / run.id).resolve()
    where.mkdir(parents=True, exist_ok=True)
    write_json(where / "config.json", dict(planned=None, attempt=0, parameters=parameters, seed=seed, fixed={k: v for k, v in flags.items() if k not in parameters and k != "seed"},
                                           metric=order["metric"], goal=order["goal"]))
    def each(row): run.log({k: v for k, v in row.items() if isinstance(v, (int, float))}, step=row.get("step"))
    with Stop() as stop: status, why = follow(words(order["command"], flags | dict(output_dir=str(where))), where, each, stop)
    result = json.loads((where / "result.json").read_text()) if (where / "result.json").exists() else {}
    run.summary.update({k: result[k] for k in ("seconds", "seed", "commit", "date") if k in result} | dict(folder=str(where), host=socket.gethostname()))
    if why or status or not result:
        reason = why or (f"exit status {status}: {last_lines(where / 'log.txt')}" if status else "the program ended well but wrote no result.json into --output_dir")
        write_json(where / "failure.json", dict(reason=reason, exit_status=status))
        print(reason, file=sys.stderr)
        run.summary.update(dict(reason=reason))
    failed = bool(why or status or not result)
    run.finish(exit_code=int(failed))
    return int(failed)


if __name__ == "__main__":
    sys.exit(worker() if sys.argv[1] == "worker" else wandb_trial(sys.argv[2]))
