"""Seconds of an optimizer step and peak memory, by preset, beam width and prompt length.

A step is a search for every prompt, log-probabilities with gradients over the tries, and AdamW: `paper` objective, fp32
on a CPU, random weights, prompts of exactly the given length, completions of 24 tokens. Each case has a process of its
own: one step to warm up, then those that count. CPU seconds are of that process alone, so they are valid on a shared
machine, too. The record says how busy the machine was.

    python benchmarks/bench_presets.py [--prompts 8] [--steps 2] [--shared]

`--shared` notes in the record that the machine had other work."""
import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from _record import peak_gib, record

PRESETS, BEAMS, LENGTHS, C = ("tiny", "small", "paper"), (25, 10), (240, 60), 24


def one_case(preset, K, P, prompts, steps):
    "Time and memory of a case, in this process, as a line of JSON"
    from datasets import Dataset
    from transformers import TrainerCallback

    from bgrpo_nb.policy.model import load_tokenizer, new_model
    from bgrpo_nb.recipes.callbacks import show_progress
    from bgrpo_nb.learn.config import BGRPOConfig
    from bgrpo_nb.learn.trainer import BGRPOTrainer
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    marks = []

    class Marks(TrainerCallback):
        def on_step_end(self, *args, **kwargs): marks.append((time.perf_counter(), time.process_time()))

    def reward(completion_ids, beam_rank, **kwargs): return [1.0 - k / K for k in beam_rank]  # no group is all equal
    rng, digits = random.Random(0), "0123456789"
    texts = [" ".join(["P", *rng.choices(digits, k=P - 2), "⁇"]) for _ in range(prompts)]
    dataset = Dataset.from_dict({"prompt": texts})
    model = new_model(preset, initializer_range=0.1)
    with tempfile.TemporaryDirectory() as folder:
        config = BGRPOConfig(output_dir=folder, num_generations=K, prompts_per_step=prompts, max_steps=1 + steps,
                             max_completion_length=C, gradient_checkpointing=False, use_cpu=True, disable_tqdm=True,
                             save_strategy="no")
        trainer = BGRPOTrainer(model, reward, config, dataset, processing_class=load_tokenizer("single"),
                               callbacks=[Marks()])
        show_progress(trainer)
        loaded = peak_gib()
        trainer.train()
    wall, cpu = ([b - a for a, b in itertools.pairwise(column)] for column in zip(*marks))
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps(dict(preset=preset, parameters=parameters, K=K, prompt=P,
                          seconds=round(statistics.median(wall), 2), cpu_seconds=round(statistics.median(cpu), 2),
                          peak_gib=peak_gib(), before_training_gib=loaded)))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--prompts", type=int, default=8, help="prompts a step")
    p.add_argument("--steps", type=int, default=2, help="steps that count")
    p.add_argument("--shared", action="store_true", help="the machine has other work: say so in the record")
    p.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.case: return one_case(a.case[0], int(a.case[1]), int(a.case[2]), a.prompts, a.steps)
    rows, load = [], os.getloadavg()[0]
    busy = "the machine had other work: CPU seconds count, wall seconds are too high"
    quiet = "the machine had nothing else to do"
    note = busy if a.shared else quiet
    for P, K, preset in itertools.product(LENGTHS, BEAMS, PRESETS):
        case = preset, K, P
        sizes = ["--prompts", str(a.prompts), "--steps", str(a.steps)]
        command = [sys.executable, __file__, "--case", *map(str, case), *sizes]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode: raise SystemExit(done.stderr)
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(rows[-1], flush=True)
        # after each case, so that a run that is stopped has recorded what it measured
        record("presets", dict(note=note, load_before=round(load, 1), prompts_per_step=a.prompts, completion_tokens=C,
                               steps=a.steps, threads=torch.get_num_threads(), rows=rows))


if __name__ == "__main__": main()
