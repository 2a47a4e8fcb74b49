"""How the settings of record.py were chosen: on the last third of valid.tsv alone, one seed; the test rows are not read.

    OMP_NUM_THREADS=1 python nbs/experiments/recommendation/choose.py        # choices.json; settings that are there are not run again

Supervised training sees what came before the last third, reinforcement the rows of the first two thirds. Each setting differs from the chosen
one in what it names. NDCG@10 after 0, 35, 70 and 105 steps: lists of 20 beams under the constraint."""
import json
import os
import time

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from record import DATA, HERE, REINFORCED, RUNS, SUPERVISED

from bgrpo_nb import BGRPOConfig, BGRPOTrainer, load_model, save_model
from bgrpo_nb.base.files import write_json
from bgrpo_nb.base.run_folder import provenance
from bgrpo_nb.learn.ranking import TargetReward
from bgrpo_nb.recommend.catalogue import constraint_of, read_catalogue, read_histories, sequences_of
from bgrpo_nb.recommend.recommender import SharedWordsReward, as_dataset, learn_sequences, measure_lists, new_recommender, recommend
from transformers import PrinterCallback

FILE, FOLDER = HERE / "choices.json", RUNS / "choose"
SETTINGS = {
    "as chosen": {}, "GRPO": dict(rollout="sample"), "half beams, half samples": dict(rollout="mixed"),
    "no constraint in training": dict(constrained=False), "probability shared among allowed tokens": dict(renormalize=True),
    "reward: hit": dict(reward="hit"), "reward: NDCG": dict(reward="ndcg"), "reward: penalty by rank (ReRe)": dict(reward="rank_penalty"),
    "groups of 8": dict(num_generations=8), "groups of 32": dict(num_generations=32), "learning rate 3e-4": dict(learning_rate=3e-4),
}


def measured(model, catalogue, rows):
    return measure_lists(catalogue, rows, recommend(model, catalogue, [row.items for row in rows], constraint=constraint_of(catalogue)))


def reinforced(start, catalogue, rows, held_out, constrained=True, renormalize=False, reward=None, **settings):
    "Metrics by step"
    def evaluator(model, tokenizer): return measured(model, catalogue, held_out)
    settings = REINFORCED | dict(reward=reward or "rank") | settings
    config = BGRPOConfig(output_dir=str(FOLDER / "trainer"), max_completion_length=catalogue.length, use_cpu=True, disable_tqdm=True, save_strategy="no",
                         gradient_checkpointing=False, eval_strategy="steps", eval_steps=35, logging_steps=35, **settings)
    pay = TargetReward() if reward else SharedWordsReward(catalogue)
    trainer = BGRPOTrainer(load_model(start, device="cpu"), pay, config, as_dataset(catalogue, rows), processing_class=catalogue.tokenizer,
                           constraint=constraint_of(catalogue, renormalize) if constrained else None, evaluator=evaluator)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [dict(step=row["step"], **{k: round(row[f"eval_{k}"], 5) for k in ("ndcg@10", "hr@10", "hr@20")})
            for row in trainer.state.log_history if "eval_ndcg@10" in row]


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    catalogue = read_catalogue(DATA / "catalogue.tsv")
    rows = read_histories(DATA / "valid.tsv", catalogue)
    early = len(rows) * 2 // 3
    found = json.loads(FILE.read_text())["runs"] if FILE.exists() else {}
    def record(): write_json(FILE, dict(rows=early, held_out=len(rows) - early, supervised=SUPERVISED, reinforced=REINFORCED, runs=found, **provenance(0)))
    for steps in (800, 1600):
        folder = FOLDER / str(steps)
        if not folder.is_dir():
            model = new_recommender(catalogue)
            learn_sequences(model, catalogue, sequences_of(rows, early), **SUPERVISED | dict(steps=steps))
            found[f"supervised, {steps} steps"] = dict(history=[dict(step=0, **measured(model, catalogue, rows[early:]))])
            save_model(model, catalogue.tokenizer, folder)
            record()
    for name, settings in SETTINGS.items():
        if name in found: continue
        start = time.perf_counter()
        history = reinforced(FOLDER / str(SUPERVISED["steps"]), catalogue, rows[:early], rows[early:], **settings)
        found[name] = dict(settings=settings, history=history, seconds=round(time.perf_counter() - start))
        print(name, found[name], flush=True)
        record()
