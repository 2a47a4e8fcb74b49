"""Supervised, GRPO and BGRPO on a real catalogue with semantic IDs: five seeds, each policy measured once on the test rows.

    OMP_NUM_THREADS=1 python nbs/experiments/recommendation/record.py                  # every seed and arm that is missing
    OMP_NUM_THREADS=1 python nbs/experiments/recommendation/record.py --seeds 0 2 4    # in two processes: the others beside it

Data: `recommendation/` in the folder that BGRPO_SHARED names. Policies and ranks are kept in runs/recommendation, so a run that was stopped
continues with the arm it was at. record.json is written anew after each arm, from all that are there."""
import argparse
import fcntl
import itertools
import json
import math
import os
import time
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import torch
from transformers import PrinterCallback

from bgrpo_nb import BGRPOConfig, BGRPOTrainer, load_model, save_model
from bgrpo_nb.base.files import write_json
from bgrpo_nb.base.run_folder import provenance
from bgrpo_nb.recommend.catalogue import constraint_of, read_catalogue, read_histories, sequences_of
from bgrpo_nb.recommend.recommender import (SharedWordsReward, as_dataset, gains, learn_sequences, measure_lists, new_recommender, paired_interval,
                                            recommend, target_ranks)

HERE = Path(__file__).parent
DATA = Path(os.environ.get("BGRPO_SHARED", HERE / "../../../../shared")) / "data/recommendation"
RUNS = Path("runs/recommendation")

SUPERVISED = dict(steps=800, batch_size=64, learning_rate=2e-3, weight_decay=0.05, item_dropout=0.2)
LONG = SUPERVISED | dict(steps=1600)                                                  # one schedule, twice as long: the other start
STARTS = {"supervised": SUPERVISED, "supervised_long": LONG}
MORE = dict(batch_size=64, learning_rate=3e-4, weight_decay=0.05, item_dropout=0.2)  # supervised again; how many steps is the arm's
REINFORCED = dict(num_generations=16, prompts_per_step=64, max_steps=105, learning_rate=1e-4, warmup_steps=5)
BEAMS = 20                                                                            # of every list that is measured
BGRPO, GRPO = dict(rollout="beam", constrained=True), dict(rollout="sample", constrained=True)
REINFORCED_ARMS = {"bgrpo": BGRPO, "grpo": GRPO, "bgrpo_free": BGRPO | dict(constrained=False), "grpo_free": GRPO | dict(constrained=False),
                   "bgrpo_long": BGRPO, "grpo_long": GRPO}
FIRST = ["supervised", "bgrpo", "grpo", "supervised_equal_tokens", "supervised_equal_time"]
ARMS = [*FIRST, "bgrpo_free", "grpo_free", "supervised_long", "bgrpo_long", "grpo_long"]   # `long` begins with the long supervised training


def reinforce(model, catalogue, rows, seed, rollout, constrained, **settings):
    config = BGRPOConfig(output_dir=str(RUNS / "trainer"), rollout=rollout, seed=seed, max_completion_length=catalogue.length, use_cpu=True,
                         disable_tqdm=True, save_strategy="no", gradient_checkpointing=False, logging_steps=5, **REINFORCED | settings)
    trainer = BGRPOTrainer(model, SharedWordsReward(catalogue), config, as_dataset(catalogue, rows), processing_class=catalogue.tokenizer,
                           constraint=constraint_of(catalogue) if constrained else None)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    kept = ("step", "loss", "reward", "invalid", "completions/mean_length", "frac_reward_zero_std")
    return model.eval(), [{k: round(row[k], 5) for k in kept if k in row} for row in trainer.state.log_history if "loss" in row]


def tokens_of(rows, answers): # forwarded in a pass over these rows, with `answers` IDs of three tokens each
    return sum(1 + 3 * len(row.items) + 3 * answers for row in rows) / len(rows)


def steps_of_equal_tokens(rows):
    "Supervised steps in which as many tokens are forwarded as in reinforcement: each prompt once, and a group of answers"
    return round(REINFORCED["max_steps"] * tokens_of(rows, REINFORCED["num_generations"]) / tokens_of(rows, 1))


def steps_of_equal_time(folder):
    "Supervised steps that take as long as this seed's BGRPO, by the pace of the arm of equal tokens"
    done, other = (json.loads((folder / f"{name}.json").read_text()) for name in ("bgrpo", "supervised_equal_tokens"))
    return math.ceil(other["config"]["steps"] * done["cpu_seconds"] / other["cpu_seconds"])


def trained(arm, seed, catalogue, rows, folder): # model, what is to be recorded
    "The policy of an arm"
    if arm in STARTS:
        model = new_recommender(catalogue, seed)
        return model, dict(loss=learn_sequences(model, catalogue, sequences_of(rows), seed=seed, **STARTS[arm]), config=STARTS[arm])
    model = load_model(folder / ("supervised_long" if arm.endswith("_long") else "supervised"), device="cpu")
    if arm in REINFORCED_ARMS:
        model, history = reinforce(model, catalogue, rows, seed, **REINFORCED_ARMS[arm])
        return model, dict(config=REINFORCED | REINFORCED_ARMS[arm], history=history)
    shown = [(*row.items, row.next_item) for row in rows]                     # the rows that reinforcement sees
    steps = steps_of_equal_tokens(rows) if arm == "supervised_equal_tokens" else steps_of_equal_time(folder)
    config = MORE | dict(steps=steps)
    return model, dict(loss=learn_sequences(model, catalogue, shown, seed=seed + 100, **config), config=config)


def run(arm, seed, catalogue, rows, test, folder):
    "Train, measure on the test rows, and write ranks and figures"
    start, cpu = time.perf_counter(), time.process_time()
    model, about = trained(arm, seed, catalogue, rows, folder)
    about |= dict(seconds=round(time.perf_counter() - start, 1), cpu_seconds=round(time.process_time() - cpu, 1))
    if arm in STARTS: save_model(model, catalogue.tokenizer, folder / arm)
    histories = [row.items for row in test]
    lists = recommend(model, catalogue, histories, BEAMS, constraint_of(catalogue))
    free = recommend(model, catalogue, histories[:1000], 20)
    ranks = target_ranks(catalogue, test, lists)
    np.save(folder / f"{arm}.npy", np.array([-1 if r is None else r for r in ranks]))
    metrics = measure_lists(catalogue, test, lists)
    unheld = sum(words is None for row in free for words in row) / sum(map(len, free))
    write_json(folder / f"{arm}.json", dict(arm=arm, **about, metrics=metrics, invalid_without_constraint=unheld, **provenance(seed)))
    print(seed, arm, about["seconds"], {k: round(x, 4) for k, x in metrics.items()}, flush=True)


def gains_of(arm, seed): # (N,) NDCG@10 of each test row
    ranks = np.load(RUNS / str(seed) / f"{arm}.npy")
    return gains([None if r < 0 else int(r) for r in ranks])


def compared(a, b, seeds):
    "NDCG@10 of arm a minus arm b: in each seed, and the mean over seeds; rows resampled"
    each = {seed: gains_of(a, seed) - gains_of(b, seed) for seed in seeds}
    mean = np.mean(list(each.values()), 0)
    return dict(arm=a, minus=b, mean=float(mean.mean()), interval=paired_interval(mean), ahead=sum(float(d.mean()) > 0 for d in each.values()),
                seeds=[dict(seed=seed, difference=float(d.mean()), interval=paired_interval(d)) for seed, d in each.items()])


def collect():
    "record.json from all arms that have been run; two processes take turns"
    with open(RUNS / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        runs = [json.loads(path.read_text()) for path in sorted(RUNS.glob("*/*.json"))]
        found = {arm: sorted(run["seed"] for run in runs if run["arm"] == arm) for arm in ARMS}
        pairs = [(a, b) for a in ("bgrpo", "grpo", "bgrpo_free", "bgrpo_long") for b in ARMS if a != b]
        differences = [compared(a, b, seeds) for a, b in pairs if (seeds := sorted(set(found[a]) & set(found[b])))]
        config = dict(starts=STARTS, more=MORE, reinforced=REINFORCED, beams=BEAMS, invalid_over="20 beams of the first 1,000 rows")
        write_json(HERE / "record.json", dict(config=config, data=described(), differences=differences, runs=runs))


def described():
    catalogue, rows, test = data()
    sequences = sequences_of(rows)
    return dict(items=len(catalogue), ids=len(set(catalogue.ids)), rows_reinforced=len(rows), rows_test=len(test),
                rows_supervised=sum(len(items) - 1 for items in sequences), sequences=len(sequences))


def data():
    catalogue = read_catalogue(DATA / "catalogue.tsv")
    return catalogue, read_histories(DATA / "valid.tsv", catalogue), read_histories(DATA / "test.tsv", catalogue)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", default=ARMS)
    a = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    catalogue, rows, test = data()
    for seed, arm in sorted(itertools.product(a.seeds, a.arms), key=lambda pair: (pair[1] not in FIRST, pair[0])):
        (folder := RUNS / str(seed)).mkdir(parents=True, exist_ok=True)       # the first five arms of all seeds, then the others
        if not (folder / f"{arm}.json").exists(): run(arm, seed, catalogue, rows, test, folder)
        collect()
