"""Attention over a trie: the mask of all pairs against segments, forward and backward, on a CPU.

2 layers x 512 (Llama, 8 heads, 4 of them for keys), fp32, one thread. Tries of beams fork at every third token, as those
of a search do; samples share four tokens and the prompt. Times are CPU seconds, taken in turns in one process; memory is
the peak of a process that does one of the two alone, less what it has before.

    python benchmarks/bench_trie_attention.py [--quick]      # quick: sequences of 500 columns only"""
import json
import statistics
import subprocess
import sys
import time

import torch
from _record import peak_gib, record

V = 1000
CASES = { # prompt, completions, their tokens, what they are; groups
    "25 beams": (250, 25, 40, "beams", 1), "16 samples": (512, 16, 97, "samples", 1),
    "64 beams of a long prompt": (1500, 64, 32, "beams", 1),
    "16 long samples": (1536, 16, 161, "samples", 1)}


def build():
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=512, num_hidden_layers=2, num_attention_heads=8,
                                        num_key_value_heads=4, intermediate_size=2048, max_position_embeddings=4096))


def completions(n, C, kind, draw):
    "(n, C) long"
    if kind == "samples":
        return torch.cat([torch.randint(2, 5, (1, 4), generator=draw).expand(n, 4),
                          torch.randint(2, V, (n, C - 4), generator=draw)], 1)
    rows = torch.zeros(1, 0, dtype=torch.long)
    for t in range(C): # at every third token, parents are drawn; between them, each path continues
        size = n if t % 3 == 0 else len(rows)
        parents = torch.randint(len(rows), (size,), generator=draw) if t % 3 == 0 else torch.arange(size)
        rows = torch.cat([rows[parents], torch.randint(2, V, (size, 1), generator=draw)], 1)
    return rows


def batch(P, n, C, kind, groups):
    draw = torch.Generator().manual_seed(1)
    ids = torch.cat([torch.cat([torch.randint(2, V, (1, P), generator=draw).expand(n, P), completions(n, C, kind, draw)], 1)
                     for _ in range(groups)])
    return ids, torch.ones_like(ids), C


def step(model, rows, form):
    "CPU seconds of a forward and backward, log-probabilities, gradients"
    from bgrpo_nb.learn.trie import trie_logps
    model.zero_grad(set_to_none=False)
    start = time.process_time()
    logps, _ = trie_logps(model, *rows, attention=form)
    logps.sum().backward()
    return time.process_time() - start, logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def memory(name, form):
    "GiB that a step needs beside model and gradients, in a process of its own"
    code = (f"import sys; sys.path.insert(0, {sys.path[0]!r}); import bench_trie_attention as b, torch\n"
            f"torch.set_num_threads(1); model, rows = b.build(), b.batch(*b.CASES[{name!r}])\n"
            f"for p in model.parameters(): p.grad = torch.ones_like(p)\n"
            f"b.step(model, b.batch(8, 2, 4, 'beams', 1), {form!r})\n"
            f"before = b.peak_gib(); b.step(model, rows, {form!r}); print(b.peak_gib() - before)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def columns(rows): # of the longest sequence
    from bgrpo_nb.learn.trie import _merge, _size
    ids, mask, C = rows
    return max(map(_size, _merge(ids.numpy(), mask.numpy().astype(bool), C)))


def compare(name):
    model, rows = build(), batch(*CASES[name])
    (_, a, ga), (_, b, gb) = (step(model, rows, form) for form in ("segments", "dense"))
    differ = float((a - b).abs().max()), float((ga - gb).norm() / gb.norm())
    assert differ[0] < 1e-4 and differ[1] < 1e-5, f"the two forms differ: {differ}"
    times = [[step(model, rows, form)[0] for form in ("segments", "dense")] for _ in range(2)]
    fast, slow = (statistics.median(t) for t in zip(*times))
    own, mask = memory(name, "segments"), memory(name, "dense")
    return dict(columns=columns(rows), cpu_seconds=round(fast, 3), dense_cpu_seconds=round(slow, 3),
                speedup=round(slow / fast, 2), gib=round(own, 3), dense_gib=round(mask, 3), memory=round(own / mask, 2),
                logps_differ=differ[0], gradients_differ=differ[1])


if __name__ == "__main__":
    assert peak_gib()
    torch.set_num_threads(1)
    names = list(CASES)[:1] if "--quick" in sys.argv else list(CASES)
    found = {}
    for name in names:
        found[name] = compare(name)
        print(name, json.dumps(found[name]), flush=True)
        record("trie_attention", found)
