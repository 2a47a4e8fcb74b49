"The trie equals full rows, whatever the rows; its memory is bounded; groups survive processes and micro-batches."
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from bgrpo_nb.learn import trl_batching
from bgrpo_nb.learn.trie import build_trie, trie_logps
from bgrpo_nb.learn.trl_batching import group_order, share_groups

common = dict(vocab_size=13, pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.5)
llama_like = common | dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                           intermediate_size=48, max_position_embeddings=64)
no_dropout = dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
torch.manual_seed(0)
MODELS = {"gpt2": GPT2Config(**common, **no_dropout, n_embd=32, n_layer=2, n_head=4, n_positions=64),
          "llama": LlamaConfig(**llama_like), "qwen3": Qwen3Config(**llama_like, head_dim=8)}
MODELS = {name: AutoModelForCausalLM.from_config(config).double().eval() for name, config in MODELS.items()}


def in_full(model, ids, mask, C, temperature):
    logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    logp = (logits[:, -C - 1:-1] / temperature).log_softmax(-1)
    return logp.gather(2, ids[:, -C:, None])[..., 0] * mask[:, -C:], -(logp.exp() * logp).sum(-1) * mask[:, -C:]


def pad(rows):
    P, C = max(len(p) for p, _ in rows), max(len(c) for _, c in rows)
    ids = torch.tensor([[0] * (P - len(p)) + p + c + [0] * (C - len(c)) for p, c in rows])
    mask = torch.tensor([[0] * (P - len(p)) + [1] * (len(p) + len(c)) + [0] * (C - len(c)) for p, c in rows])
    return ids, mask, C


tokens = st.integers(0, 12)
prompt = st.lists(tokens, min_size=1, max_size=7)
completion = st.lists(st.integers(0, 2), min_size=1, max_size=6)  # three words: many beginnings are shared


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(prompts=st.lists(prompt, min_size=1, max_size=3),
       which=st.lists(st.tuples(st.integers(0, 2), completion), min_size=1, max_size=12),
       temperature=st.sampled_from([1.0, 0.7]), most=st.sampled_from([1, 2**26]),
       attention=st.sampled_from(["segments", "dense"]))
def test_any_rows_in_any_order(name, prompts, which, temperature, most, attention):
    "In float64, though a few norms and rotations inside the models are float32; the notebook has float32"
    model = MODELS[name]
    ids, mask, C = pad([(prompts[i % len(prompts)], c) for i, c in which])
    weights = torch.linspace(-1, 1, len(ids) * C).view(len(ids), C)

    def run(f):
        model.zero_grad()
        logps, entropy = f()
        ((logps + 0.3 * entropy) * weights).sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return logps.detach(), entropy.detach(), torch.cat(gradients)

    full = run(lambda: in_full(model, ids, mask, C, temperature))
    trie = run(lambda: trie_logps(model, ids, mask, C, temperature, compute_entropy=True, max_elements=most,
                                  attention=attention))
    assert (trie[0] - full[0]).abs().max() < 1e-6 and (trie[1] - full[1]).abs().max() < 1e-6
    assert (trie[2] - full[2]).norm() <= 1e-6 * full[2].norm() + 1e-6


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(completion, min_size=1, max_size=12))
def test_a_trie_spells_its_rows_and_holds_each_beginning_once(rows):
    C = max(map(len, rows))
    trie = build_trie(np.array([r + [0] * (C - len(r)) for r in rows]), np.array([len(r) for r in rows]))
    assert len(trie.tokens) == len({tuple(r[:t]) for r in rows for t in range(1, len(r) + 1)})
    for row, path in zip(rows, trie.nodes):
        path = path[path >= 0]
        assert trie.tokens[path].tolist() == row and trie.depth[path].tolist() == list(range(len(row)))
        for t, node in enumerate(path):
            assert [k for k in range(node + 1) if node < trie.tout[k]] == path[:t + 1].tolist()


MEMORY = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from bgrpo_nb.learn.trie import trie_logps, _elements, _merge
K, P, C, B = 64, 1000, 40, 4
torch.set_num_threads(1)
model = LlamaForCausalLM(LlamaConfig(vocab_size=31, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=128, max_position_embeddings=2048)).eval()
torch.manual_seed(0)
prompts = torch.randint(2, 31, (B, P)).repeat_interleave(K, 0)
stem = torch.randint(2, 31, (B, 1, C)).expand(B, K, C).clone()
cut = torch.randint(C // 2, C, (B, K, 1))                          # beams agree in their first half, as beams do
completions = torch.where(torch.arange(C) < cut, stem, torch.randint(2, 31, (B, K, C))).view(B * K, C)
ids = torch.cat([prompts, completions], 1)
mask = torch.ones_like(ids)
def peak(): # bytes, of this program alone
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
before = peak()
with torch.no_grad(): trie_logps(model, ids, mask, C, max_elements=int(sys.argv[1]), attention=sys.argv[2])
one = max(_elements([g], 31) for g in _merge(ids.numpy(), mask.numpy().astype(bool), C))
print(one, peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_memory_stays_with_the_largest_group():
    "K = 64, P = 1,000: a chunk holds at most max_elements numbers, or one group; four groups need four times that"
    def peak(most, attention):
        command = [sys.executable, "-c", MEMORY, str(most), attention]
        return map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    (one, chunked), (_, together), (_, in_segments) = peak(1, "dense"), peak(2**40, "dense"), peak(2**40, "segments")
    assert 2e6 < one < 2**26
    # bytes: masks as booleans and floats, attention scores of two heads, activations of one group
    assert chunked < 20 * one + 300e6
    assert together > chunked + 3 * 4 * one  # at least the masks as floats of the three other groups
    assert in_segments < together - 1.5 * 4 * one # which segments do not have


def test_a_group_of_the_whole_batch_is_searched_once_whichever_process_holds_its_rows():
    "Three processes, six rows of one prompt: the first searches, all receive"
    searched, found = [], [(0, list("012345"))]
    def search(prompts):
        searched.append(list(prompts))
        return [list("012345") for _ in prompts]
    out = []
    for index in range(3):
        answers = iter([["A"] * 6, found])
        out += share_groups(["A"] * 2, 6, search, index, gather=lambda x: next(answers))
    assert out == list("012345") and searched == [["A"]]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=8))
def test_groups_are_shuffled_whole(sizes):
    ids = torch.tensor([[i + 1] for i, n in enumerate(sizes) for _ in range(n)])
    order = group_order(ids, torch.ones_like(ids))
    assert sorted(order.tolist()) == list(range(len(ids)))
    shuffled = ids[order, 0].tolist()
    runs = [(a, order.tolist()[k]) for k, a in enumerate(shuffled)]
    for a in set(shuffled):
        found = [k for k, b in enumerate(shuffled) if b == a]
        assert found == list(range(found[0], found[0] + len(found)))             # together
        assert [runs[k][1] for k in found] == sorted(runs[k][1] for k in found)  # in their order


def test_trl_still_has_what_the_trainer_builds_on():
    "Names and parameters of TRL that BGRPOTrainer overrides or calls; a change here means: read 08k_gradients and 09_trainer again"
    import inspect

    from trl import GRPOTrainer
    from trl.trainer.utils import split_tensor_dict
    wanted = dict(
        _get_per_token_logps_and_entropies="model input_ids attention_mask logits_to_keep batch_size compute_entropy "
                                           "compute_aux_loss",
        _prepare_inputs="generation_batch", _generate="prompts", _compute_loss="model inputs",
        _calculate_rewards="inputs prompts completions completion_ids_list",
        _generate_and_score_completions="inputs",
        _tokenize_prompts="prompts",
        evaluate="eval_dataset ignore_keys metric_key_prefix",
        training_step="model inputs", _get_grad_norm="model grad_norm", _maybe_log_save_evaluate="tr_loss grad_norm model",
        _save_rng_state="output_dir", _load_rng_state="checkpoint")
    for name, parameters in wanted.items():
        parameters = parameters.split()
        found = list(inspect.signature(getattr(GRPOTrainer, name)).parameters)[1:]
        assert found[:len(parameters)] == parameters, f"TRL's {name} now takes {found}"
    assert "rollout_func" in inspect.signature(GRPOTrainer.__init__).parameters and callable(split_tensor_dict)
    assert trl_batching.roll_out.__module__ == "bgrpo_nb.learn.trl_batching"


def tiny_families():
    from transformers import Gemma2Config, MixtralConfig, OPTConfig
    opt = dict(hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, init_std=0.5)
    mixtral = llama_like | dict(initializer_range=0.1, num_local_experts=3, num_experts_per_tok=2, sliding_window=None)
    return {"gpt2": GPT2Config(**common, **no_dropout, n_embd=32, n_layer=2, n_head=4, n_positions=64), "llama": LlamaConfig(**llama_like),
            "qwen3": Qwen3Config(**llama_like, head_dim=8), "gemma2": Gemma2Config(**llama_like, head_dim=8, query_pre_attn_scalar=8, sliding_window=64),
            "opt": OPTConfig(**common | opt, dropout=0.0), "mixtral": MixtralConfig(**mixtral)}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16 autocast"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", tiny_families())
def test_checkpointed_gradients_are_those_without_checkpointing(name, lora, bf16, reentrant):
    "Layers are recomputed under the attention that they were computed under: two prompts, one chunk each"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_families()[name]).train()
    if lora:
        from peft import LoraConfig, get_peft_model
        targets = {"gpt2": ["c_attn"]}.get(name, ["q_proj", "v_proj"])
        model = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"))
    ids, mask, C = pad([([2, 3, 4], [5, 6, 7, 1]), ([2, 3, 4], [5, 6, 8, 1]), ([9, 4], [5, 1]), ([9, 4], [6, 6, 1])])
    attention = model.config._attn_implementation

    def gradient():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16): logps, entropy = trie_logps(model, ids, mask, C, compute_entropy=True, max_elements=1)
        (logps + 0.3 * entropy).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plain = gradient()
    if lora: model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    layer = next(m for m in model.modules() if type(m).__name__.endswith(("DecoderLayer", "GPT2Block")))
    layer.register_forward_pre_hook(lambda *_: calls.append("hook"))
    inside = next(m for m in layer.modules() if isinstance(m, torch.nn.LayerNorm) or "Norm" in type(m).__name__)
    inside.register_forward_pre_hook(lambda *_: calls.append("recomputed"))
    found = gradient()
    tolerance = 5e-3 if bf16 and reentrant else 1e-5              # chunks share the weights that autocast rounds, recomputations do not
    assert plain.norm() > 0 and (found - plain).norm() <= tolerance * plain.norm()
    assert calls.count("recomputed") == 4                         # two chunks, forward and backward
    assert model.config._attn_implementation == attention
