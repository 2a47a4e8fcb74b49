"""Signals that ask a program to stop: Ctrl-C, SIGTERM, and SIGHUP of a terminal that was closed.

A signal that is ignored stays ignored, so `nohup` and `&` keep their meaning. What is printed after a terminal was
closed is lost and raises nothing. A second Ctrl-C or SIGTERM ends a command at once; a second SIGHUP does not, because
a shell and the system both send one when a terminal closes."""
import os
import signal
import stat
import threading
from contextlib import contextmanager

HANGUP = getattr(signal, "SIGHUP", None)
ASKING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextmanager
def handled(handler):
    "While the block runs, `handler(number)` is called for each of these signals; in the main thread only"
    before, heard = {}, []
    def answer(number, frame):
        if number == HANGUP: _forget_terminal()
        if number == HANGUP and heard: return
        heard.append(number)
        handler(number)
    if threading.current_thread() is threading.main_thread():
        now = {number: signal.getsignal(number) for number in ASKING}
        before = {number: was for number, was in now.items() if was not in (signal.SIG_IGN, None)}
        for number in before: signal.signal(number, answer)
    try: yield
    finally:
        for number, was in before.items():
            if signal.getsignal(number) is not signal.SIG_DFL: signal.signal(number, was) # `end_at_once` stays


_a_command = False


def this_is_a_command():
    "This process runs one command and may be ended; a notebook's kernel may not"
    global _a_command
    _a_command = True


def end_at_once():
    "From now on a signal ends the command, whatever it computes: Python's own handlers wait for long operations"
    for number in ASKING if _a_command else ():
        if number != HANGUP and signal.getsignal(number) is not signal.SIG_IGN: signal.signal(number, signal.SIG_DFL)


def _forget_terminal():
    "Let standard output and errors lead nowhere, where they led to a terminal"
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        try:
            if stat.S_ISCHR(os.fstat(number).st_mode): os.dup2(nowhere, number)
        except OSError: pass    # it was closed
    os.close(nowhere)
