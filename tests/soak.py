"""An hour of what users and machines do to a program: hostile texts, kills, full disks, foreign folders.

   soak.py [--minutes 60] [--out runs/soak] [--seed 0] [--parts kill full_disk]

The parts take turns, each with its share of the time. A fault ends in the report with what repeats it, and the others
continue. The report says how many cases were tried, what was found, and on which machine."""
import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import psutil
from oracles import agrees, compose, draw

from bgrpo_nb.algebra.exact_decomposition import decompose_exact
from bgrpo_nb.algebra.notation import from_text
from bgrpo_nb.algebra.polynomial import REASONS, PrefixError, format_prefix, verify
from bgrpo_nb.base.files import write_json
from bgrpo_nb.base.run_folder import provenance

ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
WORDS = ["+", "*", "^", "P", "N", *"0123456789", "a", "b", "a0", "b1", "&", "⁇", "□", "x", "é", "\x00", "99999999999999999999", ""]
TRAIN = ["train", "--model", "tiny", "--kind", "univariate", "--degrees", "2_2", "--num_problems", "40", "--held_out", "4",
         "--max_steps", "8", "--prompts_per_step", "4", "--num_generations", "4", "--save_steps", "2", "--eval_steps", "4",
         "--num_samples", "2", "--wide_beams", "6", "--num_beams", "4", "--report_to", "none", "--max_completion_length", "24", "--disable_tqdm"]


def bgrpo(words, cwd, limit=None): # most bytes of a file, as on a disk that is full
    "A finished process of the command"
    def set_limit():
        if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return subprocess.run([sys.executable, "-m", "bgrpo_nb", *words], cwd=cwd, env=ENV, capture_output=True, text=True,
                          preexec_fn=set_limit)


def policy_of(folder): return (folder / "policy/model.safetensors").read_bytes()


def snapshot(folder): return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def spaced(text): # as the oracle reads it
    return " ".join(" ".join(word) if word.isdigit() else word for word in text.split())


# One case of each part: a description of the fault, or None; what happened on the way is counted

done = Counter()

def hostile_text(rng, work):
    "A problem and an answer, damaged in a few places; a valid verdict is checked at random points"
    g, h = draw(rng, rng.choice([2, 3]), 9), draw(rng, rng.choice([2, 3]), 9)
    problem = format_prefix(compose(g, h))
    words = rng.choice([format_prefix(h), f"{format_prefix(g, 'b')} & {format_prefix(h)}"]).split(" ")
    for _ in range(rng.choice([0, 1, 1, 2, 8])):
        at = rng.randrange(len(words) + 1)
        words[at:at + rng.choice([0, 1, 1, 3])] = rng.choices(WORDS, k=rng.choice([0, 1, 1, 2, 30]))
    answer = " ".join(words)
    case = dict(problem=problem, answer=answer)
    try: verdict = verify(problem, answer, rng.choice(["QQ", "ZZ"]), rng.random() < 0.5)
    except Exception as e: return case | dict(fault=f"verify raised {type(e).__name__}: {e}")
    if verdict.reason not in REASONS or verdict.valid != (verdict.reason == "ok"): return case | dict(fault=repr(verdict))
    if verdict:
        done["valid"] += 1
        inners = [spaced(part) for part in answer.strip(" ⁇□\n").partition("⁇")[0].split("&")]
        if not agrees(problem, verdict.outer, inners[1:] or inners): return case | dict(fault=f"wrong: {verdict!r}")
    try: from_text(answer)
    except PrefixError: pass
    except Exception as e: return case | dict(fault=f"from_text raised {type(e).__name__}: {e}")
    found = decompose_exact(problem) if rng.random() < 0.1 else []
    if not all(agrees(problem, outer, [inner]) for outer, inner in found): return case | dict(fault="decompose_exact is wrong")


def straight_run(work):
    "A training that nothing interrupts: its folder, and the seconds of work that it took"
    folder, before = work / "straight", resource.getrusage(resource.RUSAGE_CHILDREN)
    if not folder.exists():
        bgrpo([*TRAIN, "--output_dir", str(folder)], work)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        (work / "work.txt").write_text(f"{after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime:.2f}")
    return folder, float((work / "work.txt").read_text())


def ended_before(running, seconds):
    "Whether a process ends before it has worked for so many seconds; the clock on the wall does not count"
    while running.poll() is None:
        try: used = psutil.Process(running.pid).cpu_times()
        except psutil.NoSuchProcess: continue
        if used.user + used.system > seconds: return False
        time.sleep(0.01)
    return True


def kill(rng, work):
    "A training, killed up to three times and resumed, ends with the same policy"
    straight, seconds = straight_run(work)
    folder = work / "killed"
    shutil.rmtree(folder, ignore_errors=True)
    moments = [round(rng.uniform(0.3, 1.1) * seconds, 2) for _ in range(rng.randint(1, 3))]
    for moment in [*moments, float("inf")]:
        more = ["--resume"] if any(folder.glob("checkpoint-*/trainer_state.json")) else []
        if not more: shutil.rmtree(folder, ignore_errors=True)
        with (work / "errors.txt").open("w+") as errors:
            running = subprocess.Popen([sys.executable, "-m", "bgrpo_nb", *TRAIN, "--output_dir", str(folder), *more], cwd=work,
                                       env=ENV, stdout=subprocess.DEVNULL, stderr=errors)
            ended = ended_before(running, moment)
            if not ended: running.send_signal(signal.SIGKILL)
            running.wait()
        done["resumed"] += bool(more)
        done["kills"] += not ended
        if ended and running.returncode: return dict(moments=moments, fault=(work / "errors.txt").read_text()[-800:])
        if ended: break
    if policy_of(folder) != policy_of(straight): return dict(moments=moments, fault="another policy")


def full_disk(rng, work):
    "No file may grow beyond a limit: one line, nothing torn; without the limit the run continues to the same policy"
    straight, folder = straight_run(work)[0], work / "full"
    shutil.rmtree(folder, ignore_errors=True)
    limit = int(10 ** rng.uniform(2, 7.3))
    first = bgrpo([*TRAIN, "--output_dir", str(folder)], work, limit)
    last = first.stderr.strip().splitlines()[-1:] or [""]
    if first.returncode and not last[0].startswith("bgrpo"): return dict(limit=limit, fault=first.stderr[-800:])
    if "should not happen" in last[0]: return dict(limit=limit, fault=last[0])
    if first.returncode == 0: return None if policy_of(folder) == policy_of(straight) else dict(limit=limit, fault="another policy")
    done["full"] += 1
    resumable = any(folder.glob("checkpoint-*/trainer_state.json"))
    if not resumable: shutil.rmtree(folder, ignore_errors=True)
    again = bgrpo([*TRAIN, "--output_dir", str(folder), *(["--resume"] if resumable else [])], work)
    if again.returncode: return dict(limit=limit, fault=again.stderr[-800:])
    if policy_of(folder) != policy_of(straight): return dict(limit=limit, fault="another policy after the disk was full")


def foreign_folder(rng, work):
    "A folder of somebody else: refused in one line, and not a byte changes"
    folder = work / "foreign"
    shutil.rmtree(folder, ignore_errors=True)
    names = ["checkpoint-3/weights.bin", "config.yaml", "metrics.jsonl", "README.md", "plots/history.png", "results.json",
             "policy/model.safetensors", "thesis.tex", "data/x.csv", "result.json"]
    for name in rng.sample(names, rng.randint(1, len(names))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(rng.randbytes(rng.choice([0, 3, 500])))
    before = snapshot(folder)
    words = rng.choice([[*TRAIN, "--output_dir"], ["demo", "--quick", "--output_dir"], ["train", "--resume", "--output_dir"],
                        ["evaluate", "--model", "tiny", "--problems", str(work / "p.txt"), "--limit", "2", "--out"]])
    ended = bgrpo([*words, str(folder)], work)
    what = dict(words=words, files=sorted(map(str, before)))
    if snapshot(folder) != before: return what | dict(fault="something changed")
    if not ended.returncode or ended.stderr.strip().count("\n") or "should not happen" in ended.stderr:
        return what | dict(fault=f"status {ended.returncode}: {ended.stderr[-400:]}")


# All parts

def one_case(part, rng, work):
    "A description of the fault, or None; an error of the part itself is one, too"
    try: return part(rng, work)
    except Exception: return dict(fault=traceback.format_exc()[-2000:])


def tally(part): return dict(cases=0, seconds=0.0, faults=[])


def rounds_of(part, rng, work, found):
    "One case, or as many as fit into ten seconds; a part with twenty faults has shown enough"
    done.clear()
    started = time.monotonic()
    while (seconds := time.monotonic() - started) < 10 and len(found["faults"]) < 20:
        fault = one_case(part, rng, work)
        found["cases"] += 1
        if fault: found["faults"].append(fault | dict(case=found["cases"]))
    found["seconds"] = round(found["seconds"] + max(seconds, 10), 1)
    for name, n in done.items(): found[name] = found.get(name, 0) + n


PARTS = {hostile_text: 0.15, kill: 0.4, full_disk: 0.3, foreign_folder: 0.15} # share of the time


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="*", choices=[part.__name__ for part in PARTS], help="these alone; default: all")
    a = parser.parse_args()
    asked = {part: share for part, share in PARTS.items() if not a.parts or part.__name__ in a.parts}
    work = a.out.resolve() / "work"
    work.mkdir(parents=True, exist_ok=True)
    bgrpo(["generate", str(work / "p.txt"), "--n", "20", "--degrees", "2_2"], work)
    report = dict(minutes=a.minutes, **provenance(a.seed), parts={part.__name__: tally(part) for part in asked})
    draws = {part: random.Random(a.seed) for part in asked}
    while sum(found["seconds"] for found in report["parts"].values()) < 60 * a.minutes:
        part = min(asked, key=lambda part: report["parts"][part.__name__]["seconds"] / asked[part])
        rounds_of(part, draws[part], work, report["parts"][part.__name__])
        report["load"] = os.getloadavg()[2]    # of the last quarter of an hour; 1 for each process that wants to run
        write_json(a.out / "report.json", report)
    for name, found in report["parts"].items(): print(name, {**found, "faults": len(found["faults"])})
    shutil.rmtree(work)
    return any(found["faults"] for found in report["parts"].values())


if __name__ == "__main__": sys.exit(main())
