"""Gradients over the group's trie against full rows, and a whole optimizer step against stock `GRPOTrainer`.

6 layers x 512, prompts of degree 4 of 4 (the recorded one has 220 tokens), 40 new tokens, 25 beams, fp32 on a CPU.
The beams of the stock trainer come from `generate`. Ratios are of two things timed in one run; peak memory is that of a
process that does one of the two alone.

    python benchmarks/bench_training.py [--quick]      # quick: 4 prompts a step instead of 20"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from _record import peak_gib, record

K, C = 25, 40
# ours is timed with the settings that save memory, which cost some of its speed
FRUGAL = dict(prompts_at_once=8, trie_elements=2**22, torch_empty_cache_steps=1)


def build(position="rotary"):
    from bgrpo_nb.policy.model import new_model
    return new_model("paper", position=position, initializer_range=0.1)


def logps_and_gradients():
    "One group: forward and backward over the trie and over full rows, in turns"
    from bgrpo_nb.algebra.problems import generate_problems
    from bgrpo_nb.policy.model import encode, load_tokenizer
    from bgrpo_nb.learn.trie import trie_logps
    from bgrpo_nb.learn.trl_batching import roll_out
    found, tokenizer = {}, load_tokenizer("single")
    for name, position in (("llama", "rotary"), ("gpt2", "learned")):
        model = build(position)
        prompt = encode(tokenizer, [generate_problems(1, 4, 4, seed=9)[0].prompt]).input_ids
        group = roll_out(model, prompt.tolist(), K, C, None, 0)[0]
        ids = torch.cat([prompt.expand(K, -1), torch.tensor([c.ids for c in group])], 1)
        mask = torch.ones_like(ids)

        def trie(): return trie_logps(model, ids, mask, C)[0]
        def rows():
            logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=C + 1).logits
            return logits[:, :-1].log_softmax(-1).gather(2, ids[:, -C:, None])[..., 0]

        def timed(f):
            model.zero_grad()
            start = time.perf_counter()
            logps = f()
            logps.sum().backward()
            seconds = time.perf_counter() - start
            gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            return seconds, logps.detach(), torch.cat(gradients)

        (_, a, ga), (_, b, gb) = timed(trie), timed(rows)
        assert (a - b).abs().max() < 1e-4 and (ga - gb).norm() / gb.norm() < 1e-4, "the two forms differ"
        times = [(timed(trie)[0], timed(rows)[0]) for _ in range(3)]
        fast, slow = (statistics.median(t) for t in zip(*times))
        row = dict(prompt=prompt.shape[1], seconds=round(fast, 3), full_rows_seconds=round(slow, 3),
                   speedup=round(slow / fast, 2), logps_differ=float((a - b).abs().max()))
        found[f"log-probabilities with gradients, {name}"] = row
        print(name, row, flush=True)
    return found


def stock_trainer(model, tokenizer, reward, config, dataset):
    "TRL's own trainer; beams by `generate`, one prompt at a time, through its rollout function"
    from trl import GRPOTrainer

    def rollout(prompts, trainer):
        from trl.models import unwrap_model_for_generation
        prompt_ids = [tokenizer(p)["input_ids"] for p in prompts]
        completions = []
        with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as plain, torch.no_grad():
            for i in range(0, len(prompts), K):
                ids = torch.tensor([prompt_ids[i]])
                out = plain.generate(ids, attention_mask=torch.ones_like(ids), num_beams=K, num_return_sequences=K,
                                     length_penalty=0.0, do_sample=False, max_new_tokens=C, pad_token_id=0)
                completions += out[:, ids.shape[1]:].tolist()
        ranks = [i % K for i in range(len(prompts))]
        return dict(prompt_ids=prompt_ids, completion_ids=completions, logprobs=None, beam_rank=ranks)

    return GRPOTrainer(model, reward, config, dataset, processing_class=tokenizer, rollout_func=rollout)


def one_step(kind, prompts, beta, folder):
    "An optimizer step of `kind` in this process; the second of two counts"
    from datasets import Dataset

    from bgrpo_nb.algebra.problems import generate_problems
    from bgrpo_nb.policy.model import load_model, load_tokenizer
    from bgrpo_nb.solve.decomposition_reward import decomposition_reward
    from bgrpo_nb.recipes.callbacks import show_progress
    from bgrpo_nb.learn.config import BGRPOConfig
    from bgrpo_nb.learn.trainer import BGRPOTrainer
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    tokenizer, model = load_tokenizer(folder), load_model(folder, device="cpu")
    model.generation_config.eos_token_id = None
    steps = 2 if kind == "ours" else 1
    config = BGRPOConfig(output_dir=os.path.join(folder, kind), num_generations=K, per_device_train_batch_size=K,
                         gradient_accumulation_steps=prompts, max_steps=steps, max_completion_length=C, beta=beta,
                         gradient_checkpointing=False, use_cpu=True, disable_tqdm=True, save_strategy="no", **FRUGAL)
    algebra = decomposition_reward(tokenizer)

    def reward(prompts, completion_ids, beam_rank, **kwargs):
        rewards = algebra(prompts, completion_ids, beam_rank)
        return [r + k / 100 for r, k in zip(rewards, beam_rank)]

    dataset = Dataset.from_dict({"prompt": [p.prompt for p in generate_problems(prompts, 4, 4, seed=8)]})
    if kind == "ours": trainer = BGRPOTrainer(model, reward, config, dataset, processing_class=tokenizer)
    else: trainer = stock_trainer(model, tokenizer, reward, config, dataset)
    show_progress(trainer)
    start = time.perf_counter()
    trainer.train()
    seconds = (time.perf_counter() - start) / steps
    print(json.dumps(dict(seconds=round(seconds, 2), peak_gib=peak_gib())))


def step_in_a_process(kind, prompts, beta, folder):
    "Seconds and peak memory of `one_step` in a process of its own"
    command = [sys.executable, __file__, "--step", kind, str(prompts), str(beta), folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode: raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def whole_steps(prompts):
    "Each kind in a process of its own, one after the other"
    from bgrpo_nb.policy.model import load_tokenizer, save_model
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        save_model(build(), load_tokenizer("single"), folder)
        for beta in (0.0, 0.01):
            kinds = "ours", "stock", "ours"
            before, stock, after = (step_in_a_process(kind, prompts, beta, folder) for kind in kinds)
            ours = dict(seconds=round((before["seconds"] + after["seconds"]) / 2, 2),
                        peak_gib=max(before["peak_gib"], after["peak_gib"]))
            name = f"optimizer step, {prompts} prompts x {K} beams, beta={beta}"
            found[name] = dict(**ours, settings=FRUGAL, stock_seconds=stock["seconds"],
                               stock_peak_gib=stock["peak_gib"], speedup=round(stock["seconds"] / ours["seconds"], 2),
                               memory=round(ours["peak_gib"] / stock["peak_gib"], 3))
            print(name, found[name], flush=True)
    return found


if __name__ == "__main__":
    if "--step" in sys.argv: one_step(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), sys.argv[5])
    else: record("training", logps_and_gradients() | whole_steps(4 if "--quick" in sys.argv else 20))
