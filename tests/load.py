"""Large numbers: a million problems; an evaluation and a sweep of which processes are killed again and again.

   load.py [--out runs/load] [--scale 1] [--parts problems evaluation sweep]

Each part says what it took: seconds, seconds of work, megabytes at most. The report is `report.json` in the folder; a part
that was measured before stays in it. `--scale 0.01` is a short try."""
import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from soak import ENV, ended_before

from bgrpo_nb.base.files import write_json
from bgrpo_nb.base.run_folder import provenance

BGRPO = ["-m", "bgrpo_nb"]
READ = "from bgrpo_nb import read_problems; problems = read_problems('problems.txt'); print(len(problems))"
VERIFY = READ + """
from bgrpo_nb import verify_batch
verdicts = verify_batch([p.expanded for p in problems], [p.answer for p in problems])
assert all(verdicts), [p for p, v in zip(problems, verdicts) if not v][:3]
"""
TOY = """
import json, sys, time
from pathlib import Path
flags = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
folder, x, y = Path(flags["output_dir"]), int(flags["x"]), int(flags["y"])
with open(folder / "metrics.jsonl", "w", buffering=1) as file:
    for step in range(1, 6):
        print(json.dumps(dict(step=step, eval_score=100 * x + y + step / 10)), file=file)
        time.sleep(0.1)
(folder / "result.json").write_text(json.dumps(dict(step=5, seconds=0.5, seed=0, commit="c", date="2026-01-01")))
"""
SWEEP = """
program: toy.py
name: load
method: grid
metric: {{name: eval_score, goal: maximize}}
parameters:
  x: {{values: {x}}}
  y: {{values: {y}}}
"""


def measured(words, cwd): # of Python
    "A program to its end: seconds, seconds of work, and the most memory that it had, in MB"
    started = time.monotonic()
    running = subprocess.Popen([sys.executable, *words], cwd=cwd, env=ENV, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(running.pid, 0)
    assert status == 0, (words, status)
    return dict(seconds=round(time.monotonic() - started, 1), work=round(used.ru_utime + used.ru_stime, 1),
                megabytes=round(used.ru_maxrss / 1024))


def problems(work, scale):
    "A million problems: generated and written by the command, read, verified"
    n = int(1_000_000 * scale)
    found = dict(n=n, generate=measured([*BGRPO, "generate", "problems.txt", "--n", str(n), "--degrees", "3_2"], work))
    found["file_megabytes"] = round((work / "problems.txt").stat().st_size / 1e6)
    found |= dict(read=measured(["-c", READ], work), read_and_verify=measured(["-c", VERIFY], work))
    assert max(stage["megabytes"] for stage in found.values() if isinstance(stage, dict)) < 1000, found
    return found


def outcome(folder):
    "The files of an evaluation, without dates"
    return {path.relative_to(folder): re.sub(rb"\d{4}-\d\d-\d\d", b"", path.read_bytes())
            for path in sorted(folder.rglob("*")) if path.is_file()}


def evaluation(work, scale):
    "27,000 problems, killed seven times and resumed: the same files as without a kill"
    n, rng = int(27_000 * scale), random.Random(0)
    measured([*BGRPO, "generate", "test.txt", "--n", str(n), "--degrees", "2_2", "--canonical", "--overwrite"], work)
    widths = dict(num_beams=2, wide_beams=2, curve_beams=0, num_samples=1) # narrower than usual: the kills count
    words = [*BGRPO, "evaluate", "--model", "tiny", "--problems", "test.txt",
             *[word for name, width in widths.items() for word in (f"--{name}", str(width))], "--out"]
    found = dict(n=n, **widths, whole=measured([*words, "whole"], work), kills=0)
    for _ in range(7):
        running = subprocess.Popen([sys.executable, *words, "killed"], cwd=work, env=ENV, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        if ended_before(running, rng.uniform(0.05, 0.3) * found["whole"]["work"]): break
        running.kill()
        running.wait()
        found["kills"] += 1
    found["rest"] = measured([*words, "killed"], work)
    assert outcome(work / "killed") == outcome(work / "whole"), "another result"
    return found


def workers_of(launcher):
    "The processes of a sweep that run trials, and the programs of the trials"
    try: return psutil.Process(launcher.pid).children(recursive=True)
    except psutil.NoSuchProcess: return []


def sweep(work, scale):
    "200 trials on four workers; a worker, a program or the launcher is killed once in a while"
    from bgrpo_nb.study.analysis import read_runs
    x, y = list(range(20)), list(range(max(2, int(10 * scale))))
    n, rng = len(x) * len(y), random.Random(0)
    (work / "toy.py").write_text(TOY)
    (work / "sweep.yaml").write_text(SWEEP.format(x=x, y=y))
    folder, started, kills = work / "sweep", time.monotonic(), dict(child=0, launcher=0)
    words = [sys.executable, *BGRPO, "sweep", "sweep.yaml", "--engine", "optuna", "--workers", "4", "--output_dir", str(folder)]
    def settled(): return len(list(folder.glob("trials/*/result.json")))
    status, target = None, 0
    while status is None:
        more = ["--resume"] if (folder / "journal.log").exists() else []
        launcher = subprocess.Popen([*words, *more], cwd=work, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while launcher.poll() is None:
            time.sleep(0.05)
            if settled() < target or settled() > n - 2: continue
            target = settled() + rng.randint(3, 9)
            name = "launcher" if rng.random() < 0.15 else "child"
            victims = [launcher] if name == "launcher" else workers_of(launcher)
            if not victims: continue
            kills[name] += 1
            try: os.kill(rng.choice(victims).pid, signal.SIGKILL)
            except ProcessLookupError: pass
        status = launcher.wait() if launcher.returncode >= 0 else None
    runs = read_runs(folder).table
    found = dict(n=n, seconds=round(time.monotonic() - started, 1), kills=kills, status=status,
                 trials=len(list((folder / "trials").iterdir())), states=runs.state.value_counts().to_dict())
    right = runs[runs.state == "finished"]
    assert status == 0 and len(right) == n and len(right[["x", "y"]].drop_duplicates()) == n, found
    assert ((right.eval_score - 100 * right.x - right.y - 0.5).abs() < 1e-9).all(), found
    return found


PARTS = (problems, evaluation, sweep)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/load"))
    parser.add_argument("--scale", type=float, default=1)
    parser.add_argument("--parts", nargs="*", choices=[part.__name__ for part in PARTS], help="these alone; default: all")
    a = parser.parse_args()
    path, work = a.out / "report.json", a.out.resolve() / "work"
    for part in PARTS:
        if a.parts and part.__name__ not in a.parts: continue
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        before = json.loads(path.read_text())["parts"] if path.exists() else {}
        found = part(work, a.scale) | dict(load=round(os.getloadavg()[1], 1))
        write_json(path, dict(**provenance(0), parts=before | {part.__name__: found}))
        print(part.__name__, found, flush=True)
    shutil.rmtree(work)


if __name__ == "__main__": main()
