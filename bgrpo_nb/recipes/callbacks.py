"""What a training does besides its steps: it logs, draws, shows progress, and stops cleanly at a signal.

These are callbacks of Transformers' `Trainer`. Both recipes use them; they depend on neither problems nor rewards."""
import json
import sys
import time
import warnings
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from bgrpo_nb.base.plotting import can_draw
from bgrpo_nb.base.run_folder import read_metrics
from bgrpo_nb.base.signals import end_at_once, handled


class RunLog(TrainerCallback):
    "Appends what a trainer logs to `metrics.jsonl`, with the step and the run's seconds so far"
    def __init__(self, folder):
        self.path = Path(folder) / "metrics.jsonl"
        earlier = read_metrics(self.path) if self.path.exists() else []
        taken = max((row.get("runtime", 0) for row in earlier), default=0)    # before the run was resumed
        self.started = time.time() - taken

    def runtime(self):
        "Seconds that the run has taken, also before it was resumed"
        return round(time.time() - self.started, 1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs: return
        numbers = {name: value for name, value in logs.items() if isinstance(value, (int, float, dict))}
        row = {"step": state.global_step, "runtime": self.runtime(), **numbers}
        try:
            with self.path.open("a", encoding="utf-8") as file: file.write(json.dumps(row) + "\n")
        except OSError as e:
            raise OSError(f"{self.path} cannot be written at step {state.global_step} ({e.strerror}); "
                          "the earlier checkpoints are whole: free some space and continue with --resume") from e


class PlotHistory(TrainerCallback):
    "Draws a run's figure again after each validation; a notebook shows the newest one"
    def __init__(self, folder, draw): # draw(rows, path)
        self.folder, self.draw = Path(folder), draw
        self.shown = None    # IPython's handle of the figure that a notebook shows

    def on_evaluate(self, args, state, control, **kwargs):
        if not state.is_world_process_zero: return
        path = self.folder / "plots" / "history.png"
        if not can_draw(): return
        try: self.draw(read_metrics(self.folder / "metrics.jsonl"), path)
        except OSError as e:     # no reason to end a training
            warnings.warn(f"{path} cannot be drawn ({e})")
            return
        if not args.disable_tqdm and _in_notebook(): self._show(path)

    def _show(self, path):
        from IPython.display import Image, display
        if self.shown is None: self.shown = display(Image(path), display_id=True)
        else: self.shown.update(Image(path))


def _in_notebook(): return "IPython" in sys.modules and hasattr(sys.modules["IPython"].get_ipython(), "kernel")


class StopCleanly(TrainerCallback):
    """After Ctrl-C, SIGTERM or SIGHUP, at any process, all processes finish the step, save a checkpoint and end.

    Use it as `with StopCleanly() as stop:`. `stop.everywhere` says afterwards whether the run was stopped. A second
    signal ends the process at once."""
    def __init__(self):
        self.asked = False         # this process got a signal
        self.everywhere = False    # some process did, and all know it
        self.listening = handled(self._ask)

    def __enter__(self):
        self.listening.__enter__()
        return self

    def __exit__(self, *error): self.listening.__exit__(*error)

    def _ask(self, number):
        if self.asked: raise KeyboardInterrupt
        self.asked = True
        end_at_once()

    def on_step_end(self, args, state, control, **kwargs):
        self.everywhere = self.asked
        if args.world_size > 1:    # a signal does not reach all processes within the same step
            from accelerate.utils import gather_object
            self.everywhere = any(gather_object([self.asked]))
        if self.everywhere: control.should_save = control.should_training_stop = True


class Progress(TrainerCallback):
    "One progress bar with the time left and the newest values of a few logged metrics"
    def __init__(self, keys): # names of the metrics
        self.keys = keys
        self.values = {}
        self.bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero: return
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        self.values |= {key: f"{logs[key]:.3f}" for key in self.keys if isinstance(logs.get(key), float)}
        if self.bar is not None: self.bar.set_postfix(self.values)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None: self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args, state, control, **kwargs): self.close()

    def close(self):
        "End the line of the bar"
        if self.bar is not None: self.bar.close()


def show_progress(trainer, *keys):
    "Give a trainer our `Progress` in place of its own bar and its printed dictionaries; none under `disable_tqdm`"
    disable_progress_bar()  # Transformers shows one for each file that it reads or writes
    for callback in (ProgressCallback, PrinterCallback): trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm: trainer.add_callback(Progress(keys))


def run_steps(trainer, checkpoint=None): # the folder to continue from
    "Train; the progress bar ends before an error is shown"
    try: trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, Progress): callback.close()
