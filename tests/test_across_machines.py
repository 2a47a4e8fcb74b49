"The launch lines of nbs/tutorials/train_across_machines.ipynb, with smaller sizes: two processes train one's policy."
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from bgrpo_nb.algebra.problems import generate_problems, write_problems
from bgrpo_nb.base.run_folder import read_metrics

REPO = Path(__file__).parent.parent
PAGE = json.loads((REPO / "nbs/tutorials/train_across_machines.ipynb").read_text(encoding="utf-8"))
TEXT = "\n".join("".join(c["source"]) for c in PAGE["cells"] if c["cell_type"] == "markdown")
TEXT = re.sub(r" \\\n +", " ", TEXT) # a command over two lines is one
LINES = re.findall(r"^(?:accelerate launch|torchrun) .*hard_3_2.yaml$", TEXT, re.MULTILINE)
SMALL = ("--problems p.txt --held_out 4 --prompts_per_step 3 --num_generations 4 --max_steps 2 --eval_steps 2 "
         "--num_beams 4 --wide_beams 6 --num_samples 2 --save_steps 2 --warmup_steps 0 --learning_rate 1e-3 "
         "--use_cpu true --disable_tqdm true --max_completion_length 12").split()
LOGGED = "step", "reward", "valid", "eval_beam_rank_score"
HOW = {"accelerate": ["-m", "accelerate.commands.accelerate_cli"], "torchrun": ["-m", "torch.distributed.run"]}


def train(folder, words, name):
    "One run in `folder`, started by `words`"
    outside = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, *words, *SMALL, "--output_dir", name]
    done = subprocess.run(command, cwd=folder, env=outside | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [{k: row.get(k) for k in LOGGED} for row in read_metrics(folder / name / "metrics.jsonl")]
    return rows, load_file(folder / name / "policy/model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "A folder with problems, and a run of one process"
    folder = tmp_path_factory.mktemp("machines")
    problems = [p for outer in (2, 3) for p in generate_problems(12, outer, 2, seed=5, canonical=True)]
    write_problems(folder / "p.txt", problems)
    words = ["-m", "bgrpo_nb", "train", "--config", str(REPO / "configs/train/hard_3_2.yaml")]
    return folder, *train(folder, words, "alone")


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split()[0])
def test_two_processes_train_the_policy_of_one(line, alone):
    "Three groups of four, six rows a process: one group lies on both"
    folder, rows, weights = alone
    program, *words = line.replace("accelerate launch", "accelerate").replace("configs/", f"{REPO}/configs/").split()
    found, other = train(folder, [*HOW[program], *(["launch"] if program == "accelerate" else []), *words], program)
    assert [r["step"] for r in found] == [r["step"] for r in rows]
    for a, b in zip(rows, found):
        for k in a: assert (a[k] is None) == (b[k] is None) and (a[k] is None or abs(a[k] - b[k]) < 1e-4), (k, a, b)
    assert weights.keys() == other.keys()
    moved = max((weights[k] - other[k]).abs().max().item() for k in weights)
    assert moved < 1e-4, f"the policies differ by {moved}"


def test_both_launchers_are_on_the_page(): assert [line.split()[0] for line in LINES] == ["accelerate", "torchrun"]
