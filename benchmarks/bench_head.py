"""Log-probabilities and gradients with a vocabulary of 150,000: the output head in pieces against all logits at once.

2 layers x 128 (Qwen 3), 4 prompts of 60 tokens, 16 completions of 8 tokens each that share their first two, with
entropies, fp32 on a CPU. Peak memory is that of a process that does one of the two alone, less what it has before;
times are taken in turns in one process.

    python benchmarks/bench_head.py"""
import json
import statistics
import subprocess
import sys
import time

import torch
from _record import peak_gib, record

V, B, K, P, C = 150_000, 4, 16, 60, 8
AT_ONCE = 2**60                                                       # so many elements that nothing is in pieces


def build():
    from transformers import Qwen3Config, Qwen3ForCausalLM
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=V, hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
                                        num_key_value_heads=1, head_dim=64, intermediate_size=256,
                                        tie_word_embeddings=True))


def rows():
    draw = torch.Generator().manual_seed(1)
    prompts = torch.randint(2, V, (B, P), generator=draw).repeat_interleave(K, 0)
    stems = torch.randint(2, V, (B, 2), generator=draw).repeat_interleave(K, 0)
    ids = torch.cat([prompts, stems, torch.randint(2, V, (B * K, C - 2), generator=draw)], 1)
    return ids, torch.ones_like(ids)


def step(model, ids, mask, most):
    "Seconds of a forward and backward, log-probabilities, gradients"
    from bgrpo_nb.learn.trie import trie_logps
    model.zero_grad(set_to_none=False)
    start = time.perf_counter()
    logps, entropy = trie_logps(model, ids, mask, C, 1.0, True, most)
    (logps.sum() + 0.01 * entropy.sum()).backward()
    return time.perf_counter() - start, logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def memory(most):
    "GiB that a step needs beside model and gradients, in a process of its own"
    code = (f"import sys; sys.path.insert(0, {sys.path[0]!r}); import bench_head as b; from _record import peak_gib\n"
            f"import torch; model = b.build(); ids, mask = b.rows()\n"
            f"for p in model.parameters(): p.grad = torch.ones_like(p)\n"
            f"before = peak_gib(); b.step(model, ids, mask, {most}); print(peak_gib() - before)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main():
    model, (ids, mask) = build(), rows()
    (_, a, ga), (_, b, gb) = step(model, ids, mask, 2**26), step(model, ids, mask, AT_ONCE)
    differ = float((a - b).abs().max()), float((ga - gb).norm() / gb.norm())
    assert max(differ) < 1e-5, "the two forms differ"
    times = [[step(model, ids, mask, most)[0] for most in (2**26, AT_ONCE)] for _ in range(2)]
    fast, whole = (statistics.median(t) for t in zip(*times))
    own, all_logits = memory(2**26), memory(AT_ONCE)
    row = dict(vocabulary=V, gib=round(own, 2), gib_at_once=round(all_logits, 2), memory=round(own / all_logits, 3),
               seconds=round(fast, 2), seconds_at_once=round(whole, 2), time=round(fast / whole, 2),
               logps_differ=differ[0], gradients_differ=differ[1])
    print(json.dumps(row, indent=1))
    record("head", {"a step over tries": row})


if __name__ == "__main__":
    assert peak_gib()
    main()
