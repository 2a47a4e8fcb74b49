"""Beam search over a shared prefix against `generate` with cache: 6 layers x 512, prompt 250, 40 new tokens, 25 beams, fp32.

Every figure is the median of alternating runs in one process; ratios are what counts."""
import statistics
import time

import torch
from _record import record

from bgrpo_nb.generation import beam_search, sample
from bgrpo_nb.model import new_model

P, C = 250, 40


def seconds(*functions, repeats=3):
    "Median seconds of each, in turns, after one unmeasured call"
    times = [[] for _ in functions]
    for f in functions: f()
    for _ in range(repeats):
        for f, t in zip(functions, times):
            start = time.perf_counter()
            f()
            t.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


def searches(model, ids, K):
    def ours(): return beam_search(model, ids, num_beams=K, max_new_tokens=C, eos_token_id=None, pad_token_id=0)
    def theirs():
        return model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=K, num_return_sequences=K, length_penalty=0.0, do_sample=False,
                              max_new_tokens=C, pad_token_id=0, return_dict_in_generate=True, output_scores=True)
    return ours, theirs


def linear_products(model, K):
    "The matrix products of the linear layers alone: one prefill and C - 1 steps"
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"]
    width = [m.weight.shape[0] if type(m).__name__ == "Conv1D" else m.weight.shape[1] for m in layers]
    def run():
        with torch.no_grad():
            for rows, steps in ((P, 1), (K, C - 1)):
                inputs = [torch.zeros(rows, w) for w in width]
                for _ in range(steps):
                    for m, x in zip(layers, inputs): m(x)
    return run


def same(ours, theirs, B, K):
    "Sequences equal and scores within 1e-4, before anything is timed"
    a, b = ours(), theirs()
    assert torch.equal(a.sequences, b.sequences[:, P:].view(B, K, C)), "beams differ"
    assert (a.scores - b.sequences_scores.view(B, K)).abs().max() < 1e-3, "scores differ"


def main():
    results, K = {}, 25
    families = {"gpt2": new_model("paper", position="learned"), "llama, 8 heads": new_model("paper"),
                "llama, grouped heads": new_model("paper", num_key_value_heads=2)}
    for name, model in families.items():
        model.generation_config.eos_token_id = None
        for B in (1, 4) if name == "gpt2" else (1,):
            ids = torch.randint(3, 31, (B, P), generator=torch.Generator().manual_seed(0))
            ours, theirs = searches(model, ids, K)
            same(ours, theirs, B, K)
            a, b, floor = seconds(ours, theirs, linear_products(model, K * B))
            results[f"{name}, B={B}"] = dict(seconds=round(a, 3), generate_seconds=round(b, 3), speedup=round(b / a, 2),
                                             linear_seconds=round(floor, 3), over_linear=round(a / floor, 2))
            print(name, B, results[f"{name}, B={B}"], flush=True)
    model = families["llama, 8 heads"]
    ids = torch.randint(3, 31, (1, P), generator=torch.Generator().manual_seed(0))
    for K in (1, 5, 10, 50, 100):
        a, b = seconds(*searches(model, ids, K), repeats=2)
        results[f"llama, K={K}"] = dict(seconds=round(a, 3), generate_seconds=round(b, 3), speedup=round(b / a, 2))
        print(K, results[f"llama, K={K}"], flush=True)
    def ours(): return sample(model, ids, num_return_sequences=16, max_new_tokens=C, eos_token_id=None, pad_token_id=0)
    def theirs(): return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, num_return_sequences=16, max_new_tokens=C, pad_token_id=0)
    a, b = seconds(ours, theirs)
    results["16 samples"] = dict(seconds=round(a, 3), generate_seconds=round(b, 3), speedup=round(b / a, 2))
    record("generation", results)


if __name__ == "__main__": main()
