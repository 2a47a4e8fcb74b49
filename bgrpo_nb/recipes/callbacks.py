"""What a training does beside its steps: it logs, draws, shows progress, and stops cleanly at a signal.

Shared by the recipes; it knows neither problems nor rewards."""
import json
import signal
import sys
import time
import warnings
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from bgrpo_nb.base.run_folder import read_metrics


class RunLog(TrainerCallback):
    "Appends what a trainer logs to `metrics.jsonl`, one line a time, with the seconds that the run has taken so far"
    def __init__(self, folder):
        self.path = Path(folder) / "metrics.jsonl"
        before = read_metrics(self.path) if self.path.exists() else []
        self.started = time.time() - max((row.get("runtime", 0) for row in before), default=0)

    def runtime(self): return round(time.time() - self.started, 1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs: return
        row = {"step": state.global_step, "runtime": self.runtime(), **{k: v for k, v in logs.items() if isinstance(v, (int, float, dict))}}
        try:
            with self.path.open("a", encoding="utf-8") as file: file.write(json.dumps(row) + "\n")
        except OSError as e:
            raise OSError(f"{self.path} cannot be written at step {state.global_step} ({e.strerror}); the checkpoints before it are whole: "
                          "free some space and go on with --resume") from e


class PlotHistory(TrainerCallback):
    "Redraws a run's figure after each validation; in a notebook it is shown and replaced in its place"
    def __init__(self, folder, draw): # draw(rows, path)
        self.folder, self.draw, self.shown = Path(folder), draw, None

    def on_evaluate(self, args, state, control, **kwargs):
        if not state.is_world_process_zero: return
        path = self.folder / "plots" / "history.png"
        try: self.draw(read_metrics(self.folder / "metrics.jsonl"), path)
        except OSError as e: return warnings.warn(f"{path} cannot be drawn ({e})")     # no reason to end a training
        if not args.disable_tqdm and _in_notebook(): self._show(path)

    def _show(self, path):
        from IPython.display import Image, display
        if self.shown is None: self.shown = display(Image(path), display_id=True)
        else: self.shown.update(Image(path))


def _in_notebook(): return "IPython" in sys.modules and hasattr(sys.modules["IPython"].get_ipython(), "kernel")


class StopCleanly(TrainerCallback):
    "Ctrl-C or SIGTERM, at any process: all finish the step, save, end. A second Ctrl-C ends at once"
    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self): self.asked, self.everywhere, self.before = False, False, {}

    def __enter__(self):
        try: self.before = {s: signal.signal(s, self._ask) for s in self.SIGNALS}
        except ValueError: self.before = {}  # not the main thread: signals stay as they are
        return self

    def __exit__(self, *error):
        for s, handler in self.before.items(): signal.signal(s, handler)

    def _ask(self, number, frame):
        if self.asked: raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:
            from accelerate.utils import gather_object
            self.everywhere = any(gather_object([self.asked]))   # a signal does not reach all processes within the same step
        else: self.everywhere = self.asked
        if self.everywhere: control.should_save = control.should_training_stop = True


class Progress(TrainerCallback):
    "One bar with the time left and the newest value of a few logged keys"
    def __init__(self, keys): self.keys, self.values, self.bar = keys, {}, None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero: self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.values |= {k: f"{logs[k]:.3f}" for k in self.keys if isinstance((logs or {}).get(k), float)}
        if self.bar is not None: self.bar.set_postfix(self.values)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None: self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None: self.bar.close()


def show_progress(trainer, *keys):
    "`Progress` instead of a trainer's own bar and printed dictionaries; nothing at all under `disable_tqdm`"
    disable_progress_bar()  # one for each file that is read or written
    for callback in (ProgressCallback, PrinterCallback): trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm: trainer.add_callback(Progress(keys))
