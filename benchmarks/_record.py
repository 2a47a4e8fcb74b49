"Writes a benchmark's figures together with what they depend on: machine, versions, commit."
import json
import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def machine():
    "Processor, cores, memory and accelerator, in words"
    import torch
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        cpu = names[0] if names else cpu
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(cpu=cpu, cores=cores, memory_gib=round(pages / 2**30), threads=torch.get_num_threads(), gpu=gpu)


def versions():
    "Python and the packages that decide a timing"
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "trl", "sympy", "python-flint", "numpy"):
        try: found[name] = version(name)
        except PackageNotFoundError: pass
    return found


def commit():
    "The checkout's commit, with `+` where files differ from it; empty where there is no git, or no checkout"
    if shutil.which("git") is None: return ""
    def git(*args):
        done = subprocess.run(["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip()
    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def peak_gib():
    "Peak memory of this process since its program started (Linux)"
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20, 2)


def record(name, results, folder=None, say=True):
    "Write `results` to NAME.json in benchmarks/results or another folder, and print its path"
    folder = RESULTS if folder is None else Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    provenance = dict(date=time.strftime("%Y-%m-%d"), commit=commit(), machine=machine(), versions=versions())
    path.write_text(json.dumps(provenance | dict(results=results), indent=1) + "\n")
    if say: print(f"recorded in {os.path.relpath(path)}")
    return path
