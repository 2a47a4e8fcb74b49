"""When does reinforcement help? Runs of equal time from policies of every strength, each compared with its start.

    python nbs/experiments/reinforcement/record.py [PART ...] [--seeds 0 1 2]

Parts: `starts` trains the policies that the map begins with, `map` continues from each, `tiny` from the bundled one of
that name, `small` and `multivariate` from these as they were before their last part of training, which git history
holds; `hour` and `hour_multivariate` do so for an hour, or for as long as a config of `bgrpo sft` says. Every other run
of a part has the same CPU seconds for its steps. Each arm is tried at several learning rates with the first seed (in
the map from two starts alone); the one that is best on validation problems is measured, and run again with the other
seeds, for as many steps. What is done is kept in runs/reinforcement, one folder a run,
so a second call, or several at once, continue; what record.json holds is not run again. record.json collects the rows:
for each run the share of held-out problems that it and its start solve, and the paired differences with 95 %
intervals. Policies are measured greedily, by ten beams, and by ten samples."""
import argparse
import json
import os
import shutil
import subprocess
import tarfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from statistics import mean

import torch
from transformers import Trainer

from bgrpo_nb.algebra.problems import generate_multivariate, generate_problems
from bgrpo_nb.base.files import write_json
from bgrpo_nb.base.run_folder import provenance
from bgrpo_nb.base.strict_yaml import read_yaml
from bgrpo_nb.policy.model import load_model, load_tokenizer
from bgrpo_nb.recipes.sft import SupervisedConfig, train_policy
from bgrpo_nb.recipes.train import TrainConfig, train_bgrpo
from bgrpo_nb.solve.beam_filter import search_problems
from bgrpo_nb.solve.evaluation import bootstrap, evaluate

PARTS = ["starts", "map", "tiny", "small", "multivariate", "hour", "hour_multivariate"]
RECORD, OUT = Path(__file__).parent / "record.json", Path("runs/reinforcement")
REPO = Path(__file__).parents[3]
LEVELS = (5, 20, 40, 60, 80, 93) # per cent solved greedily, of the starts of the map
TUNED = (20, 93)                 # those at which learning rates are tried; the others take the rate of the nearest
NINE = tuple(f"{outer}_{inner}" for outer in (2, 3, 4) for inner in (2, 3, 4))


@dataclass(frozen=True)
class Task:
    "Problems to train on and to measure"
    degrees: tuple          # of the training problems, in equal shares
    measured: dict          # degrees -> held-out problems that are answered greedily
    searched: dict          # degrees -> the first of them that are also answered by ten beams and ten samples
    domain: str = "ZZ"
    kind: str = "univariate"
    seconds: int = 300      # CPU seconds of the steps of a run
    validated: int = 600    # problems to choose a learning rate by

    def problems(self, n: int, seed: int) -> list:
        "As many of each degree, in turns"
        each = [self._make(-(-n // len(self.degrees)), degrees, seed) for degrees in self.degrees]
        return [problem for group in zip(*each) for problem in group][:n]

    def held_out(self) -> dict: # degrees -> problems
        return {degrees: self._make(n, degrees, seed=777_000) for degrees, n in self.measured.items()}

    def validation(self) -> list: # to choose a learning rate by; in no test set
        return self.problems(self.validated, seed=776_000)

    def _make(self, n, degrees, seed):
        outer, inner = map(int, degrees.split("_"))
        if self.kind == "multivariate": return generate_multivariate(n, 3, outer, inner, seed=seed, canonical=True)
        return generate_problems(n, outer, inner, seed=seed, canonical=True)


TASKS = {
    "map": Task(("2_2",), {"2_2": 1200}, {"2_2": 300}, seconds=150),
    "small": Task(("2_4", "3_4", "4_3", "4_4"), dict.fromkeys(NINE, 200) | {"2_4": 600, "3_4": 600, "4_4": 1000},
                  {"2_4": 100, "3_4": 100, "4_4": 200}, validated=2000),
    "multivariate": Task(("2_2",), {"2_2": 1200}, {"2_2": 300}, kind="multivariate"),
    "tiny": Task(("3_2",), {"3_2": 1200}, {"3_2": 600}, domain="QQ", seconds=150),
}
TASKS["hour"] = replace(TASKS["small"], seconds=3600)
TASKS["hour_multivariate"] = replace(TASKS["multivariate"], seconds=3600)
EARLIER = {"small, four parts": ("small", "67ef06d"), "multivariate, three parts": ("multivariate", "cd24715")}
STARTS = {"tiny": "tiny", "small": "small, four parts", "hour": "small, four parts",
          "multivariate": "multivariate, three parts", "hour_multivariate": "multivariate, three parts"}


@dataclass(frozen=True)
class Arm:
    "A way to continue from a policy"
    name: str
    rates: dict                                   # part in which it is run -> peak learning rates that are tried
    settings: dict = field(default_factory=dict)  # of TrainConfig, or of SupervisedConfig
    supervised: bool = False
    config: str | None = None                     # of `bgrpo sft`: this run, with its own number of steps


BEAMS = dict(lr_scheduler_type="linear", warmup_steps=8)
LABELS = dict(lr_scheduler_type="linear", lr_scheduler_kwargs={}, warmup_steps=10, per_device_train_batch_size=128)
LOW, HIGH = (1e-5, 5e-5, 2e-4), (1e-4, 3e-4, 1e-3)
BY_REWARD = {"map": (5e-5, 2e-4), "tiny": HIGH, "small": LOW, "multivariate": LOW}
NOT_THE_MAP = {part: rates for part, rates in BY_REWARD.items() if part != "map"}
THE_LIST = dict.fromkeys(("small", "multivariate"), LOW) # other ways to use the list of beams, from a good policy
BY_LABEL = {"map": (3e-4, 1e-3), "tiny": (2e-4, 6e-4, 2e-3), "small": (1e-4, 3e-4, 1e-3),
            "multivariate": (1e-4, 3e-4, 1e-3)}
SIXTEEN, FOUR = dict(num_generations=16, prompts_per_step=32), dict(num_generations=4, prompts_per_step=128)
ARMS = {arm.name: arm for arm in (
    Arm("mean", BY_REWARD, BEAMS | SIXTEEN),
    Arm("mean, one form", THE_LIST, BEAMS | SIXTEEN | dict(canonical_only=True)),
    Arm("mean, credit once", THE_LIST, BEAMS | SIXTEEN | dict(credit_once=True)),
    Arm("tempered", THE_LIST, BEAMS | SIXTEEN | dict(baseline="tempered")),
    Arm("siblings", THE_LIST, BEAMS | SIXTEEN | dict(baseline="siblings")),
    Arm("violations", NOT_THE_MAP, BEAMS | FOUR | dict(baseline="violations")),
    Arm("minimum risk", BY_REWARD | {"hour": (5e-5,)}, BEAMS | FOUR | dict(baseline="minimum_risk")),
    Arm("minimum risk, 16 beams", {"map": (5e-5,)}, BEAMS | SIXTEEN | dict(baseline="minimum_risk")),
    Arm("samples", BY_REWARD, BEAMS | SIXTEEN | dict(rollout="sample")),
    Arm("supervised", BY_LABEL, LABELS, supervised=True),
    Arm("supervised, nine degrees", {"hour": (2e-3,)}, config="configs/sft/small_longer.yaml"),
    Arm("supervised, fourth part", {"hour_multivariate": (2e-3,)}, config="configs/sft/multivariate_longer.yaml"),
)}


@contextmanager
def cpu_clock(seconds: list):
    "Appends the CPU seconds of each training inside of the block: all steps, nothing before or after them"
    inner = Trainer.train
    def timed(self, *args, **kwargs):
        start = time.process_time()
        try: return inner(self, *args, **kwargs)
        finally: seconds.append(time.process_time() - start)
    Trainer.train = timed
    try: yield
    finally: Trainer.train = inner


def continue_from(start: str, task: Task, arm: Arm, rate: float, seed: int, steps: int, folder: Path) -> float: # CPU s
    "Train; the policy is in FOLDER/policy"
    common = dict(model=start, output_dir=str(folder), learning_rate=rate, max_steps=steps, seed=seed + 1, use_cpu=True,
                  save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True)
    seconds = []
    with cpu_clock(seconds):
        if arm.config:
            own = read_yaml(arm.config) | dict(model=start, output_dir=str(folder)) # its own steps, rate and seed
            result = train_policy(SupervisedConfig(**common | own))
        elif arm.supervised:
            own = dict(degrees=list(task.degrees), kind=task.kind, held_out=len(task.degrees))
            result = train_policy(SupervisedConfig(**common | own | arm.settings))
        else:
            own = dict(domain=task.domain, eval_on_start=False, metric_for_best_model=None)
            config = TrainConfig(**common | own | arm.settings)
            result = train_bgrpo(config, task.problems(steps * config.prompts_per_step, seed + 1))
    if result["stopped"]: raise SystemExit("stopped; the same command begins this run again")
    return seconds[0]


def file_name(name: str) -> str: return name.replace(",", "").replace(" ", "_")


def name_of(policy: str) -> str:
    path = Path(policy)
    return path.parent.name if path.name == "policy" else path.name


def earlier_policy(name: str) -> str:
    "The folder of a policy that was bundled once, taken from git history"
    bundled, revision = EARLIER[name]
    folder = OUT / "starts" / name / "policy"
    if folder.exists(): return str(folder)
    shown = subprocess.run(["git", "-C", REPO, "archive", f"{revision}:bgrpo_nb/assets/{bundled}"], capture_output=True)
    if shown.returncode: raise SystemExit(f"{name!r} is in git history alone, at {revision}: use a whole clone")
    new = folder.with_name(f"policy-{os.getpid()}")
    with tarfile.open(fileobj=BytesIO(shown.stdout)) as files: files.extractall(new, filter="data")
    try: new.rename(folder)
    except OSError: shutil.rmtree(new) # another process was first
    return str(folder)


def steps_in(task_name: str, start: str, arm: Arm, rate: float) -> int:
    "Optimizer steps: those that were recorded, else as many as take the task's seconds, from a few that are timed once"
    if arm.config: return read_yaml(arm.config)["max_steps"]
    recorded = [row for row in known_rows().values()
                if (row["part"], row["start"], row["arm"]) == (task_name, name_of(start), arm.name)]
    if recorded: return max(recorded, key=lambda row: row["rate"] == rate)["steps"]
    file = OUT / task_name / f"speed-{file_name(name_of(start))}-{file_name(arm.name)}.json"
    if not file.exists():
        trial = file.with_name(f"{file.stem}-{os.getpid()}")
        seconds = continue_from(start, TASKS[task_name], arm, 1e-9, 99, 8, trial)
        shutil.rmtree(trial)
        write_json(file, {"seconds_per_step": seconds / 8})
    return max(1, round(TASKS[task_name].seconds / json.loads(file.read_text())["seconds_per_step"]))


def answers(policy: str, task: Task) -> dict: # degrees -> lists of 0 and 1, one for each problem
    "Which held-out problems a policy solves: greedily, by ten beams, by ten samples"
    model, tokenizer = load_model(policy, device="cpu"), load_tokenizer(policy)
    by_greedy, by_beams, by_samples = {}, {}, {}
    for degrees, problems in task.held_out().items():
        found = search_problems(model, tokenizer, problems, 1, task.domain)
        by_greedy[degrees] = [int(row.first_valid == 1) for row in found]
        few = problems[:task.searched.get(degrees, 0)]
        if not few: continue
        report = evaluate(model, tokenizer, few, num_beams=10, wide_beams=10, num_samples=10, domain=task.domain)
        by_beams[degrees] = [int(row.beam_place is not None) for row in report.rows]
        by_samples[degrees] = [int(row.valid_samples > 0) for row in report.rows]
    return {"greedy": by_greedy, "ten_beams": by_beams, "pass_at_10": by_samples}


def of_start(policy: str, task_name: str) -> dict:
    file = OUT / task_name / f"answers-{file_name(name_of(policy))}.json"
    if not file.exists(): write_json(file, answers(policy, TASKS[task_name]))
    return json.loads(file.read_text())


def compared(before: list, after: list) -> dict: # 0 or 1 for each problem, the same problems in both
    "Shares solved, and the paired difference with its 95 % interval, in per cent"
    change = [b - a for a, b in zip(before, after, strict=True)]
    def per_cent(x): return round(100 * x, 2)
    return {"n": len(before), "before": per_cent(mean(before)), "after": per_cent(mean(after)),
            "change": per_cent(mean(change)), "interval": list(map(per_cent, bootstrap(change)))}


@contextmanager
def claimed(path: Path): # yields whether this process has it, not another one
    path.parent.mkdir(parents=True, exist_ok=True)
    try: os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        yield False
        return
    try: yield True
    finally: path.unlink()


def known_rows() -> dict: # (part, start, arm, rate, seed) -> row
    return {key_of(row): row for row in json.loads(RECORD.read_text())["rows"]} if RECORD.exists() else {}


def key_of(row: dict) -> tuple:
    return row["part"], row["start"], row["arm"], row["rate"], row["seed"]


def folder_of(part: str, start: str, arm: Arm, rate: float, seed: int) -> Path:
    return OUT / part / f"{file_name(name_of(start))}-{file_name(arm.name)}-{rate:g}-{seed}"


def run_of(part: str, start: str, arm: Arm, rate: float, seed: int, measured: bool) -> dict | None: # None: not yet
    "The row of a run: trained, tried on the validation problems, and measured if that is asked for"
    row = known_rows().get((part, name_of(start), arm.name, rate, seed))
    if row and (not measured or "greedy" in row): return row
    folder = folder_of(part, start, arm, rate, seed)
    with claimed(folder.with_name(f"{folder.name}.claim")) as mine:
        if not mine: return None
        file = folder / "row.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        row = known or trained(part, start, arm, rate, seed, folder)
        if measured and "greedy" not in row: row = row | measurements(part, start, str(folder / "policy"))
        if row != known:
            write_json(file, row)
            print(*key_of(row), row["validation"], row.get("greedy"), flush=True)
        return row


def trained(part: str, start: str, arm: Arm, rate: float, seed: int, folder: Path) -> dict:
    if folder.exists(): shutil.rmtree(folder)        # of a process that was killed
    task, steps = TASKS[part], steps_in(part, start, arm, rate)
    seconds = continue_from(start, task, arm, rate, seed, steps, folder)
    return dict(part=part, start=name_of(start), arm=arm.name, rate=rate, steps=steps, cpu_seconds=round(seconds, 1),
                validation=greedily(str(folder / "policy"), task.validation(), task.domain),
                settings=dict(config=arm.config) if arm.config else arm.settings,
                **provenance(seed))


def measurements(part: str, start: str, policy: str) -> dict:
    before, after = of_start(start, part), answers(policy, TASKS[part])
    by_degree = {d: compared(before["greedy"][d], after["greedy"][d]) for d in before["greedy"]}
    together = {kind: compared(sum(before[kind].values(), []), sum(after[kind].values(), [])) for kind in before}
    return dict(**together, greedy_by_degree=by_degree)


DECAYS = [(step, 60) for step in range(50, 650, 50)] + [(600, 240), (600, 720)] # from which step, how many steps


def train_starts():
    "Policies of every strength on 2∘2: parts of one supervised run, each with a decay of its learning rate"
    parent = OUT / "starts/run"
    common = dict(degrees=["2_2"], per_device_train_batch_size=64, eval_strategy="no", report_to="none", use_cpu=True,
                  disable_tqdm=True, held_out=64)
    if not (parent / "result.json").exists():
        if parent.exists(): shutil.rmtree(parent)        # of a process that was killed
        train_policy(SupervisedConfig(output_dir=str(parent), max_steps=600, learning_rate=2e-3, warmup_steps=50,
                                      lr_scheduler_type="constant_with_warmup", lr_scheduler_kwargs={}, seed=5,
                                      save_steps=50, save_total_limit=30, vocabulary="compact", **common))
    found = {}
    for step, decay in DECAYS:
        name = f"step{step}" if decay == 60 else f"step{step}-{decay}"
        if not (OUT / "starts" / name / "result.json").exists(): train_start(parent, step, decay, name, common)
        found[name] = greedily(f"{OUT}/starts/{name}/policy", TASKS["map"].validation(), "ZZ")
        print("start", name, found[name], flush=True)
    chosen = {level: min(found, key=lambda name: abs(found[name] - level)) for level in LEVELS}
    write_json(OUT / "starts/chosen.json",
               {str(level): {"name": name, "greedy": found[name]} for level, name in chosen.items()})


def train_start(parent: Path, step: int, decay: int, name: str, common: dict):
    folder = OUT / "starts" / name
    if folder.exists(): shutil.rmtree(folder)
    train_policy(SupervisedConfig(output_dir=str(folder), model=str(parent / f"checkpoint-{step}"), max_steps=decay,
                                  learning_rate=2e-3, warmup_steps=0, lr_scheduler_type="linear", seed=6,
                                  lr_scheduler_kwargs={}, save_strategy="no", **common))


def greedily(policy: str, problems: list, domain: str) -> float: # per cent
    found = search_problems(load_model(policy, device="cpu"), load_tokenizer(policy), problems, 1, domain)
    return round(100 * mean([row.first_valid == 1 for row in found]), 2)


def all_rows(part: str, runs: list, measured: bool) -> list[dict]: # runs: (start, arm, rate, seed)
    "Rows of these runs, each made by this process or by another one that works beside it"
    while True:
        rows = [run_of(part, *run, measured) for run in runs]
        if all(rows): return rows
        time.sleep(5)


def starts_of(part: str) -> dict: # policy -> per cent solved greedily, about
    if part != "map":
        start = STARTS[part]
        return {earlier_policy(start) if start in EARLIER else start: 0}
    chosen = json.loads((OUT / "starts/chosen.json").read_text())
    return {str(OUT / f"starts/{found['name']}/policy"): int(level) for level, found in chosen.items()}


def run_part(part: str, seeds: list[int], arms: list[Arm]):
    "Every rate with the first seed, then the rate that is best on the validation problems with all seeds"
    starts, arms = starts_of(part), [arm for arm in arms if part in arm.rates]
    if not arms: raise SystemExit(f"none of these arms is run in {part}; leave --arms out")
    tuned = [start for start, level in starts.items() if part != "map" or level in TUNED]
    rows = all_rows(part, [(start, arm, rate, seeds[0]) for start in tuned for arm in arms for rate in arm.rates[part]],
                    False)
    def best_rate(start, arm):
        nearest = min(tuned, key=lambda other: abs(starts[other] - starts[start]))
        tried = [row for row in rows if (row["start"], row["arm"]) == (name_of(nearest), arm.name)]
        return max(tried, key=lambda row: row["validation"])["rate"]
    chosen = [(start, arm, best_rate(start, arm)) for start in starts for arm in arms]
    all_rows(part, [(*run, seed) for seed in seeds for run in chosen], True)


def collect():
    "record.json holds what it held, what has been run since, and the starts"
    rows = known_rows()
    for file in sorted(OUT.glob("*/*/row.json")):
        row = json.loads(file.read_text())
        rows[key_of(row)] = rows.get(key_of(row), {}) | row
    chosen = OUT / "starts/chosen.json"
    before = json.loads(RECORD.read_text())["starts"] if RECORD.exists() else {}
    starts = json.loads(chosen.read_text()) if chosen.exists() else before
    write_json(RECORD, {"starts": starts, "rows": [rows[key] for key in sorted(rows)]})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=PARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    asked = parser.parse_args()
    unknown = set(asked.parts) - {*PARTS, "collect"}
    if unknown: parser.error(f"no part is called {', '.join(sorted(unknown))}; use {', '.join(PARTS)}, collect")
    torch.set_num_threads(1)
    for part in asked.parts:
        if part == "starts": train_starts()
        elif part != "collect": run_part(part, asked.seeds, [ARMS[name] for name in asked.arms])
    collect()
