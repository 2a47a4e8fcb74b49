"""Times beam search over a shared prefix, `generate` with cache, the original loop, and the matrix products alone.

6 layers x 512, prompt 250, 40 new tokens, 25 beams, fp32 unless said. Every figure is the median of alternating calls
in one process, so ratios are more reliable than seconds. Where there is a GPU it runs there, and adds bf16, a captured
step, launches per token and the distance to memory bandwidth.

    python benchmarks/bench_generation.py            everything, recorded in benchmarks/results/
    python benchmarks/bench_generation.py --quick    one family and a few points, printed only

On a machine that others use too, GOMP_SPINCOUNT=0 keeps OpenMP's threads from spinning while they wait for one that is
not running."""
import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from _beams import same_beams
from _record import RESULTS, record

from bgrpo_nb.search.generation import beam_search, sample
from bgrpo_nb.policy.model import new_model

P, C, K = 250, 40, 25
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wait():
    if DEVICE == "cuda": torch.cuda.synchronize()


def seconds(*functions, repeats=3, warm=True):
    "Median seconds of each, called in turns, after one call that is not measured"
    times = [[] for _ in functions]
    if warm:
        for f in functions: f()
    for _ in range(repeats):
        for f, t in zip(functions, times):
            wait()
            start = time.perf_counter()
            f()
            wait()
            t.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


def prompts(B=1, length=P):
    seeded = torch.Generator().manual_seed(0)
    return torch.randint(3, 31, (B, length), generator=seeded).to(DEVICE)


def policy(dtype=torch.float32, **kwargs):
    model = new_model("paper", max_position_embeddings=2304, **kwargs).to(DEVICE, dtype).eval()
    model.generation_config.eos_token_id = None
    return model


def ours(model, ids, width=K, new=C, **kwargs):
    how = dict(num_beams=width, max_new_tokens=new, eos_token_id=None, pad_token_id=0) | kwargs
    return lambda: beam_search(model, ids, **how)


def theirs(model, ids, width=K, new=C):
    how = dict(num_beams=width, num_return_sequences=width, length_penalty=0.0, do_sample=False, max_new_tokens=new,
               pad_token_id=0, return_dict_in_generate=True, output_scores=True)
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **how)


def linear_products(model, rows=K, length=P):
    "The matrix products of the linear layers alone: one prefill and C - 1 steps"
    def is_conv(layer): return type(layer).__name__ == "Conv1D"
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) or is_conv(m)]
    widths = [m.weight.shape[0 if is_conv(m) else 1] for m in layers]
    def run():
        with torch.no_grad():
            for n, steps in ((length, 1), (rows, C - 1)):
                inputs = [torch.zeros(n, w, device=DEVICE, dtype=model.dtype) for w in widths]
                for _ in range(steps):
                    for m, x in zip(layers, inputs): m(x)
    return run


@torch.no_grad()
def per_beam_loop(model, ids, steps):
    "The original search, rewritten: a forward per beam and step over its whole text. Seconds of the given steps alone"
    spent, beams = 0.0, [(ids[0].tolist(), 0.0)]
    stand_ins = [(ids[0].tolist(), -1.0 - k) for k in range(K)]
    for step in range(C):
        if step not in steps:                                    # not timed: texts grow by any token, without a forward
            if len(beams) == 1: beams = stand_ins
            beams = [(tokens + [3], score) for tokens, score in beams]
            continue
        start, candidates = time.perf_counter(), []
        for tokens, score in beams:
            logits = model(torch.tensor([tokens], device=DEVICE), use_cache=False).logits[0, -1]
            logp = logits.float().log_softmax(-1)
            best, at = logp.topk(min(K, len(logp)))
            candidates += [(tokens + [v], score + x) for v, x in zip(at.tolist(), best.tolist())]
        beams = sorted(candidates, key=lambda c: -c[1])[:K]
        spent += time.perf_counter() - start
    return spent


def check(model, ids):
    "The beams of `generate`, before anything is timed"
    a, b = ours(model, ids)(), theirs(model, ids)()
    written, scores = b.sequences[:, ids.shape[1]:].view(a.sequences.shape), b.sequences_scores.view(a.scores.shape)
    assert same_beams(a.sequences, a.scores, written, scores), "beams differ"


def rounded(**figures): return {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in figures.items()}


def compare(name, mine, other, floor=None, **kwargs):
    times = seconds(mine, other, *([floor] if floor else []), **kwargs)
    row = rounded(seconds=times[0], generate_seconds=times[1], speedup=times[1] / times[0])
    if floor: row |= rounded(linear_seconds=times[2], over_linear=times[0] / times[2])
    print(f"{name:28} {row}", flush=True)
    return row


def headline(families, repeats):
    out = {}
    for name, model in families.items():
        check(model, prompts())
        mine, other = ours(model, prompts()), theirs(model, prompts())
        out[name] = compare(name, mine, other, linear_products(model), repeats=repeats)
    return out


def compiled(families, repeats):
    "The same search of a compiled model, and `generate` of the plain one; the first search compiles"
    out = {}
    for name, model in families.items():
        quick = copy.deepcopy(model)
        quick.compile(dynamic=True)
        torch.compiler.reset()
        start = time.perf_counter()
        found = ours(quick, prompts())()
        first, plain = time.perf_counter() - start, ours(model, prompts())()
        assert same_beams(found.sequences, found.scores, plain.sequences, plain.scores), "beams differ"
        mine, other = ours(quick, prompts()), theirs(model, prompts())
        out[name] = compare(f"{name}, compiled", mine, other, repeats=repeats) | rounded(first_search_seconds=first)
        one = seconds(ours(quick, prompts(), 1), ours(model, prompts(), 1), repeats=repeats)
        out[name] |= rounded(one_beam_seconds=one[0], one_beam_uncompiled_seconds=one[1])
    return out


def original(model, every):
    "The per-beam loop and our search"
    steps = range(1, C, every)
    mine, = seconds(ours(model, prompts()), repeats=3)
    spent = per_beam_loop(model, prompts(), set(steps))
    each = spent / len(steps)
    whole = each * (C - 1) + each / K                            # the first step has one beam
    row = rounded(seconds=mine, per_beam_seconds=whole, steps_timed=f"{len(steps)} of {C}", speedup=whole / mine)
    print(f"{'original per-beam loop':28} {row}", flush=True)
    return row


def scaling(model, widths, lengths, batches, repeats):
    "By K; by P; by B (there 10 beams and 20 tokens, because `generate` holds B x K whole caches)"
    def row(key, n, *args, new=C, width=K):
        ids = prompts(*args)
        mine, other = ours(model, ids, width, new), theirs(model, ids, width, new)
        return {key: n} | compare(f"{key}={n}", mine, other, repeats=repeats, warm=n < 50)
    return dict(by_width=[row("K", n, 1, P, width=n) for n in widths],
                by_prompt=[row("P", n, 1, n) for n in lengths],
                by_batch=[row("B", n, n, P, width=10, new=20) for n in batches])


def cache_mib(model, tokens):
    "Keys and values of that many tokens"
    c = model.config
    heads, size = getattr(c, "num_key_value_heads", c.num_attention_heads), c.hidden_size // c.num_attention_heads
    return 2 * c.num_hidden_layers * heads * size * model.dtype.itemsize * tokens / 2**20


def high_water():
    "Resets the process's peak memory where Linux lets it, and returns a function that reads it, MiB"
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return lambda: torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if not status.exists(): return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    Path("/proc/self/clear_refs").write_text("5")
    def read():
        peaks = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(peaks[0].split()[1]) / 2**10
    return read


def peak(who, width):
    "Peak memory of one search beyond the model's, MiB, measured in this process (ask in a fresh one)"
    model, ids = policy(), prompts()
    searches = ours if who == "ours" else theirs
    search = searches(model, ids, width, 12)
    searches(model, ids, 1, 2)()                                  # libraries allocate their buffers before we count
    now = high_water()
    before = now()
    search()
    return max(now() - before, 0.0)


def memory(widths):
    "Peaks, each in a process of its own, and the caches' sizes by formula"
    def measured(who, width):
        command = [sys.executable, __file__, "--peak", who, str(width)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    model, rows = policy(), []
    for width in widths:
        rows.append(dict(K=width) | rounded(peak_mib=measured("ours", width),
                                            generate_peak_mib=measured("generate", width),
                                            generate_cache_mib=cache_mib(model, width * (P + 12)),
                                            cache_at_most_mib=cache_mib(model, P + 12 * width)))
        print(rows[-1], flush=True)
    return rows


KINDS = {"matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "linear_pointwise", "reorder_linear"),
         "attention": ("scaled_dot_product",),
         "reading and writing state": ("gather", "scatter", "index", "copy_", "cat")}
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cudaGraphLaunch")


def profile(model):
    "Where a search's time goes, as shares of its wall clock"
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record_operations
    run = ours(model, prompts())
    whole, = seconds(run, repeats=3)
    with record_operations(activities=[ProfilerActivity.CPU]) as p: run()
    shares = dict.fromkeys([*KINDS, "other operations"], 0.0)
    for event in p.key_averages():
        kind = next((k for k, names in KINDS.items() if any(n in event.key for n in names)), "other operations")
        shares[kind] += event.self_cpu_time_total / 1e6 / whole
    return rounded(**shares | {"Python between them": max(1 - sum(shares.values()), 0.0)})


def on_cuda():
    "bf16 and captured steps, kernels per token, and how far a step is from reading weights and keys once"
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record_operations
    big = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    copy, = seconds(lambda: big.clone(), repeats=9)
    bandwidth, out = 2 * big.numel() / copy, {}
    for dtype in (torch.float32, torch.bfloat16):
        model, ids = policy(dtype), prompts()
        held = sum(p.numel() for p in model.parameters()) * dtype.itemsize + cache_mib(model, P + K * (C - 1)) * 2**20
        for static in (False, True, "capture"):
            search = ours(model, ids, static=static)
            row = compare(f"{dtype} static={static}", search, theirs(model, ids), linear_products(model), repeats=5)
            with record_operations(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as p: search()
            launches = sum(e.count for e in p.key_averages() if e.key in LAUNCHES)
            least = held / bandwidth                             # seconds to read weights and keys once
            out[f"{str(dtype).removeprefix('torch.')}, static={static}"] = row | rounded(
                launches_per_step=launches / C, bytes_per_step=held, over_bandwidth=row["seconds"] / C / least)
    from transformers.utils import is_flash_attn_2_available
    if is_flash_attn_2_available():
        model = policy(torch.bfloat16)
        before, = seconds(theirs(model, prompts()), repeats=5)
        model.set_attn_implementation("flash_attention_2")
        after, = seconds(theirs(model, prompts()), repeats=5)
        out["generate"] = rounded(sdpa_seconds=before, flash_attention_2_seconds=after)
    return out | rounded(bandwidth_gb_per_second=bandwidth / 1e9)


PANELS = (("by_width", "K", "beams"), ("by_prompt", "P", "prompt tokens"), ("by_batch", "B", "prompts"))


def plot(results):
    "Time by K, P and B, of a search and of `generate`"
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    style = Path(__file__).parent.parent / "bgrpo_nb/assets/bgrpo.mplstyle"
    with plt.style.context(style):
        fig, axes = plt.subplots(1, 3, figsize=(8, 2.6))
        for ax, (name, key, label) in zip(axes, PANELS):
            rows = results[name]
            ax.plot([r[key] for r in rows], [r["generate_seconds"] for r in rows], "o-", label="generate, with cache")
            ax.plot([r[key] for r in rows], [r["seconds"] for r in rows], "o-", label="shared prefix")
            ax.set(xscale="log", yscale="log", xlabel=label, ylabel="seconds")
        axes[0].legend()
        fig.savefig(RESULTS / "generation.png", dpi=90)
        plt.close(fig)


def samples(model, repeats):
    "16 samples of one prompt, by us and by `generate`"
    how = dict(num_return_sequences=16, max_new_tokens=C, pad_token_id=0)
    def draw(): return sample(model, prompts(), eos_token_id=None, **how)
    def draw_theirs():
        ids = prompts()
        return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, **how)
    return compare("16 samples", draw, draw_theirs, repeats=repeats)


def static_shapes(model):
    "Static shapes against shapes that follow the need"
    needed, fixed = seconds(ours(model, prompts()), ours(model, prompts(), static=True))
    return rounded(seconds=needed, static_seconds=fixed, over=fixed / needed)


def measure(quick):
    "All results"
    model, repeats = policy(), 3 if quick else 9
    families = {"llama": model}
    if not quick: families |= {"gpt2": policy(position="learned"), "llama, 2 key heads": policy(num_key_value_heads=2)}
    results = dict(headline=headline(families, repeats), compiled=compiled(families, repeats),
                   original=original(model, 13 if quick else 6), profile=profile(model))
    print("profile", results["profile"], flush=True)
    results["static"] = static_shapes(model)
    results["samples"] = samples(model, repeats)
    half = policy(torch.bfloat16)
    mine, other = ours(half, prompts()), theirs(half, prompts())
    results["bfloat16"] = compare("bfloat16", mine, other, linear_products(half), repeats=repeats)
    if quick: points = (1, 25), (50,), (1,)
    else: points = (1, 5, 10, 25, 50, 100), (50, 250, 500, 1000, 2000), (1, 4, 8, 16, 32)
    results |= scaling(model, *points, repeats=1)
    if DEVICE == "cuda": results["cuda"] = on_cuda()
    results["conditions"] = dict(device=DEVICE, threads=torch.get_num_threads(),
                                 load_average=round(os.getloadavg()[0], 1),
                                 gomp_spincount=os.environ.get("GOMP_SPINCOUNT"))
    results["memory"] = memory((1, 25) if quick else (1, 10, 25, 50, 100))
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one family and a few points, printed only")
    parser.add_argument("--threads", type=int, help="of torch; by default its own choice")
    parser.add_argument("--peak", nargs=2, metavar=("WHO", "K"),
                        help="print the peak memory of one search: ours or generate")
    parser.add_argument("--plot", action="store_true", help="draw the recorded results again")
    args = parser.parse_args()
    if args.threads: torch.set_num_threads(args.threads)
    if args.peak: return print(peak(args.peak[0], int(args.peak[1])))
    if args.plot: return plot(json.loads((RESULTS / "generation.json").read_text())["results"])
    with torch.no_grad(): results = measure(args.quick)
    if args.quick: return
    record("generation", results)
    plot(results)


if __name__ == "__main__": main()
