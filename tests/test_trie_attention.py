"Each form of attention over a trie gives the log-probabilities and gradients of full rows; which form is used, and when."
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generation import under_autocast
from test_output_head import GPT2, SIZES, V, family, gradient_of
from test_trl_batching import in_full, pad
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from bgrpo_nb.learn import trie, trie_attention
from bgrpo_nb.learn.config import BGRPOConfig
from bgrpo_nb.learn.trie import row_logps, token_ratio, trie_logps
from bgrpo_nb.learn.trie_attention import Facts, Flex, Runs, Segments, choose_form, form_for, lay_out, visible
from bgrpo_nb.policy.model import load_model

NAMES = ("Llama", "Qwen2", "Qwen3", "Gemma", "GPT2")
SAMPLES = [ # three prompts in mixed order; early ends, one row of one token, two equal rows, one empty row
    ([2, 3, 4, 9, 9], [5, 6, 7, 1]), ([9, 4], [5, 1]), ([2, 3, 4, 9, 9], [5, 6, 7, 8, 9, 3, 1]), ([9, 4], [6, 6, 6, 5, 1]),
    ([7], [1]), ([2, 3, 4, 9, 9], [1]), ([9, 4], [6, 6, 6, 5, 1]), ([2, 3, 4, 9, 9], [8, 6, 7, 8]), ([7], [20, 30, 1]),
    ([2, 3, 4, 9, 9], [5, 6, 7, 8, 2, 2, 2, 2]), ([7], [])]


class FlexByItsMask(Flex):
    "FlexAttention has no backward pass on a CPU: its blocks and its rule as a mask of all pairs"
    def attend(self, query, key, value, scaling):
        rule, (L, _) = self.mask.mask_mod, self.mask.seq_lengths
        mixed, full = (self.blocks(*x) for x in ((self.mask.kv_num_blocks, self.mask.kv_indices),
                                                 (self.mask.full_kv_num_blocks, self.mask.full_kv_indices)))
        mask = create_mask(rule, len(query), None, L, L, query.device) & mixed | full
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)

    @staticmethod
    def blocks(counts, indices): # -> (B, 1, L, L) bool
        listed = torch.arange(indices.shape[-1]) < counts[..., None]
        on = torch.zeros_like(indices, dtype=torch.bool).scatter(-1, indices.long(), listed)
        return on.repeat_interleave(128, -1).repeat_interleave(128, -2)


class InFours(Segments):
    "Small pieces, so that a small trie has several"
    @classmethod
    def of(cls, sequences, dtype, device): return super().of(sequences, dtype, device, at_once=4)


FORMS = {"dense": {}, "segments": dict(Segments=InFours), "runs": dict(Segments=Runs), "flex": {},
         "flex as a mask": dict(Flex=FlexByItsMask)}
KNOWN = {"runs": "segments", "flex as a mask": "flex"}


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    "A form that is used whatever `form_for` would say"
    for name, kind in FORMS[request.param].items(): monkeypatch.setattr(trie_attention, name, kind)
    monkeypatch.setattr(trie, "form_for", lambda *_: KNOWN.get(request.param, request.param))
    return request.param


def calm(name, model=None):
    "A model whose log-probabilities are no further apart than those of a trained one"
    model = model or family(name)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1: p *= 0.5
    return model


def distinct_beginnings(rows):
    "Tokens of the prompts, and of all that a token follows, each beginning once"
    prompts = {tuple(p) for p, _ in rows}
    return sum(map(len, prompts)) + len({(*p, None, *c[:t]) for p, c in rows for t in range(1, len(c))})


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("name", NAMES)
def test_every_form_is_full_rows(name, form):
    model, has_gradients = calm(name), form != "flex"
    ids, mask, C = pad(SAMPLES)
    full = in_full(model, ids, mask, C, 0.9)
    with torch.set_grad_enabled(has_gradients): found = trie_logps(model, ids, mask, C, 0.9, compute_entropy=True)
    for x, y in zip(found, full): assert (x - y).abs().max() < 1e-5
    if has_gradients:
        wanted, got = gradient_of(model, full), gradient_of(model, found)
        assert wanted.norm() > 0 and (got - wanted).norm() <= 1e-5 * wanted.norm()
    assert token_ratio(ids, mask, C) == int(mask.sum()) / distinct_beginnings(SAMPLES)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_are_recomputed_under_their_form(form, reentrant):
    if form == "flex": pytest.skip("no backward pass on a CPU")
    model = family("Qwen3").train()
    ids, mask, C = pad(SAMPLES)
    plain = gradient_of(model, trie_logps(model, ids, mask, C))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradient_of(model, trie_logps(model, ids, mask, C))
    assert plain.norm() > 0 and (found - plain).norm() <= 1e-5 * plain.norm()
    assert model.config._attn_implementation == "sdpa" and not trie_attention._FORM


def test_a_form_works_under_autocast(form, monkeypatch):
    "In bf16: about as far from full rows in float32 as a mask is"
    if form == "flex": pytest.skip("no backward pass on a CPU")
    model = calm("Llama")
    ids, mask, C = pad(SAMPLES)
    full = in_full(model, ids, mask, C, 1.0)[:1]
    wanted = gradient_of(model, full)

    def errors():
        with torch.autocast("cpu", torch.bfloat16): found = trie_logps(model, ids, mask, C)[:1]
        assert found[0].dtype == torch.float32
        return (found[0] - full[0]).norm() / full[0].norm(), (gradient_of(model, found) - wanted).norm() / wanted.norm()

    own = errors()
    monkeypatch.setattr(trie, "form_for", lambda *_: "dense")
    for x, y in zip(own, errors()): assert 0 < x < 1.5 * y < 0.1


@pytest.mark.parametrize("kind", [Segments, Runs])
def test_the_trial_of_a_prepared_model_allows_what_its_precision_rounds(kind, monkeypatch):
    "Accelerate makes float32 of logits that were computed in bf16; a wrong mask is still found"
    monkeypatch.setattr(trie_attention, "Segments", kind)
    model = under_autocast(load_model("tiny"))
    plain = trie_attention._plain(model)
    assert plain(torch.tensor([[1, 2]])).logits.dtype == torch.float32
    assert trie_attention._model_differs("segments", plain, torch.bfloat16, "cpu") is None
    monkeypatch.setattr(trie_attention, "path_to", lambda tout, node: np.arange(0))
    assert trie_attention._model_differs("segments", plain, torch.bfloat16, "cpu")


def test_too_little_memory_is_no_fault_of_a_form(monkeypatch):
    def full(*_): raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(trie_attention, "_attention_differs", full)
    model = family("Llama")
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError): form_for(model, "auto", 2000, torch.float32, "cpu")
    assert not any(trie_attention._FAULTS[model].values())


subtree = st.recursive(st.just([]), lambda below: st.lists(below, max_size=3), max_leaves=12)


def ends_of(trees, at=0):
    "(M,) where the subtree of each node ends, by a walk"
    found = []
    for tree in trees:
        below = ends_of(tree, at + 1)
        found += [at + 1 + len(below), *below]
        at = found[-len(below) - 1]
    return found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 200), st.lists(subtree, max_size=4)), min_size=1, max_size=3))
def test_forms_of_random_tries_agree(groups):
    "Who sees whom: of the blocks, of the runs and of the pieces, against the rule for all pairs"
    prompts, tries = [p for p, _ in groups], [np.array(ends_of(trees), dtype=np.int64) for _, trees in groups]
    sequences = lay_out(prompts, tries, 128)
    tout = torch.from_numpy(sequences.tout)
    seen, L = visible(tout), tout.shape[1]
    blocks = Flex.of(sequences, torch.float32, "cpu").mask
    theirs = create_block_mask(lambda b, h, q, k: (k <= q) & (q < tout[b, k]), len(tout), None, L, L, "cpu")
    assert torch.equal(blocks.to_dense(), theirs.to_dense())
    assert torch.equal(blocks.full_kv_num_blocks, theirs.full_kv_num_blocks)
    runs = Runs.of(sequences, torch.float32, "cpu")
    by_runs = torch.zeros_like(seen).flatten(0, 1)
    for q, k in zip(*(x.split(starts.diff().tolist()) for x, starts in
                      ((runs.queries, runs.query_starts), (runs.keys, runs.key_starts)))):
        for i, at in enumerate(q): by_runs[at, k[:len(k) - len(q) + i + 1] % L] = True
    pieces = torch.zeros_like(seen)
    for b, row in enumerate(Segments.of(sequences, torch.float32, "cpu", at_once=5).rows):
        assert sum(piece.size for piece in row) == L
        begin = 0
        for piece in row:
            at = range(begin, begin + piece.size)
            if piece.mask is not None:
                for q, on in zip(at, piece.mask == 0): pieces[b, q, piece.keys[on]] = True
            elif piece.keys is not None:
                for q in at: pieces[b, q, piece.keys.start:q + 1] = True
            begin += piece.size
    real = torch.stack([(torch.arange(L) >= first) & (torch.arange(L) < last)
                        for first, last in zip(sequences.first.tolist(), sequences.last.tolist())])
    assert torch.equal(by_runs.view_as(seen)[real], seen[real]) and torch.equal(pieces[real], seen[real])


def test_what_is_chosen():
    here = Facts("cuda", 4096, None, True)
    assert choose_form("auto", here)[0] == "flex" and choose_form("auto", here._replace(columns=1023))[0] == "dense"
    assert choose_form("auto", here._replace(compiler=False))[0] == "segments"
    assert choose_form("auto", here._replace(device="cpu", columns=10))[0] == "segments"
    for device in ("cpu", "cuda"): assert choose_form("auto", here._replace(device=device, model="it caps"))[0] == "dense"
    assert choose_form("auto", here, dict(flex="wrong")) == ("segments", "wrong")
    assert choose_form("auto", here, dict(flex="wrong", segments="wrong too")) == ("dense", "wrong too")
    for asked in ("flex", "segments", "dense"): assert choose_form(asked, here._replace(columns=10))[0] == asked
    for asked in ("flex", "segments"):
        with pytest.raises(ValueError, match=f"trie_attention='{asked}' cannot be used here: it caps. Use"):
            choose_form(asked, here._replace(model="it caps"))
        with pytest.raises(ValueError, match="wrong"): choose_form(asked, here, {asked: "wrong"})


def bloom(): return BloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4))


def test_a_model_that_no_other_form_can_reproduce_gets_the_mask():
    "Gemma 2 caps scores; Bloom's ALiBi is added to scores by its own attention; a compiled model has a graph of its own"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for model in (family("Gemma2"), bloom(), torch.compile(family("Llama"))):
            if isinstance(getattr(model, "config", None), type(family("Gemma2").config)):
                model.config.attn_logit_softcapping = 50.0
            assert form_for(model, "auto", 2000, torch.float32, "cpu") == "dense"
    with pytest.raises(ValueError, match="Use 'auto' or 'dense'"): form_for(bloom(), "segments", 2000, torch.float32, "cpu")


def test_a_form_that_fails_its_trial_is_replaced_with_one_warning(monkeypatch):
    "A kernel with wrong outputs; a kernel that is missing; a kernel with one wrong gradient"
    own = Segments.attend
    def swaps_keys(self, query, key, value, scaling): return own(self, query, key.flip(2), value, scaling)
    def is_missing(*_): raise RuntimeError("no kernel")
    def doubles_a_gradient(self, query, key, value, scaling):
        return own(self, query, 2 * key - key.detach(), value, scaling)
    ids, mask, C = pad(SAMPLES)
    for attend, words in ((swaps_keys, "its outputs differ"), (is_missing, "does not run .RuntimeError: no kernel"),
                          (doubles_a_gradient, "its gradients differ")):
        monkeypatch.setattr(Segments, "attend", attend)
        model = family("Llama")
        full = in_full(model, ids, mask, C, 1.0)[0]
        with pytest.warns(UserWarning, match=f"LlamaForCausalLM: attention over tries does without segments.*{words}"):
            found, _ = trie_logps(model, ids, mask, C)
        assert (found - full).abs().max() < 1e-5
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trie_logps(model, ids, mask, C)
        with pytest.raises(ValueError, match="trie_attention='segments' cannot be used here"):
            trie_logps(model, ids, mask, C, attention="segments")


def test_a_trial_leaves_no_trace():
    "Random numbers, gradients, modes and attention are as before"
    model = family("GPT2").train()
    before = torch.get_rng_state()
    with torch.inference_mode(): assert form_for(model, "auto", 50, torch.float32, "cpu") == "segments"
    assert torch.equal(before, torch.get_rng_state()) and model.training
    assert all(p.grad is None for p in model.parameters()) and model.config._attn_implementation == "sdpa"


class Largest(TorchDispatchMode):
    "The most elements of a float32 tensor that any operation gives"
    most = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32: self.most = max(self.most, x.numel())
        return out


@pytest.mark.parametrize("form", ["segments", "dense", "rows"])
def test_no_float32_array_of_nodes_times_vocabulary(form):
    "Forward and backward, entropies included: 4,096 tokens in the vocabulary, 8 places at a time"
    V, at_once = 4096, 8
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | dict(vocab_size=V, hidden_size=16, num_hidden_layers=1))).eval()
    rows = [([2, 3, 4], torch.randint(2, V, (40,)).tolist()) for _ in range(4)]
    ids, mask, C = pad(rows)
    places = 4 * 39 + 1
    known = dict(compute_entropy=True, max_elements=4 * V * at_once)
    if form != "rows": form_for(model, form, 100, torch.float32, "cpu") # its trial has a mask of its own
    with Largest() as seen:
        if form == "rows": logps, entropy = row_logps(model, ids, mask, C, **known)
        else: logps, entropy = trie_logps(model, ids, mask, C, attention=form, **known)
        (logps.sum() + entropy.sum()).backward()
    assert seen.most == max(V * 16, at_once * V) < places * V / 9   # the head and its gradient; pieces of the logits
    with Largest() as seen: trie_logps(model, ids, mask, C, compute_entropy=True)
    assert seen.most >= places * V                                    # the test sees what it looks for


def test_settings_are_obeyed_or_refused(tmp_path):
    assert BGRPOConfig(tmp_path, trie_attention="segments").trie_attention == "segments"
    for more, words in ((dict(trie_attention="fast"), "trie_attention"),
                        (dict(trie_attention="flex", use_cpu=True), "no backward pass on a CPU"),
                        (dict(trie_attention="dense", share_prefixes=False), "share_prefixes is off")):
        with pytest.raises(ValueError, match=words): BGRPOConfig(tmp_path, **more)


def train(folder, more, seen):
    "Two steps; the metrics of each, and the rows of each forward with gradients"
    from datasets import Dataset

    from bgrpo_nb.algebra.problems import generate_problems
    from bgrpo_nb.learn.trainer import BGRPOTrainer
    from bgrpo_nb.policy.model import load_tokenizer, new_model
    torch.manual_seed(0)
    model = new_model("tiny", position="rotary", initializer_range=0.5, hidden_size=32, num_hidden_layers=2,
                      num_attention_heads=4, intermediate_size=48)
    problems = generate_problems(4, 2, 2, seed=5) + generate_problems(4, 3, 2, seed=5)
    config = BGRPOConfig(str(folder), num_generations=4, prompts_per_step=4, max_steps=2, max_completion_length=12,
                         use_cpu=True, disable_tqdm=True, save_strategy="no", seed=1, warmup_steps=0, **more)

    def reward(completion_ids, **kwargs): return [len(ids) / 8 + sum(ids) % 3 for ids in completion_ids]
    data = Dataset.from_dict({"prompt": [p.prompt for p in problems]})
    trainer = BGRPOTrainer(model, reward, config, data, processing_class=load_tokenizer("single"))
    compute = trainer._compute_loss

    def keep(model, inputs):
        rows = zip(*(inputs[k].tolist() for k in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")))
        seen.append([[[x for x, on in zip(ids, mask) if on] for ids, mask in ((a, b), (c, d))] for a, b, c, d in rows])
        return compute(model, inputs)
    trainer._compute_loss = keep
    trainer.train()
    return [line for line in trainer.state.log_history if "grad_norm" in line]


@pytest.mark.parametrize("rollout", ["sample", "beam"])
def test_training_over_tries_is_training_over_rows_and_logs_what_it_shares(rollout, tmp_path):
    "Samples too: prompts of unequal length, completions that end early; every form that a CPU has"
    seen = []
    lines = {form: train(tmp_path / form, dict(rollout=rollout, trie_attention=form), seen) for form in ("auto", "dense")}
    in_rows = train(tmp_path / "rows", dict(rollout=rollout, share_prefixes=False), [])
    assert len({len(p) for p, _ in seen[0]}) > 1 and len({len(c) for _, c in seen[0]}) > 1
    same = 1 if rollout == "sample" else 2 # groups are shuffled whole, rows one by one: the second step has other samples
    pairs = [pair for found in lines.values() for pair in zip(found[:same], in_rows)] + [*zip(*lines.values(), strict=True)]
    for line, wanted in pairs:
        assert abs(line["grad_norm"] - wanted["grad_norm"]) < 1e-3 * wanted["grad_norm"]
        assert abs(line["entropy"] - wanted["entropy"]) < 1e-4
    assert "trie/token_ratio" not in in_rows[0]
    for line, rows in zip(lines["auto"], seen):
        tokens = sum(len(p) + len(c) for p, c in rows)
        assert abs(line["trie/token_ratio"] - tokens / distinct_beginnings(rows)) < 1e-3 and line["trie/token_ratio"] > 2


def test_a_form_that_is_asked_for_is_refused_where_rows_are_forwarded_in_full(tmp_path, monkeypatch):
    from bgrpo_nb.learn import gradients
    monkeypatch.setattr(gradients, "why_no_tree", lambda *_: "it has recurrent state")
    with pytest.raises(ValueError, match="trie_attention='dense' cannot be used where .* in full; use 'auto' .it has recurrent"):
        train(tmp_path, dict(trie_attention="dense"), [])


def for_kernels(name, dtype):
    "On the device, with heads of 16 numbers, which its kernels want at least"
    torch.manual_seed(0)
    sizes = GPT2 | dict(n_embd=64) if name == "GPT2" else SIZES | dict(hidden_size=64, head_dim=16)
    config = getattr(transformers, f"{name}Config")(**sizes)
    return calm(name, transformers.AutoModelForCausalLM.from_config(config).eval()).to("cuda", dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("asked", ["flex", "segments"])
@pytest.mark.parametrize("name", NAMES)
def test_kernels_give_the_log_probabilities_and_gradients_of_rows(name, asked, dtype):
    "In bf16 against the dense form, whose errors are of the same size"
    model = for_kernels(name, dtype)
    ids, mask, C = (x.to("cuda") if isinstance(x, torch.Tensor) else x for x in pad(SAMPLES))
    found = trie_logps(model, ids, mask, C, 0.9, compute_entropy=True, attention=asked)
    got = gradient_of(model, found)
    if dtype == torch.float32: wanted, most = in_full(model, ids, mask, C, 0.9), 1e-4
    else: wanted, most = trie_logps(model, ids, mask, C, 0.9, compute_entropy=True, attention="dense"), 0.1
    for x, y in zip(found, wanted): assert (x - y).norm() <= most * y.norm()
    expected = gradient_of(model, wanted)
    assert (got - expected).norm() <= most * expected.norm()


@pytest.mark.cuda
@pytest.mark.parametrize("asked", ["flex", "segments"])
@pytest.mark.parametrize("name", NAMES)
def test_kernels_pass_their_trial_under_autocast(name, asked):
    "As a trainer prepares a model by default: weights in float32, autocast in its forward, logits made float32"
    model = under_autocast(for_kernels(name, torch.float32), "cuda")
    ids, mask, C = (x.to("cuda") if isinstance(x, torch.Tensor) else x for x in pad(SAMPLES))
    with torch.autocast("cuda", torch.bfloat16):
        assert form_for(model, asked, 4096, torch.bfloat16, "cuda") == asked
        found, wanted = (trie_logps(model, ids, mask, C, attention=form)[:1] for form in (asked, "dense"))
    got, expected = gradient_of(model, found), gradient_of(model, wanted)
    assert (found[0] - wanted[0]).norm() <= 0.1 * wanted[0].norm()
    assert (got - expected).norm() <= 0.1 * expected.norm()


@pytest.mark.cuda
def test_a_device_takes_flex_for_long_sequences_and_compiles_it_once_for_all_lengths():
    model = for_kernels("Llama", torch.bfloat16)
    assert form_for(model, "auto", 4096, torch.bfloat16, "cuda") == "flex"
    assert form_for(model, "auto", 100, torch.bfloat16, "cuda") == "dense"
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for n in (1, 20, 40):
        ids, mask, C = pad([([2, 3], [5 + i, *(2 + t % (V - 2) for t in range(n))]) for i in range(9)])
        with torch.no_grad(): trie_logps(model, ids.cuda(), mask.cuda(), C, attention="flex")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
