"""Processes that end with the one that started them: identity across machines, a child tied to its parent, every leftover found and ended.

It knows neither sweeps nor training, and loads nothing heavy."""
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from bgrpo_nb.base.files import JsonlTail

MARK = "BGRPO_TRIAL_FOLDER"  # in the environment of a trial's program, and so of whatever it starts


def myself():
    "Host, pid and start time: together no other process has them"
    return dict(host=socket.gethostname(), pid=os.getpid(), started=psutil.Process().create_time())


def is_alive(pid, started):
    "Whether that very process of this machine still runs; a zombie does not"
    try:
        found = psutil.Process(pid)
        return abs(found.create_time() - started) < 1 and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess: return False


def tie_to_parent(parent, number):
    "From now on the kernel sends this process signal `number` when `parent` dies, however it dies (Linux; elsewhere nothing is tied)"
    if not sys.platform.startswith("linux"): return
    ctypes.CDLL(None, use_errno=True).prctl(1, int(number))  # PR_SET_PDEATHSIG
    if os.getppid() != parent: os.kill(os.getpid(), number)  # it was gone before the tie held


def hand_back_memory():
    "Pages that hold only freed memory go back to the system (where the C library is glibc; elsewhere nothing happens)"
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "malloc_trim"): libc.malloc_trim(0)


def start(words, log, env, number=signal.SIGKILL):
    "A child in a session of its own, tied to this process; what it prints goes to the file `log`"
    parent = os.getpid()
    with open(log, "ab") as file:
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True,
                                preexec_fn=lambda: tie_to_parent(parent, number))


def end(child, grace=30.0):
    "SIGTERM, and after `grace` seconds SIGKILL; its exit status"
    if child.poll() is None: child.terminate()
    try: return child.wait(grace)
    except subprocess.TimeoutExpired: child.kill()
    return child.wait()


def marked(folder):
    "Processes of this user that belong to the trial in `folder`, whoever started them"
    found = []
    for p in psutil.process_iter():
        try:
            if p.pid != os.getpid() and p.environ().get(MARK) == str(folder) and p.status() != psutil.STATUS_ZOMBIE: found.append(p)
        except (psutil.Error, OSError): continue
    return found


def end_marked(folder):
    "Kill what a trial left behind; done when nothing is left"
    deadline = time.monotonic() + 10
    while (left := marked(folder)) and time.monotonic() < deadline:
        for p in left:
            try: p.kill()
            except psutil.Error: pass
        psutil.wait_procs(left, timeout=1)


def follow(command, where, each, asked=lambda: None, grace=60.0):
    """Run a trial's program in the folder `where` to its end, or until there is a reason to end it: exit status, reason or None.

    `each` gets every row of metrics.jsonl as it comes, `asked` is called twice a second; what either returns is the reason to end the program."""
    child, rows, why = start(command, where / "log.txt", os.environ | {MARK: str(where)}), JsonlTail(where / "metrics.jsonl"), None
    try:
        while why is None:
            try: child.wait(0.5)
            except subprocess.TimeoutExpired: pass
            ended = child.poll() is not None
            for row in rows.new(): why = why or each(row)
            why = why or asked()
            if ended: return child.returncode, None
        return end(child, grace), why
    finally:
        end(child, 0)
        end_marked(where)


def visible_gpus():
    "Names for CUDA_VISIBLE_DEVICES, one a GPU: those this process may see; none without a driver"
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None: return [g for g in given.split(",") if g.strip() not in ("", "-1")]
    if not shutil.which("nvidia-smi"): return []
    said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return [str(i) for i, _ in enumerate(row for row in said.splitlines() if row.startswith("GPU "))]


def shares(workers, gpus, threads=None):
    "Environment of each worker: its GPU, by turns, and its threads: a fair part of the cores where neither flag nor OMP_NUM_THREADS says"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = str(threads or os.environ.get("OMP_NUM_THREADS") or max(1, cores // workers))
    return [dict(OMP_NUM_THREADS=threads) | (dict(CUDA_VISIBLE_DEVICES=gpus[i % len(gpus)] if gpus else "") if gpus is not None else {}) for i in range(workers)]
