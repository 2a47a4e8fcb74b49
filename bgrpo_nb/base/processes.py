"""Child processes that end together with the process that started them.

A process is identified by host, pid and start time, so that no other process is taken for it, on any machine. A child
is tied to its parent: when the parent dies, however it dies, the child is ended. What a trial's program leaves running
is found by a mark in its environment and ended. Nothing heavy is imported here."""
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import psutil

from bgrpo_nb.base.files import JsonlTail

MARK = "BGRPO_TRIAL_FOLDER"  # in the environment of a trial's program, and so of every process that it starts
PR_SET_PDEATHSIG = 1         # of Linux's prctl: the signal that a process gets when its parent dies
POLL_SECONDS = 0.5           # how often `follow` looks for new rows


def myself():
    "This process as a dict of `host`, `pid` and `started`: no other process has the same three"
    return dict(host=socket.gethostname(), pid=os.getpid(), started=psutil.Process().create_time())


def is_alive(pid, started):
    "Does the process with this pid and this start time (seconds) still run on this machine? A zombie does not"
    try:
        found = psutil.Process(pid)
        return abs(found.create_time() - started) < 1 and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess: return False


def tie_to_parent(parent, number):
    "From now on this process gets signal `number` when the process `parent` dies (Linux only; elsewhere: no effect)"
    if not sys.platform.startswith("linux"): return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number))
    if os.getppid() == parent or _runs(parent): return       # there may be a fork server in between
    os.kill(os.getpid(), number)                             # the parent died before the signal was asked for


def _runs(pid):
    try: return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess: return False


def hand_back_memory():
    "Give freed memory back to the system (needs glibc; elsewhere: no effect)"
    if not sys.platform.startswith("linux"): return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"): libc.malloc_trim(0)


def start(words, log, env, number=signal.SIGKILL):
    "Start a child in its own session, tied to this process by signal `number`; its output is appended to file `log`"
    parent = os.getpid()
    def tie(): tie_to_parent(parent, number)
    with open(log, "ab") as file:
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=env,
                                start_new_session=True, preexec_fn=tie)


def end(child, grace=30.0):
    "Send SIGTERM, and SIGKILL if the child still runs after `grace` seconds; returns its exit status"
    if child.poll() is None: child.terminate()
    try: return child.wait(grace)
    except subprocess.TimeoutExpired: child.kill()
    return child.wait()


def marked(folder):
    "All processes of this user that belong to the trial in `folder`, whichever process started them"
    return [process for process in psutil.process_iter() if _is_marked(process, folder)]


def _is_marked(process, folder):
    "Does a process carry the mark of this trial? This process itself and zombies do not count"
    try:
        if process.pid == os.getpid() or process.environ().get(MARK) != str(folder): return False
        return process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError): return False    # it ended meanwhile, or belongs to another user


def end_marked(folder, seconds=10.0):
    "Kill every process that a trial left behind; gives up after `seconds`"
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        left = marked(folder)
        if not left: return
        for process in left:
            try: process.kill()
            except psutil.Error: pass    # it has ended already
        psutil.wait_procs(left, timeout=1)


def follow(command, where, each, asked=lambda: None, grace=60.0):
    """Run a trial's program in the folder `where` until it ends, or until there is a reason to end it.

    `each` gets every new row of metrics.jsonl, and `asked` is called twice a second. What either returns is the reason
    to end the program, which then has `grace` seconds. Returns the exit status, and the reason or None."""
    child = start(command, where / "log.txt", os.environ | {MARK: str(where)})
    rows = JsonlTail(where / "metrics.jsonl")
    try:
        while True:
            try: child.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired: pass
            ended = child.poll() is not None    # before the rows are read, so that the last ones are seen, too
            reason = _first_reason(each, rows.new()) or asked()
            if ended: return child.returncode, None
            if reason: return end(child, grace), reason
    finally:
        end(child, 0)
        end_marked(where)


def _first_reason(each, rows):
    "What `each` returns for the first row that is a reason to end; None if no row is"
    for row in rows:
        reason = each(row)
        if reason: return reason
    return None


def visible_gpus():
    "One name for CUDA_VISIBLE_DEVICES per GPU that this process may use; an empty list without a driver"
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None: return [name for name in given.split(",") if name.strip() not in ("", "-1")]
    if not shutil.which("nvidia-smi"): return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    gpus = [line for line in listed.splitlines() if line.startswith("GPU ")]
    return [str(i) for i in range(len(gpus))]


def usable_cores():
    "How many cores this process may use"
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def shares(workers, gpus, threads=None):
    """The environment variables of each worker: one GPU each, in turn, and an equal share of the cores.

    `gpus`: names as in CUDA_VISIBLE_DEVICES; an empty list hides all GPUs, None leaves the variable as it is.
    `threads`: for each worker; without it OMP_NUM_THREADS decides, and without that the number of cores."""
    threads = threads or os.environ.get("OMP_NUM_THREADS") or max(1, usable_cores() // workers)
    environments = [dict(OMP_NUM_THREADS=str(threads)) for _ in range(workers)]
    if gpus is not None:
        for i, environment in enumerate(environments):
            environment["CUDA_VISIBLE_DEVICES"] = gpus[i % len(gpus)] if gpus else ""
    return environments
