"Log-probabilities in pieces: equal to full rows for many families, adapters, precisions and wrappers; memory with the piece."
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from test_trl_batching import in_full, pad

from bgrpo_nb.learn import output_head, trie
from bgrpo_nb.learn.output_head import after_head
from bgrpo_nb.learn.trie import row_logps, trie_logps
from bgrpo_nb.search.allowed_sequences import AllowedSequences

V = 41
SIZES = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=48,
             max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.5)
GPT2 = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.5)
FAMILIES = {"Llama": {}, "Qwen2": {}, "Qwen3": {}, "Gemma": {}, "GPT2": None, "Gemma2": dict(final_logit_softcapping=3.0, query_pre_attn_scalar=8),
            "Cohere": dict(logit_scale=0.0625, use_qk_norm=False), "Granite": dict(logits_scaling=4.0), "Qwen3 tied": dict(tie_word_embeddings=True)}
ROWS = [([2, 3, 4], [5, 6, 7, 1]), ([2, 3, 4], [5, 6, 8, 1]), ([9, 4], [5, 1]), ([9, 4], [6, 6, 1]), ([9, 4], [6, 6, 6, 1])]
PIECES = 3 * 4 * V                                                    # three places at a time


def family(name):
    torch.manual_seed(0)
    more = FAMILIES[name]
    config = getattr(transformers, f"{name.split()[0]}Config")(**(GPT2 if more is None else SIZES | more))
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def gradient_of(model, values):
    model.zero_grad()
    weights = torch.linspace(-1, 1, values[0].numel()).view_as(values[0])
    sum((x * weights).sum() for x in values if x is not None).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture
def pieces(monkeypatch):
    "How many places the head ran for, in each call"
    seen = []
    run = output_head._run_pieces
    def counted(piece, hidden, at_once):
        seen.append((len(hidden), at_once))
        return run(piece, hidden, at_once)
    monkeypatch.setattr(output_head, "_run_pieces", counted)
    return seen


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", FAMILIES)
def test_pieces_are_full_rows(name, temperature, pieces):
    model = family(name)
    ids, mask, C = pad(ROWS)
    full = in_full(model, ids, mask, C, temperature)
    wanted = gradient_of(model, full)
    for f in (trie_logps, row_logps):
        if f is row_logps and name == "GPT2": continue                 # positions from the mask are the trainer's
        found = f(model, ids, mask, C, temperature, compute_entropy=True, max_elements=PIECES)
        assert pieces and pieces[-1][0] > pieces[-1][1] == 3
        for x, y in zip(found, full): assert (x - y).abs().max() < 1e-5
        got = gradient_of(model, found)
        assert wanted.norm() > 0 and (got - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("lora", [False, True, "head"])
def test_adapters_autocast_and_checkpointing(lora, bf16, checkpointing, pieces):
    "Pieces against all logits at once; bf16 rounds a product by the shape of its matrices, so it is compared loosely"
    model = family("Qwen3").train()
    if lora:
        from peft import LoraConfig, get_peft_model
        targets = ["q_proj", "v_proj"] + ["lm_head"] * (lora == "head")
        model = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"))
    if checkpointing is not None:
        if lora: model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    ids, mask, C = pad(ROWS)

    def run(most):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16): found = trie_logps(model, ids, mask, C, 1.0, True, most)
        return *found, gradient_of(model, found)

    whole, found = run(2**26), run(PIECES)
    assert pieces
    for x, y in zip(found, whole): assert (x - y).norm() <= (2e-2 if bf16 else 1e-5) * y.norm()


def test_without_gradients_nothing_is_kept(pieces):
    model = family("Llama")
    ids, mask, C = pad(ROWS)
    with torch.no_grad(): found = trie_logps(model, ids, mask, C, 1.0, True, PIECES)
    wanted = trie_logps(model, ids, mask, C, 1.0, True)
    assert pieces and not found[0].requires_grad and (found[0] - wanted[0]).abs().max() < 1e-5


@pytest.mark.parametrize("f", [trie_logps, row_logps])
def test_under_a_constraint(f, pieces):
    model = family("Llama")
    ids, mask, C = pad(ROWS)
    sets = AllowedSequences.from_ids([c[:-1] for _, c in ROWS] + [[20], [5, 30]], end=1, renormalize=True)
    whole = f(model, ids, mask, C, 0.8, True, constraint=sets)
    assert not pieces
    found = f(model, ids, mask, C, 0.8, True, constraint=sets, max_elements=PIECES)
    assert pieces
    for x, y in zip(found, whole): assert (x - y).abs().max() < 1e-5
    a, b = gradient_of(model, found), gradient_of(model, whole)
    assert (a - b).norm() <= 1e-5 * b.norm()


def test_rows_without_tokens_keep_their_graph():
    "A micro-batch whose completions are all masked contributes a gradient of zero"
    model = family("Llama")
    ids, mask, C = pad(ROWS)
    mask[:, -C:] = 0
    for most in (2**26, 1):
        logps, entropy = trie_logps(model, ids, mask, C, 1.0, True, most)
        assert logps.shape == (5, C) and not logps.any() and not entropy.any()
        (logps.sum() + entropy.sum()).backward()
        assert not sum(p.grad.abs().sum() for p in model.parameters() if p.grad is not None)


def test_a_head_that_is_not_understood_gives_all_logits_with_one_warning(monkeypatch):
    class Flipped(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits.flip(-1)
            return out
    torch.manual_seed(0)
    model = Flipped(transformers.LlamaConfig(**SIZES)).eval()
    assert after_head(model) == "what follows its output head is not known"
    ids, mask, C = pad(ROWS)
    full = in_full(model, ids, mask, C, 1.0)[0]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2): assert (trie_logps(model, ids, mask, C, max_elements=V)[0] - full).abs().max() < 1e-5
    assert [str(w.message) for w in seen if "all its tokens at once" in str(w.message)] == [
        "Flipped computes the logits of all its tokens at once, which takes memory: what follows its output head is not known"]
    trie._WARNED.discard("Flipped")


DDP = """
import sys, copy, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[1])
from test_output_head import PIECES, ROWS, family
from test_trl_batching import pad
from bgrpo_nb.learn.trie import trie_logps
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
def loss(model, part, most):
    ids, mask, C = pad(ROWS[2 * part:2 * part + 2])
    logps, entropy = trie_logps(model, ids, mask, C, 1.0, True, most)
    return (logps * torch.linspace(-1, 1, C)).sum() + 0.3 * entropy.sum()
alone = family("Gemma2")
for part in (0, 1): (loss(alone, part, 2**26) / 2).backward()
for unused in (False, True):
    model = DistributedDataParallel(family("Gemma2"), find_unused_parameters=unused)
    for _ in range(2):
        model.zero_grad()
        loss(model, rank, PIECES).backward()
        for p, q in zip(model.module.parameters(), alone.parameters()): torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4)
print("equal")
dist.destroy_process_group()
"""


def test_two_processes_average_the_gradients_of_pieces(tmp_path):
    "DDP that looks for unused parameters finds the head in the output, and DDP that does not works too"
    from pathlib import Path

    from test_trainer import ONE_THREAD
    tests = Path(__file__).parent
    script = tmp_path / "ddp_pieces.py"
    script.write_text(DDP)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), str(tests)],
                          capture_output=True, text=True, env=ONE_THREAD, timeout=900)
    assert done.returncode == 0 and done.stdout.count("equal") == 2, done.stderr[-3000:]
