"Two steps of BGRPO on the CPU, alone or under torchrun; what each process saw is written to a folder. Run by test_trainer.py."
import json
import sys
from pathlib import Path

import torch
from datasets import Dataset

from bgrpo_nb.algebra.problems import generate_problems
from bgrpo_nb.policy.model import load_model, load_tokenizer
from bgrpo_nb.solve.decomposition_reward import decomposition_reward
from bgrpo_nb.search.allowed_sequences import AllowedSequences
from bgrpo_nb.solve.grammar import PrefixGrammar
from bgrpo_nb.learn.config import BGRPOConfig
from bgrpo_nb.learn.trainer import BGRPOTrainer

folder, policy, rows, more = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
kind = more.pop("constraint", None)
torch.set_num_threads(1)
tokenizer, seen = load_tokenizer(policy), []
algebra = decomposition_reward(tokenizer)


def reward(prompts, completion_ids, beam_rank, beam_score, **kwargs):
    rewards = [r + len(ids) / 50 for r, ids in zip(algebra(prompts, completion_ids, beam_rank), completion_ids)]  # an untrained policy solves nothing
    seen.append(dict(prompts=prompts, ids=completion_ids, ranks=beam_rank, scores=beam_score, rewards=rewards))
    return rewards


def small_sets(prompts): # of 5, 4, 3, 2 or 1 sequences, by the length of the prompt
    words = AllowedSequences.from_ids([[i] for i in range(12, 17)], end=tokenizer.eos_token_id, renormalize=True)
    nodes = words.find([[i] for i in range(12, 17)])
    keep = torch.zeros(len(prompts), words.nodes, dtype=torch.bool)
    for row, prompt in zip(keep, prompts): row[nodes[:1 + len(prompt) % 5]] = True
    return words.restricted(keep)


constraint = {None: None, "small sets": small_sets, "grammar": PrefixGrammar(tokenizer, renormalize=True)}[kind]
prompts = [p.prompt for p in generate_problems(4, 2, 2, seed=5) + generate_problems(4, 3, 2, seed=5)]
config = BGRPOConfig(output_dir=str(folder), num_generations=4, per_device_train_batch_size=rows, max_steps=2, max_completion_length=8, learning_rate=1e-3,
                     warmup_steps=0, use_cpu=True, disable_tqdm=True, seed=1, **dict(save_strategy="no") | more)
trainer = BGRPOTrainer(load_model(policy, device="cpu"), reward, config, Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer, constraint=constraint)
batches = []
generate = trainer._generate_and_score_completions


def keep(inputs):
    out = generate(inputs)
    batches.append(out["advantages"].tolist())
    return out


trainer._generate_and_score_completions = keep
trainer.train()
index = trainer.accelerator.process_index
logged = [{k: v for k, v in row.items() if k.startswith(("groups/", "reward", "valid", "grad_norm", "entropy"))} for row in trainer.state.log_history if "loss" in row]
(folder / f"seen_{index}.json").write_text(json.dumps(dict(seen=seen, advantages=batches, logged=logged)))
if index == 0: torch.save(trainer.accelerator.unwrap_model(trainer.model).state_dict(), folder / "state.pt")
