"""Signals that ask a program to stop: Ctrl-C, SIGTERM, and SIGHUP of a terminal that was closed.

A signal that is ignored stays ignored, so `nohup` and `&` keep their meaning. What is printed after a terminal was
closed is lost and raises nothing."""
import os
import signal
import stat
import threading
from contextlib import contextmanager

ASKING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextmanager
def handled(handler):
    "While the block runs, `handler(number)` is called for each of these signals; in the main thread only"
    def answer(number, frame):
        if number == getattr(signal, "SIGHUP", None): _forget_terminal()
        handler(number)
    before = {}
    if threading.current_thread() is threading.main_thread():
        now = {number: signal.getsignal(number) for number in ASKING}
        before = {number: was for number, was in now.items() if was not in (signal.SIG_IGN, None)}
        for number in before: signal.signal(number, answer)
    try: yield
    finally:
        for number, was in before.items(): signal.signal(number, was)


def _forget_terminal():
    "Let standard output and errors lead nowhere, where they led to a terminal"
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        try:
            if stat.S_ISCHR(os.fstat(number).st_mode): os.dup2(nowhere, number)
        except OSError: pass    # it was closed
    os.close(nowhere)
