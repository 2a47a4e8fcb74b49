"""Times searches under a constraint against the same searches without, and against a processor that loops over beams.

A policy of the size that recommends by semantic IDs (4 layers x 128, 768 codes and a few words, 32 tokens of history),
completions of three tokens. All figures are medians of alternating calls in one process, and ratios within one run.

    python benchmarks/bench_constraints.py            everything, recorded in benchmarks/results/constraints.json
    python benchmarks/bench_constraints.py --quick    the ratios of the cost alone, printed only

The real catalogue is read from $BGRPO_SHARED/data/recommendation where there is one."""
import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _beams import same_beams
from _record import peak_gib, record
from transformers import LlamaConfig, LlamaForCausalLM, PrefixConstrainedLogitsProcessor

from bgrpo_nb.search.allowed_sequences import AllowedSequences
from bgrpo_nb.search.generation import beam_search, sample

CODES, OTHER, P = 256, 4, 32
V = 3 * CODES + OTHER


def alternating(*functions, repeats, warm=True):
    "Median seconds of each, called in turns, after one call that is not measured"
    for f in functions if warm else (): f()
    times = [[] for _ in functions]
    for _ in range(repeats):
        for f, t in zip(functions, times):
            start = time.perf_counter()
            f()
            t.append(time.perf_counter() - start)
    return [float(np.median(t)) for t in times]


def rounded(**figures): return {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in figures.items()}


def show(name, row):
    print(f"{name:34} {row}", flush=True)
    return row


def policy(layers=4, width=128):
    torch.manual_seed(0)
    shape = dict(vocab_size=V, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
                 intermediate_size=4 * width, max_position_embeddings=128, pad_token_id=0, eos_token_id=None,
                 bos_token_id=None)
    model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    model.generation_config.eos_token_id = None
    return model


def histories(B): return torch.randint(OTHER, V, (B, P), generator=torch.Generator().manual_seed(0))


def random_items(n):
    "n items of three codes, each code in a range of its own"
    codes = np.random.default_rng(0).integers(0, CODES, (n, 3))
    return OTHER + codes + CODES * np.arange(3)


def catalogue():
    "The real catalogue, or as many random items, and which of the two"
    path = Path(os.environ.get("BGRPO_SHARED", "../shared")) / "data/recommendation/catalogue.tsv"
    if not path.is_file(): return random_items(3686), "random"
    codes = [[int(code.split("_")[1]) for code in line.split("\t")[1].split()] for line in path.read_text().splitlines()]
    return OTHER + np.array(codes) + CODES * np.arange(3), "real"


def looping(items):
    "What `generate(prefix_allowed_tokens_fn=...)` takes: a dictionary asked for each beam"
    follow = {}
    for row in items.tolist():
        for i, token in enumerate(row): follow.setdefault(tuple(row[:i]), set()).add(token)
    follow = {beginning: sorted(tokens) for beginning, tokens in follow.items()}
    return lambda b, ids: follow.get(tuple(ids[P:].tolist()), [0])


def ours(model, ids, K, constraint=None, processor=None):
    return lambda: beam_search(model, ids, num_beams=K, max_new_tokens=3, eos_token_id=None, pad_token_id=0,
                               constraint=constraint, logits_processor=processor)


def theirs(model, ids, K, **kwargs):
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=K, num_return_sequences=K,
                                  max_new_tokens=3, do_sample=False, length_penalty=0.0, pad_token_id=0,
                                  return_dict_in_generate=True, output_scores=True, **kwargs)


def same(found, expected):
    "Beams of `generate`, before anything is timed"
    written = expected.sequences[:, P:].view(found.sequences.shape)
    return same_beams(found.sequences, found.scores, written, expected.sequences_scores.view(found.scores.shape))


def cost(model, items, repeats, B=1, K=16):
    "Seconds of a search without, under the set, shared or for each prompt, and by the loop over beams"
    ids, tree = histories(B), AllowedSequences.from_ids(items)
    own = tree.restricted(torch.rand(B, tree.nodes, generator=torch.Generator().manual_seed(0)) < 0.99)
    tree_shared = AllowedSequences.from_ids(items, renormalize=True)
    loop = looping(items)
    assert same(ours(model, ids, K, tree)(), theirs(model, ids, K, prefix_allowed_tokens_fn=loop)()), "beams differ"
    names = "free", "constrained", "renormalised", "of_each_prompt", "loop"
    searches = [ours(model, ids, K, c) for c in (None, tree, tree_shared, own)]
    searches.append(ours(model, ids, K, processor=PrefixConstrainedLogitsProcessor(loop, K)))
    times = alternating(*searches, repeats=repeats)
    bound, by_loop, by_generate = alternating(searches[1], theirs(model, ids, K, prefix_allowed_tokens_fn=loop),
                                              theirs(model, ids, K), repeats=max(repeats // 10, 3))
    row = dict(zip((f"{name}_ms" for name in names), (1000 * t for t in times)))
    row |= {f"{name}_over_free": t / times[0] for name, t in zip(names[1:], times[1:])}
    row |= dict(loop_over_constrained=times[4] / times[1], generate_over_constrained=by_generate / bound,
                generate_loop_over_constrained=by_loop / bound)
    return rounded(items=len(items), B=B, K=K, V=V, **row)


def samples(model, items, repeats, K=16):
    how, tree = dict(max_new_tokens=3, eos_token_id=None, pad_token_id=0), AllowedSequences.from_ids(items)
    free, bound = alternating(*(lambda c=c: sample(model, histories(1), num_return_sequences=K, constraint=c, **how)
                                for c in (None, tree)), repeats=repeats)
    return rounded(free_ms=1000 * free, constrained_ms=1000 * bound, over_free=bound / free)


def build(n, length=4):
    "Seconds and peak memory of building, saving and loading a set; ask in a fresh process"
    array = np.random.default_rng(0).integers(0, 2048, (n, length), dtype=np.int32)
    before, start = peak_gib(), time.perf_counter()
    tree = AllowedSequences.from_ids(array)
    built, peak = time.perf_counter() - start, peak_gib()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        path = tree.save(Path(folder) / "set.safetensors")
        saved, size = time.perf_counter() - start, path.stat().st_size / 2**30
        start = time.perf_counter()
        AllowedSequences.load(path)
        loaded = time.perf_counter() - start
    print(rounded(sequences=n, length=length, nodes=tree.nodes, seconds=built, peak_gib=peak, before_gib=before,
                  save_seconds=saved, load_seconds=loaded, file_gib=size, load_average=os.getloadavg()[0]))


def wide(who, K, n):
    "Seconds and peak memory of one search by K beams over n random items, or the catalogue (0); ask in a fresh process"
    model, items = policy(), random_items(n) if n else catalogue()[0]
    tree, ids = AllowedSequences.from_ids(items), histories(1)
    def search(width):
        if who == "ours": return ours(model, ids, width, tree)
        return theirs(model, ids, width, logits_processor=[tree.after(P)])
    with torch.no_grad():
        search(2)()
        before, run, results = peak_gib(), search(K), []
        seconds, = alternating(lambda: results.append(run()), repeats=1 if K > 1000 else 5, warm=K <= 1000)
    scores = (results[-1].scores if who == "ours" else results[-1].sequences_scores).flatten()
    print(rounded(seconds=seconds, more_gib=peak_gib() - before, beams=int((scores > -1e8).sum())))


def asked(*arguments):
    "The figures that this program prints in a process of its own, or None where it did not finish"
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True)
    return eval(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def widths(values, n):
    rows = []
    for K in values:
        mine, other = asked("--wide", "ours", K, n), asked("--wide", "generate", K, n)
        rows.append(show(f"K={K}, {n or 'catalogue'}", dict(K=K, ours=mine, generate=other,
                                        speedup=other and float(f"{other['seconds'] / mine['seconds']:.3g}"))))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the ratios of the cost alone, printed only")
    parser.add_argument("--build", type=int, metavar="N", help="print time and memory of a set of N sequences")
    parser.add_argument("--wide", nargs=3, metavar=("WHO", "K", "N"), help="print one wide search: ours or generate")
    args = parser.parse_args()
    if args.build: return build(args.build)
    if args.wide: return wide(args.wide[0], *map(int, args.wide[1:]))
    model, (items, kind), repeats = policy(), catalogue(), 60 if args.quick else 200
    with torch.no_grad():
        results = dict(catalogue=kind, cost=[show(f"{len(x):,} items, {B} prompt(s)", cost(model, x, repeats if B == 1 else repeats // 4, B))
                                             for x in (items, random_items(1_000_000)) for B in (1, 16)])
        results["samples"] = show("16 samples", samples(model, items, repeats))
    if args.quick: return
    results["widths"] = widths((16, 64, 512, 2000, 5000), 0)
    results["widths_of_a_million"] = widths((512, 5000), 1_000_000)
    results["build"] = [show("build", asked("--build", n)) for n in (1_000_000, 10_000_000)]
    results["conditions"] = dict(threads=torch.get_num_threads(), load_average=round(os.getloadavg()[0], 1))
    record("constraints", results)


if __name__ == "__main__": main()
