"""What a specialist asks of a GPU, in one JSON: searches, gradients and whole steps, each against its strongest rival.

Random weights, no network. Sizes: 6 x 512, and the shape of Qwen2.5-0.5B. Rivals: `generate`, TRL's trainer with samples
and with beams of `generate`, full rows, padding-free packing, and vLLM's and SGLang's beams where they are installed.
Cases come in the order of their importance; the record is written after each of them, and what does not fit into the
time is listed in it. A case that fails is a line of the record. Without a GPU the same cases run at a trivial size.

    python benchmarks/bench_device.py            six minutes, recorded in benchmarks/results/device.json
    python benchmarks/bench_device.py --quick    90 seconds"""
import argparse
import gc
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

import torch
from _record import record

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BF16, FP32 = torch.bfloat16, torch.float32
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch") # how the names of launches begin


# Measuring

def wait():
    if CUDA: torch.cuda.synchronize()


def timed(f, repeats):
    "Median seconds after a call that is not measured, its result, and peak GiB beyond what was held before both"
    held = torch.cuda.memory_allocated() if CUDA else 0
    found = f()
    wait()
    if CUDA: torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        wait()
        times.append(time.perf_counter() - start)
    peak = (torch.cuda.max_memory_allocated() - held) / 2**30 if CUDA else None
    return statistics.median(times), found, peak


def launches(f):
    "Kernel launches and graph launches of a call; None without a GPU"
    if not CUDA: return None
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as p: f()
    return sum(e.count for e in p.key_averages() if e.key.startswith(LAUNCHES))


def each_further(C, whole, first):
    "Seconds of each of the C - 1 steps after the first; None where the clock cannot tell the whole from its first step"
    return (whole - first) / (C - 1) if whole > first else None


def ratio(a, b): return None if a is None or b is None else a / b


def rounded(row): return {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in row.items()}


def bandwidth():
    "Bytes a second of a copy: what is read and what is written"
    big = torch.empty(2**28 if CUDA else 2**22, dtype=torch.uint8, device=DEVICE)
    seconds, _, _ = timed(big.clone, 5)
    return 2 * big.numel() / seconds


def products(dtype):
    "Operations a second of a large matrix product"
    n = 8192 if CUDA else 128
    x = torch.ones(n, n, device=DEVICE, dtype=dtype)
    seconds, _, _ = timed(lambda: x @ x, 5)
    return 2 * n**3 / seconds


# Sizes

@dataclass
class Sizes:
    "What is measured; without a GPU a trivial size"
    prompt: int = 512
    long_prompt: int = 2048
    completion: int = 64
    long_completion: int = 512
    beams: tuple = (16, 32, 128, 512)
    prompts: tuple = (1, 8, 32)
    group: int = 16                    # completions of a prompt, for gradients
    step: tuple = (20, 25, 40)         # prompts, completions of each, tokens of each
    supervised: tuple = (512, 2048)    # batches
    repeats: int = 2


TRIVIAL = Sizes(12, 16, 4, 6, (2, 3), (1, 2), 3, (2, 3, 6), (8, 16), 1)


def small_model(dtype, trivial):
    from bgrpo_nb.policy.model import new_model
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48) if trivial else {}
    model = new_model("paper", max_position_embeddings=4096, initializer_range=0.1, **shape)
    return model.to(DEVICE, dtype).eval()


def qwen(dtype, trivial):
    from transformers import Qwen2Config, Qwen2ForCausalLM
    large = dict(vocab_size=151936, hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
                 intermediate_size=4864)
    tiny = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                intermediate_size=48)
    config = Qwen2Config(**(tiny if trivial else large), tie_word_embeddings=True, max_position_embeddings=8192,
                         initializer_range=0.05)
    torch.manual_seed(0)
    with torch.device(DEVICE): return Qwen2ForCausalLM(config).to(dtype).eval()


MODELS = {"6x512": small_model, "qwen2.5-0.5b": qwen}


@dataclass
class Bench:
    "What cases share: sizes, and one model at a time"
    sizes: Sizes
    trivial: bool
    held: dict = field(default_factory=dict)

    def model(self, name, dtype):
        if (name, dtype) not in self.held:
            self.held.clear()
            free()
            model = MODELS[name](dtype, self.trivial)
            model.generation_config.eos_token_id = None
            self.held[name, dtype] = model
        return self.held[name, dtype]

    def prompts(self, model, B, P):
        draw = torch.Generator().manual_seed(B + P)
        return torch.randint(3, model.config.vocab_size, (B, P), generator=draw).to(DEVICE)


def free():
    from bgrpo_nb.search.captured import release_graphs
    release_graphs()
    gc.collect()
    if CUDA: torch.cuda.empty_cache()


# Searches

def linear_products(model, B, K, P, C, captured):
    "The matrix products of a search alone: one prefill and C - 1 steps, these one by one or as a graph"
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    def inputs(n): return [torch.zeros(n, m.weight.shape[1], device=DEVICE, dtype=model.dtype) for m in layers]
    prefill, step = inputs(B * P), inputs(B * K)
    inside = [m is not model.get_output_embeddings() for m in layers]    # a prefill needs logits of one place
    def run(xs, all_of_them=True):
        for m, x, body in zip(layers, xs, inside):
            if body or all_of_them: m(x)
    run(step)
    if not captured: return lambda: (run(prefill, False), [run(step) for _ in range(C - 1)])
    graph = torch.cuda.CUDAGraph()
    wait()
    with torch.cuda.graph(graph): run(step)
    return lambda: (run(prefill, False), [graph.replay() for _ in range(C - 1)])


def key_bytes(model, tokens):
    c = model.config
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return 2 * c.num_hidden_layers * heads * size * model.dtype.itemsize * tokens


@torch.no_grad()
def search(bench, name, dtype, K, B, P, C, rate, forms=(None,)):
    "Our beam search, default form and others, against `generate`"
    from bgrpo_nb.search import captured
    from bgrpo_nb.search.generation import beam_search
    model, repeats = bench.model(name, dtype), bench.sizes.repeats
    ids = bench.prompts(model, B, P)
    how = dict(num_beams=K, num_return_sequences=K, length_penalty=0.0, do_sample=False, max_new_tokens=C,
               pad_token_id=0)
    def ours(form, C=C):
        return beam_search(model, ids, num_beams=K, max_new_tokens=C, eos_token_id=None, pad_token_id=0, static=form)
    def theirs(**more): return model.generate(ids, attention_mask=torch.ones_like(ids), **how, **more)
    row = {}
    for form in forms:
        free()
        seconds, found, peak = timed(lambda: ours(form), repeats)
        label = "" if form is None else f"_{form}".lower()
        row |= {f"seconds{label}": seconds, f"peak_gib{label}": peak and peak + captured._shared_bytes() / 2**30}
        if form is None: scores, row["captured"] = found.scores.float(), bool(captured._GRAPHS.get(model))
    first, _, _ = timed(lambda: ours(None, 1), repeats)
    step = row["step_seconds"] = each_further(C, row["seconds"], first)
    for name, as_graph in (("products", False), *([("captured_products", True)] if CUDA else [])):
        whole, part = (timed(linear_products(model, B, K, P, n, as_graph), repeats)[0] for n in (C, 1))
        row |= {f"over_{name}": row["seconds"] / whole, f"step_over_{name}": ratio(step, each_further(C, whole, part))}
    held = sum(p.numel() for p in model.parameters()) * model.dtype.itemsize + key_bytes(model, B * (P + K * C))
    row |= dict(over_bandwidth=ratio(step, held / rate), tokens=K * (P + C) / (P + K * C))
    free()                                       # memory of our graphs is not theirs to carry
    try:
        seconds, _, peak = timed(theirs, 1)
        row |= dict(generate_seconds=seconds, generate_peak_gib=peak, times=seconds / row["seconds"])
    except torch.OutOfMemoryError: row["generate"] = "out of memory"
    try:
        apart = (scores - theirs(**SCORED).sequences_scores.view(B, K).float()).abs().max().item()
        limit = 1e-3 if dtype == FP32 else 0.02 * max(1.0, scores.abs().max().item())
        row |= dict(scores_apart=apart, agrees=apart <= limit)
    except torch.OutOfMemoryError: row["agrees"] = None
    ours(None)
    count = launches(lambda: ours(None))         # last: a profiler slows what comes after it
    return row | dict(launches_per_token=count and count / C)


SCORED = dict(return_dict_in_generate=True, output_scores=True) # keeps (B K, V) numbers of every token
SERVER = {"vllm": """
from vllm import LLM
from vllm.sampling_params import BeamSearchParams
llm = LLM(model=folder, dtype="bfloat16", gpu_memory_utilization=0.5, max_logprobs=2 * K)
how = BeamSearchParams(beam_width=K, max_tokens=C, ignore_eos=True)
def run(): llm.beam_search([dict(prompt_token_ids=row) for row in prompts], how)
""", "sglang": """
import sglang
engine = sglang.Engine(model_path=folder, dtype="bfloat16", mem_fraction_static=0.5, enable_beam_search=True)
how = dict(max_new_tokens=C, n=K, ignore_eos=True)
def run(): engine.generate(input_ids=prompts, sampling_params=how)
"""}


def words_as_tokens(V):
    "A tokenizer of V words, which other programs want to have"
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(V)}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t1", pad_token="t0", unk_token="t0")


def server(bench, package, name, K, B, P, C):
    "Another program's beams, in a process of its own"
    model = bench.model(name, BF16)
    prompts = bench.prompts(model, B, P).tolist()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        words_as_tokens(model.config.vocab_size).save_pretrained(folder)
        code = (f"import json, time\nfolder, K, C, prompts = {folder!r}, {K}, {C}, {prompts!r}\n{SERVER[package]}\n"
                "run()\nstart = time.perf_counter()\nrun()\nprint('SECONDS', time.perf_counter() - start)\n")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    said = [line for line in done.stdout.splitlines() if line.startswith("SECONDS")]
    if not said: return dict(failed=(done.stderr.strip().splitlines() or ["nothing was said"])[-1][:300])
    return dict(seconds=float(said[-1].split()[1]))


# Log-probabilities with gradients

def one_varlen_attention(lengths):
    "An attention of Transformers that sees packed rows as they are; None where PyTorch has none for this device"
    try: from torch.nn.attention.varlen import varlen_attn
    except ImportError: return None
    edges = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    def attend(module, query, key, value, mask, scaling=None, **kwargs):
        repeat = query.shape[1] // key.shape[1]
        q, k, v = (x[0].transpose(0, 1) for x in (query, key.repeat_interleave(repeat, 1),
                                                  value.repeat_interleave(repeat, 1)))
        out = varlen_attn(q, k, v, edges, edges, max(lengths), max(lengths), scale=scaling, window_size=(-1, 0))
        return out[None], None
    return attend


def packed_logps(model, ids, C, varlen):
    "All rows in one, positions begin anew with each; logits of the completions alone"
    from transformers import AttentionInterface
    N, T = ids.shape
    positions = torch.arange(T, device=DEVICE).repeat(N)[None]
    places = (torch.arange(T - C - 1, T - 1, device=DEVICE) + T * torch.arange(N, device=DEVICE)[:, None]).flatten()
    before = model.config._attn_implementation
    attend = one_varlen_attention([T] * N) if varlen else None
    if attend:
        AttentionInterface.register("packed_rows", attend)
        model.set_attn_implementation("packed_rows")
    try:
        out = model(input_ids=ids.reshape(1, -1), position_ids=positions, logits_to_keep=places, use_cache=False)
    finally: model.set_attn_implementation(before)
    return chosen(out.logits[0], ids[:, -C:].reshape(-1)).view(N, C)


def chosen(logits, tokens):
    "Log-probabilities of tokens, without a copy of all log-probabilities"
    picked = logits.gather(-1, tokens[..., None])[..., 0].float()
    return picked - logits.float().logsumexp(-1)


def row_logps(model, ids, C):
    logits = model(input_ids=ids, logits_to_keep=C + 1, use_cache=False).logits[:, :-1]
    return chosen(logits, ids[:, -C:])


def distinct_tokens(ids, C, group):
    "Tokens of the tries: each prompt once, each distinct beginning of a completion once"
    rows = ids.tolist()
    P = len(rows[0]) - C
    begun = {(i // group, tuple(row[P:n])) for i, row in enumerate(rows) for n in range(P + 1, P + C + 1)}
    return len(rows) // group * P + len(begun)


@torch.no_grad()
def beams_of(model, ids, K, C):
    from bgrpo_nb.search.generation import beam_search
    found = beam_search(model, ids, num_beams=K, max_new_tokens=C, eos_token_id=None, pad_token_id=0)
    return torch.cat([ids.repeat_interleave(K, 0), found.sequences.reshape(-1, C)], 1)


def gradients(bench, name, dtype, groups, P, C, attentions=()):
    "Log-probabilities of beams with gradients: over tries, in full rows (and with one backward pass), and packed"
    from bgrpo_nb.learn import trie
    from bgrpo_nb.search.beam_tree import without_attention_plans
    model, K, repeats = bench.model(name, dtype), bench.sizes.group, bench.sizes.repeats
    ids = beams_of(model, bench.prompts(model, groups, P), K, C)
    rows_at_once = 8
    model.train()
    varlen = CUDA and dtype != FP32
    chosen_forms, choose = [], trie.form_for
    def noted(*args):
        chosen_forms.append(choose(*args))
        return chosen_forms[-1]
    def over_tries(attention="auto"):
        with without_attention_plans(), mock.patch.object(trie, "form_for", noted):
            return trie.trie_logps(model, ids, torch.ones_like(ids), C, attention=attention)[0]
    def together(): return torch.cat([row_logps(model, part, C) for part in ids.split(rows_at_once)])
    forms = dict(trie=[over_tries], **{f"trie_{name}": [partial(over_tries, name)] for name in attentions},
                 rows=[partial(row_logps, model, part, C) for part in ids.split(rows_at_once)], rows_together=[together],
                 packed=[partial(packed_logps, model, part, C, varlen) for part in ids.split(K)])
    row, logps, slopes = {}, {}, {}
    def run(parts):
        model.zero_grad(set_to_none=True)
        found = []
        for part in parts:
            x = part()
            x.sum().backward()
            found.append(x.detach())
        return torch.cat(found)
    for form, parts in forms.items():
        model.zero_grad(set_to_none=True)
        try:
            seconds, logps[form], peak = timed(partial(run, parts), repeats)
            row |= {f"{form}_seconds": seconds, f"{form}_peak_gib": peak}
            slopes[form] = torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None])
        except torch.OutOfMemoryError: row[form] = "out of memory"
        except ValueError as e: row[form] = str(e)[:300]
        free()
    model.zero_grad(set_to_none=True)
    model.eval()
    row["packed_by"] = "torch.nn.attention.varlen" if varlen else "a block mask"
    row |= dict(tokens=ids.numel() / distinct_tokens(ids, C, K), attention=chosen_forms[0])
    for rival in ("rows", "rows_together", "packed"):
        if f"{rival}_seconds" in row: row[f"times_{rival}"] = row[f"{rival}_seconds"] / row["trie_seconds"]
        if row.get(f"{rival}_peak_gib"): row[f"memory_{rival}"] = row["trie_peak_gib"] / row[f"{rival}_peak_gib"]
    limit = 1e-4 if dtype == FP32 else 0.1
    apart = max((logps["trie"] - logps[form]).abs().max().item() for form in logps)
    steep = max(((slopes["trie"] - s).norm() / s.norm()).item() for s in slopes.values())
    return row | dict(logps_apart=apart, gradients_apart=steep, agrees=apart < limit and steep < limit)


# Whole steps

def step(bench, dtype, rivals):
    "An optimizer step: BGRPO, our samples, TRL with samples, TRL with beams of `generate`"
    row = {}
    for kind in ("bgrpo", *rivals):
        try: row |= {f"{kind}_{name}": value for name, value in one_trainer(bench, dtype, kind).items()}
        except torch.OutOfMemoryError: row[kind] = "out of memory"
        free()
        if kind != "bgrpo" and f"{kind}_seconds" in row:
            row[f"times_{kind}"] = row[f"{kind}_seconds"] / row["bgrpo_seconds"]
    same = [row[f"{kind}_grad_norm"] for kind in ("bgrpo", "trl_beams") if f"{kind}_grad_norm" in row]
    if len(same) == 2: row["agrees"] = abs(same[0] / same[1] - 1) < (1e-3 if dtype == FP32 else 0.1)
    return row


def one_trainer(bench, dtype, kind):
    "Seconds of the last of three steps, gradient norm of the first, peak memory, tokens of the tries"
    from datasets import Dataset
    from transformers import TrainerCallback

    from bgrpo_nb.algebra.problems import generate_problems
    from bgrpo_nb.learn.config import BGRPOConfig
    from bgrpo_nb.learn.trainer import BGRPOTrainer
    from bgrpo_nb.policy.model import load_tokenizer
    from bgrpo_nb.recipes.callbacks import show_progress
    bench.held.clear()
    free()
    B, K, C = bench.sizes.step
    model, marks, seen = small_model(FP32, bench.trivial), [], []
    model.generation_config.eos_token_id = None

    class Marks(TrainerCallback):
        def on_step_begin(self, *args, **kwargs): mark()
        def on_step_end(self, *args, **kwargs): mark()

    def mark():
        wait()
        marks.append(time.perf_counter())

    def reward(prompts, completion_ids, **kwargs):
        seen.append(list(zip(prompts, completion_ids)))
        return [len(set(ids)) / C + ids[0] / 100 for ids in completion_ids]
    degree = 2 if bench.trivial else 4
    dataset = Dataset.from_dict({"prompt": [p.prompt for p in generate_problems(B, degree, degree, seed=8)]})
    with tempfile.TemporaryDirectory() as folder:
        how = dict(output_dir=folder, num_generations=K, per_device_train_batch_size=K, max_steps=1 if bench.trivial else 3,
                   gradient_accumulation_steps=B, max_completion_length=C, gradient_checkpointing=False, use_cpu=not CUDA,
                   bf16=dtype == BF16, disable_tqdm=True, save_strategy="no", logging_steps=1, report_to="none",
                   shuffle_dataset=False)
        own = dict(rollout="sample") if kind == "samples" else {}
        at_once = dict(trl_beams=1, trl_beams_together=B).get(kind)
        make = BGRPOTrainer if kind in ("bgrpo", "samples") else stock_trainer(at_once, K, C)
        trainer = make(model, reward, BGRPOConfig(**how, **own), dataset, processing_class=load_tokenizer("single"),
                       callbacks=[Marks()])
        show_progress(trainer)
        if CUDA: torch.cuda.reset_peak_memory_stats()
        trainer.train()
    first = next(log for log in trainer.state.log_history if "grad_norm" in log)
    rows, groups = [(p, tuple(ids)) for p, ids in sum(seen, [])], len(set(p for p, _ in sum(seen, [])))
    whole = sum(len(p.split()) + len(ids) for p, ids in rows)
    begun = {(p, ids[:n]) for p, ids in rows for n in range(1, len(ids) + 1)}
    tries = len(begun) + sum(len(p.split()) for p in {p for p, _ in rows})
    return dict(seconds=marks[-1] - marks[-2], grad_norm=float(first["grad_norm"]), tokens=whole / tries, groups=groups,
                peak_gib=torch.cuda.max_memory_allocated() / 2**30 if CUDA else None)


def stock_trainer(at_once, K, C):
    "TRL's own trainer; with `at_once` its groups are the beams of `generate`, for so many prompts at a time"
    from torch.nn.utils.rnn import pad_sequence
    from trl import GRPOTrainer

    def rollout(prompts, trainer):
        from trl.models import unwrap_model_for_generation
        prompt_ids = [trainer.processing_class(p)["input_ids"] for p in prompts]
        completions = []
        end = trainer.processing_class.eos_token_id
        with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as plain, torch.no_grad():
            for i in range(0, len(prompts), K * at_once):
                rows = [torch.tensor(ids) for ids in prompt_ids[i:i + K * at_once:K]]
                ids = pad_sequence(rows, True, 0, "left").to(DEVICE)
                on = pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left").to(DEVICE)
                plain.eval()
                out = plain.generate(ids, attention_mask=on, num_beams=K, num_return_sequences=K, length_penalty=0.0,
                                     do_sample=False, max_new_tokens=C, pad_token_id=0, eos_token_id=end)
                plain.train()
                rows = out[:, ids.shape[1]:].tolist()
                completions += [row[:row.index(end) + 1] if end in row else row for row in rows]
        return dict(prompt_ids=prompt_ids, completion_ids=completions, logprobs=None)
    return partial(GRPOTrainer, rollout_func=rollout) if at_once else GRPOTrainer


def supervised(bench, batch):
    "A step of supervised training of `small`, and problems a second with samples made beside it"
    from bgrpo_nb.recipes import samples, sft
    bench.held.clear()
    free()
    steps, marks, log = 4 if bench.trivial else 480, [], sft._Trainer.log

    def marked(self, logs, *args, **kwargs):     # the loss was read just before, so the device is done
        if "loss" in logs: marks.append((self.state.global_step, time.perf_counter()))
        return log(self, logs, *args, **kwargs)
    with tempfile.TemporaryDirectory() as folder:
        config = sft.SupervisedConfig(f"{folder}/run", preset="tiny" if bench.trivial else "small", vocabulary="compact",
                                  degrees=["2_2", "3_2", "3_3"], per_device_train_batch_size=batch, max_steps=steps,
                                  logging_steps=steps // 4, eval_strategy="no", save_strategy="no", held_out=8,
                                  warmup_steps=2, disable_tqdm=True, bf16=CUDA)
        if config.dataloader_num_workers: config.dataloader_prefetch_factor = 1
        # Short blocks, so that what was made ahead is used up long before the last step, and production has to keep pace
        with mock.patch.object(samples, "WINDOW", 8), mock.patch.object(sft._Trainer, "log", marked):
            sft.train_policy(config)
        rows = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl")]
    logs = [row for row in rows if "data/wait_share" in row]
    (first, start), (last, end) = marks[len(marks) // 2 - 1], marks[-1]
    seconds = (end - start) / (last - first)
    return dict(seconds=seconds, problems_per_second=batch / seconds, bf16=config.bf16,
                workers=config.dataloader_num_workers, wait_share=logs[-1]["data/wait_share"])


def plans():
    "First and second call of masked attention, forward and backward, at eight shapes: with cuDNN's and without"
    from bgrpo_nb.search.beam_tree import without_attention_plans
    row = {}
    kernels = ("cudnn", nullcontext, range(401, 409)), ("others", without_attention_plans, range(409, 417))
    for name, around, lengths in kernels:
        times = {"first": [], "second": []}
        for L, of_call in itertools.product(lengths, times.values()):
            x = [torch.randn(8, 8, L, 64, device=DEVICE, dtype=BF16, requires_grad=True) for _ in range(3)]
            mask = torch.zeros(8, 1, L, L, device=DEVICE, dtype=BF16)
            wait()
            start = time.perf_counter()
            with around(): torch.nn.functional.scaled_dot_product_attention(*x, attn_mask=mask).sum().backward()
            wait()
            of_call.append(time.perf_counter() - start)
        row |= {f"{name}_{call}_seconds": statistics.median(seconds) for call, seconds in times.items()}
    return row


# Cases and goals

@dataclass
class Case:
    name: str
    seconds: float                     # expected on an H200, from the first measurements
    run: object


def cases(sizes, rate, quick=False):
    "All cases, the most important first; if quick in their default form, against the first rival alone"
    P, C, names = sizes.prompt, sizes.completion, list(MODELS)
    K0, few, forms = sizes.beams[0], sizes.prompts[:2], (None, True, "capture") if CUDA else (None, True)
    def searching(name, dtype, K, B, P, C, forms=(None,)):
        size = 1 if name == names[0] else 4
        kind = str(dtype).removeprefix("torch.")
        title = f"search {name} {kind} K={K} B={B} P={P} C={C}"
        expected = size * C / 64 * (1 + B * K / 512) * 1.5 * (len(forms) + 1) / 2
        return Case(title, expected, lambda b: search(b, name, dtype, K, B, P, C, rate, forms))
    if quick: forms = (None,)
    def slopes(groups, P, C, attentions=(), name=names[1]):
        expected = 4 + 3 * groups + 25 * len(attentions)
        return Case(f"gradients {name} bfloat16 groups={groups} P={P} C={C}", expected,
                    lambda b: gradients(b, name, BF16 if CUDA else FP32, groups, P, C, attentions))
    kinds = ("trl_samples",) if quick else ("trl_samples", "trl_beams", "trl_beams_together", "samples")
    half = BF16 if CUDA else FP32
    yield from (searching(name, half, K0, B, P, C, forms) for name in names for B in few)
    yield from (slopes(groups, P, 2 * C) for groups in (1, 4))
    yield Case("step 6x512, float32", 15 if quick else 60, lambda b: step(b, FP32, kinds))
    if CUDA: yield Case("step 6x512, bfloat16", 15 if quick else 60, lambda b: step(b, BF16, kinds))
    yield from (Case(f"supervised batch={n}", s, partial(lambda n, b: supervised(b, n), n))
                for n, s in zip(sizes.supervised, (30, 50)))
    if CUDA: yield Case("attention plans", 15, lambda b: plans())
    yield from (Case(f"{package} {names[1]} K={K0}", 90, partial(server_case, package, names[1], K0, P, C))
                for package in SERVER if importlib.util.find_spec(package) or not CUDA)
    rest = itertools.product(names, sizes.beams, sizes.prompts)
    yield from (searching(name, half, K, B, P, C) for name, K, B in rest if (K, B) not in {(K0, B) for B in few})
    yield slopes(1, sizes.long_prompt, C)
    yield from (searching(name, half, K0, B, sizes.long_prompt, C) for name in names for B in few)
    yield slopes(1, P, sizes.long_completion, ("flex", "segments", "dense") if CUDA else ("segments", "dense"))
    yield from (searching(name, half, K0, 1, P, sizes.long_completion) for name in names)
    if CUDA: yield from (searching(name, FP32, K0, 1, P, C) for name in names)


def server_case(package, name, K, P, C, bench): return server(bench, package, name, K, 1, P, C)


def goals(done, sizes):
    "Each goal with what was measured: (what, at least or at most, value or None)"
    P, C, K = sizes.prompt, sizes.completion, sizes.beams[0]
    half = "bfloat16" if CUDA else "float32"
    def of(case, name): return done.get(case, {}).get(name)
    for size, B in itertools.product(MODELS, sizes.prompts[:2]):
        case = f"search {size} {half} K={K} B={B} P={P} C={C}"
        yield f"search {size}, B={B}: times generate", ">=", 6, of(case, "times")
        yield f"search {size}, B={B}: a step over its matrix products", "<=", 1.3, of(case, "step_over_products")
        captured = of(case, "step_over_captured_products")
        yield f"search {size}, B={B}: a step over these as a graph", "<=", 1.3, captured
    for kind in ("float32", "bfloat16"):
        case = f"step 6x512, {kind}"
        yield f"{case}: times TRL with beams of generate, one prompt a time", ">=", 20, of(case, "times_trl_beams")
        yield f"{case}: times TRL with beams of generate, all together", ">=", 20, of(case, "times_trl_beams_together")
        yield f"{case}: times TRL with samples", ">=", 3, of(case, "times_trl_samples")
    for groups, least in ((1, 3), (4, 6)):
        case = f"gradients qwen2.5-0.5b bfloat16 groups={groups} P={P} C={2 * C}"
        yield f"gradients, {groups} groups: times full rows", ">=", least, of(case, "times_rows")
        yield f"gradients, {groups} groups: memory of full rows", "<=", 0.1, of(case, "memory_rows_together")
    first, last = sizes.supervised
    yield f"supervised, batch {first}: seconds a step", "<=", 0.092 / 3, of(f"supervised batch={first}", "seconds")
    yield f"supervised, batch {last}: problems a second", ">=", 30_000, of(f"supervised batch={last}",
                                                                         "problems_per_second")


def judged(done, sizes):
    rows = []
    for what, sense, limit, value in goals(done, sizes):
        if value is None: verdict = "not measured"
        elif sizes is TRIVIAL: verdict = "trivial size"
        else: verdict = "met" if (value >= limit if sense == ">=" else value <= limit) else "not met"
        rows.append(rounded(dict(goal=what, wanted=f"{sense} {limit:.3g}", measured=value, verdict=verdict)))
    return rows


def summary(results, sizes):
    "Lines for a terminal"
    for row in judged(results["cases"], sizes):
        yield f"{row['verdict']:12} {row['goal']}: {row['measured']} (wanted {row['wanted']})"
    wrong = [name for name, row in results["cases"].items() if row.get("agrees") is False]
    yield f"cases: {len(results['cases'])}, of which disagree with their rival: {wrong or 'none'}"
    yield f"left out: {len(results['left_out'])}"


def attempt(case, bench):
    "A row of the record, whatever happens"
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            row = rounded(case.run(bench))
        said = dict.fromkeys(str(w.message)[:200] for w in caught if w.category is UserWarning)
        return row | (dict(warned=list(said)[:5]) if said else {})
    except torch.OutOfMemoryError: found = dict(failed="out of memory")
    except ImportError as e: found = dict(left_out=f"a package is missing: {e}")
    except Exception as e: found = dict(failed=f"{type(e).__name__}: {str(e).splitlines()[0][:300] if str(e) else ''}")
    bench.held.clear()
    free()
    return found


def measure(budget, trivial, write, only="", quick=False):
    "All cases that fit into `budget` seconds; `write(results)` after each"
    started, sizes = time.perf_counter(), TRIVIAL if trivial else Sizes()
    bench, slower = Bench(sizes, trivial), 1.0
    rate = bandwidth()
    results = dict(device=torch.cuda.get_device_name() if CUDA else "cpu", trivial_size=trivial, budget_seconds=budget,
                   bytes_per_second=rate, operations_per_second={"bfloat16": products(BF16), "float32": products(FP32)},
                   cases={}, left_out=[])
    for case in cases(sizes, rate, quick):
        if only not in case.name: continue
        left = budget - (time.perf_counter() - started)
        if left < (0 if trivial else case.seconds * slower):
            results["left_out"].append(case.name)
            continue
        start = time.perf_counter()
        row = results["cases"][case.name] = attempt(case, bench)
        spent = row["case_seconds"] = round(time.perf_counter() - start, 1)
        if not trivial: slower = min(2.0, max(1.0, (slower + spent / case.seconds) / 2))
        print(case.name, row, flush=True)
        results["goals"] = judged(results["cases"], sizes)
        write(results)
    return results, sizes


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--quick", action="store_true", help="90 seconds instead of 360")
    p.add_argument("--seconds", type=float, help="another time")
    p.add_argument("--only", default="", help="cases whose names hold this text")
    p.add_argument("--full", action="store_true", help="without a GPU, too, at the sizes of a GPU")
    p.add_argument("--out", help="another folder for the record")
    a = p.parse_args(argv)
    budget = a.seconds or (90 if a.quick else 360)
    name = "device" if CUDA else "device_cpu"
    results, sizes = measure(budget, not (CUDA or a.full), partial(record, name, folder=a.out, say=False), a.only,
                             a.quick)
    print(f"\n{results['device']}{', at a trivial size: no figure of it means anything' if results['trivial_size'] else ''}")
    print("\n".join(summary(results, sizes)))
    record(name, results, folder=a.out)
    return results


if __name__ == "__main__": main()
