"""What reinforcement changes in `small`: the validation of finished runs, and their policies beside the one they began with.

    python nbs/experiments/policies/reinforcement.py

Reads the run folders named below, those that are there; what was recorded of others stays. Each run's policy and its start then answer the 2,700
problems of `record.py` greedily, and the difference is taken problem by problem. The last three runs but for `--baseline`, FRESH being the first 9,600 of 12,800:

    bgrpo generate fresh.txt --n 12800 --degrees 2_2,2_3,2_4,3_2,3_3,3_4,4_2,4_3,4_4 --canonical --seed 90002
    bgrpo train --config configs/train/nine_degrees.yaml --problems FRESH --lr_scheduler_type linear --max_steps 300 --eval_steps 100 --baseline mean"""
import json
from functools import lru_cache
from pathlib import Path

import torch
import yaml
from record import DEGREES, OUT

from bgrpo_nb.solve.beam_filter import search_problems
from bgrpo_nb.algebra.problems import read_problems
from bgrpo_nb.solve.evaluation import bootstrap
from bgrpo_nb.policy.model import load_model, load_tokenizer
from bgrpo_nb.base.files import write_json
from bgrpo_nb.base.run_folder import provenance

FILE = Path(__file__).parent / "reinforcement.json"
HARD, FRESH = "1,935 of 2∘4 to 4∘4 with the right beam in places 2 to 25, and 2,000 of nine degrees, three times", "9,600 new ones of nine degrees, once"
RUNS = {"runs/bgrpo-small-4": ("part 3", HARD), "runs/bgrpo-small-5": ("part 4", FRESH),  # folder: the supervised part before it, its problems
        "runs/bgrpo-small-6": ("part 4", FRESH), "runs/bgrpo-small-7": ("part 4", FRESH)}
METRICS = ("greedy_accuracy", "beam_accuracy", "wide_beam_accuracy", "sample_accuracy", "oracle_accuracy", "beam_rank_score", "kl_to_start")
SETTINGS = ("learning_rate", "lr_scheduler_type", "baseline", "num_generations", "rollout")


def validation(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{"step": r["step"]} | {m: r[f"eval_{m}"] for m in METRICS} | {"greedy_by_degree": {d: found["greedy_accuracy"] for d, found in r["eval_by_degree"].items()}}
            for r in rows if "eval_greedy_accuracy" in r]


@lru_cache
def solved(policy): # [0 or 1], of all sets in turn
    model, tokenizer = load_model(policy, device="cpu"), load_tokenizer(policy)
    return [int(s.first_valid == 1) for d in DEGREES for s in search_problems(model, tokenizer, read_problems(OUT / f"sets/{d}.txt"), 1, "ZZ")]


def greedily(start, policy):
    before, after = solved(start), solved(policy)
    n = len(after) // len(DEGREES)
    return {"n": len(before), "before": sum(before) / len(before), "after": sum(after) / len(after), "difference": list(bootstrap([b - a for a, b in zip(before, after)])),
            "after_by_degree": {d: sum(after[k * n:(k + 1) * n]) / n for k, d in enumerate(DEGREES)}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    recorded = json.loads(FILE.read_text())
    for name, (start, problems) in RUNS.items():
        if not ((folder := Path(name)) / "policy").is_dir(): continue
        config = yaml.safe_load((folder / "config.yaml").read_text())
        run = {"run": name, "start": start, "problems": problems} | {k: config[k] for k in SETTINGS} | {"prompts_per_step": config["per_device_train_batch_size"] // config["num_generations"],
               "evaluations": validation(folder), "greedily": greedily(config["model"], str(folder / "policy")), **provenance(config["seed"])}
        recorded["runs"] = [r for r in recorded["runs"] if r.get("run") != name] + [run]
        print(name, run["greedily"], flush=True)
    write_json(FILE, recorded)
