"Beam search, sampling, greedy decoding: equal to `generate` and to a naive loop, for every family and every shape."
import gc
import inspect
import re
import shutil
import subprocess
import sys
import warnings
import weakref
from copy import deepcopy
from functools import lru_cache, wraps

import pytest
import torch
import transformers as T
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from bgrpo_nb.search import beam_tree, generation, packed_weights as packed
from bgrpo_nb.search.beam_tree import TREE_ATTENTION, TreeCache, why_no_tree
from bgrpo_nb.search.generation import beam_search, greedy, sample
from bgrpo_nb.solve.grammar import PrefixGrammar
from bgrpo_nb.policy.loading import choose_attention
from bgrpo_nb.policy.model import load_tokenizer
from bgrpo_nb.search.packed_weights import packed_linears, packs

V = 13
SHAPE = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
             max_position_embeddings=64, pad_token_id=0, eos_token_id=None, bos_token_id=None, initializer_range=0.6)
WIDE = SHAPE | dict(hidden_size=384, intermediate_size=512)    # large enough to be packed
SMALL_MAMBA = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=None)
GROUPED = dict(SHAPE, num_key_value_heads=2)
HEAD = dict(GROUPED, head_dim=8)
FAMILIES = dict(
    gpt2=(T.GPT2Config, dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0,
                             eos_token_id=None, bos_token_id=None, initializer_range=0.6)),
    llama=(T.LlamaConfig, GROUPED), qwen2=(T.Qwen2Config, GROUPED), qwen3=(T.Qwen3Config, HEAD),
    mistral=(T.MistralConfig, dict(GROUPED, sliding_window=32)), gemma=(T.GemmaConfig, HEAD),
    # a soft cap, and windows in every other layer
    gemma2=(T.Gemma2Config, dict(HEAD, sliding_window=32, attn_logit_softcapping=5.0, initializer_range=0.2)),
    gemma3=(T.Gemma3TextConfig, dict(HEAD, sliding_window=32, initializer_range=0.2)),
    gpt_neox=(T.GPTNeoXConfig, SHAPE), phi=(T.PhiConfig, GROUPED),
    opt=(T.OPTConfig, dict(SHAPE, ffn_dim=48, word_embed_proj_dim=32)),
    mixtral=(T.MixtralConfig, dict(GROUPED, num_local_experts=4)))
PROMPTS = torch.tensor([[0, 0, 5, 3, 8, 2], [3, 7, 2, 9, 11, 4]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
NO_LENGTH_PENALTY = dict(length_penalty=0.0, do_sample=False, return_dict_in_generate=True, output_scores=True)
NO_END = dict(max_new_tokens=8, eos_token_id=None, pad_token_id=0)


pytestmark = pytest.mark.usefixtures("one_thread")


@lru_cache
def family(name):
    kind, shape = FAMILIES[name]
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(kind(**shape)).eval()
    model.generation_config.eos_token_id = None
    assert why_no_tree(model, 14) is None                          # its probe is over: tests count forwards of searches
    return model


def by_generate(model, ids, mask, K, C, **kwargs):
    out = model.generate(ids, attention_mask=mask, num_beams=K, num_return_sequences=K, max_new_tokens=C,
                         pad_token_id=0, **NO_LENGTH_PENALTY, **kwargs)
    return out.sequences[:, ids.shape[1]:].view(len(ids), K, -1), out.sequences_scores.view(len(ids), K)


@torch.no_grad()
def naive(model, prompt, K, C, eos):
    "No cache, no padding, no tree: every open beam is forwarded over its whole text"
    beams = [([], 0.0)]
    for _ in range(C):
        open_beams = [b for b in beams if not (b[0] and b[0][-1] in eos)]
        if not open_beams: break
        logp = model(torch.tensor([prompt + tokens for tokens, _ in open_beams])).logits[:, -1].float().log_softmax(-1)
        found = [(t + [v], s + x) for (t, s), row in zip(open_beams, logp.tolist()) for v, x in enumerate(row)]
        beams = sorted([b for b in beams if b not in open_beams] + found, key=lambda b: -b[1])[:K]
    return beams


def as_lists(beams, b): # (tokens, score) of each beam of prompt b
    rows = zip(beams.sequences[b], beams.scores[b], beams.lengths[b])
    return [(tokens[:n].tolist(), score.item()) for tokens, score, n in rows if n]


def prompt_of(b): return PROMPTS[b][MASK[b].bool()].tolist()


def assert_same(found, expected, tolerance=1e-4):
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert max(abs(a - b) for (_, a), (_, b) in zip(found, expected)) < tolerance


def padded(prompts):
    P = max(map(len, prompts))
    ids = [[0] * (P - len(p)) + p for p in prompts]
    mask = [[0] * (P - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("name", FAMILIES)
def test_beams_are_those_of_generate(name):
    model = family(name)
    assert why_no_tree(model, 14) is None
    ours = beam_search(model, PROMPTS, MASK, num_beams=6, **NO_END)
    sequences, scores = by_generate(model, PROMPTS, MASK, 6, 8)
    assert torch.equal(ours.sequences, sequences)
    torch.testing.assert_close(ours.scores, scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_beams_that_end_are_those_of_the_naive_loop(name):
    how = dict(max_new_tokens=6, eos_token_id=[1, 4, 6], pad_token_id=0)
    found = beam_search(family(name), PROMPTS, MASK, num_beams=5, **how)
    for b in range(2): assert_same(as_lists(found, b), naive(family(name), prompt_of(b), 5, 6, {1, 4, 6}))


prompts = st.lists(st.lists(st.integers(1, V - 1), min_size=1, max_size=9), min_size=1, max_size=4)
ends = st.sampled_from([(), (1,), (1, 4), (2, 3, 5, 7, 11), tuple(range(1, V))])


@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(prompts, st.integers(1, 20), st.integers(1, 9), ends, st.sampled_from(["gpt2", "llama"]), st.booleans())
def test_any_lengths_widths_and_ends(texts, K, C, eos, name, static):
    model, (ids, mask) = family(name), padded(texts)
    how = dict(max_new_tokens=C, eos_token_id=list(eos), pad_token_id=0)
    found = beam_search(model, ids, mask, num_beams=K, static=static, **how)
    for b, text in enumerate(texts): assert_same(as_lists(found, b), naive(model, text, K, C, set(eos)))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_a_long_search_sweeps_its_tree(name):
    "Many dead nodes, prompts that leave, ids ended at different times: all forms of the search agree"
    kwargs = dict(num_beams=16, max_new_tokens=25, pad_token_id=0)
    ids, mask = padded([[5, 3], [7, 2, 9], [6], [8, 8, 8]])
    for eos in (None, [1], [1, 2, 3]):
        swept, fixed = (beam_search(family(name), ids, mask, eos_token_id=eos, static=static, **kwargs)
                        for static in (False, True))
        assert torch.equal(swept.sequences, fixed.sequences) and torch.equal(swept.lengths, fixed.lengths)
        torch.testing.assert_close(swept.scores, fixed.scores, atol=1e-4, rtol=0)
    assert_same(as_lists(swept, 1), naive(family(name), [7, 2, 9], 16, 25, {1, 2, 3}))


def test_more_beams_than_words():
    how = dict(num_beams=40, pad_token_id=0)
    one = beam_search(family("llama"), PROMPTS, MASK, max_new_tokens=1, eos_token_id=1, **how)
    assert one.sequences.shape == (2, V, 1) and torch.isfinite(one.scores).all()
    ended = beam_search(family("llama"), PROMPTS, MASK, max_new_tokens=5, eos_token_id=list(range(V)), **how)
    assert ended.sequences.shape == (2, V, 1)                    # everything ends at once: no fortieth beam is invented


def test_without_a_cache():
    "The reference: `use_cache=False` gives the same beams"
    ours = beam_search(family("gpt2"), PROMPTS, MASK, num_beams=4, **NO_END)
    sequences, scores = by_generate(family("gpt2"), PROMPTS, MASK, 4, 8, use_cache=False)
    assert torch.equal(ours.sequences, sequences)
    torch.testing.assert_close(ours.scores, scores, atol=1e-4, rtol=0)


TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.4} # nats over 8 tokens


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_precisions(name, dtype):
    "A beam's score is what the model itself, in the same precision and without a cache, gives to its tokens"
    kind, shape = FAMILIES[name]
    model = T.AutoModelForCausalLM.from_config(kind(**dict(shape, initializer_range=0.2)), dtype=dtype).eval()
    model.load_state_dict({k: v.to(dtype) for k, v in family(name).state_dict().items()})
    for static in (False, True):
        beams = beam_search(model, PROMPTS[1:], num_beams=5, static=static, **NO_END)
        assert beams.scores.dtype == torch.float32
        texts = torch.cat([PROMPTS[1:].expand(5, -1), beams.sequences[0]], 1)
        with torch.no_grad(): logp = model(texts).logits[:, 5:-1].float().log_softmax(-1)
        plain = logp.gather(2, beams.sequences[0][..., None]).sum((1, 2))
        assert (plain - beams.scores[0]).abs().max() < TOLERANCE[dtype]


class Forwards:
    "Counts a model's forwards and their rows"
    def __init__(self, model): self.model, self.shapes = model, []
    def __enter__(self):
        def note(module, args, kwargs):
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            self.shapes.append(tuple(ids.shape))
        self.hook = self.model.register_forward_pre_hook(note, with_kwargs=True)
        return self
    def __exit__(self, *_): self.hook.remove()


@pytest.mark.parametrize("call", [beam_search, greedy, sample])
def test_too_long_is_refused_before_anything_is_computed(call):
    how = dict(num_beams=3) if call is beam_search else {}
    with Forwards(family("gpt2")) as forwards, pytest.raises(ValueError, match="lower max_new_tokens by 6"):
        call(family("gpt2"), PROMPTS, MASK, max_new_tokens=64, eos_token_id=1, pad_token_id=0, **how)
    assert not forwards.shapes
    call(family("gpt2"), PROMPTS[:, :2], max_new_tokens=4, eos_token_id=1, pad_token_id=0, **how)


@pytest.mark.parametrize("static", [False, True])
def test_settings_come_back_after_an_exception(static):
    model, calls = family("llama"), []
    def breaks(ids, scores):
        calls.append(model.config._attn_implementation)
        if len(calls) == 3: raise ZeroDivisionError
        return scores
    model.train()
    try:
        for call, how in ((beam_search, dict(num_beams=3)), (sample, dict(num_return_sequences=3))):
            calls.clear()
            with pytest.raises(ZeroDivisionError):
                call(model, PROMPTS, MASK, logits_processor=breaks, static=static, **how, **NO_END)
            assert calls == [TREE_ATTENTION] * 3 and model.training and model.config._attn_implementation == "sdpa"
            assert torch.is_grad_enabled()
    finally: model.eval()


@pytest.mark.filterwarnings("ignore:.*without a beam tree")
@pytest.mark.parametrize("call, how", [(beam_search, dict(num_beams=3)), (greedy, {}), (sample, {})])
def test_what_cannot_be_continued_is_refused(call, how):
    torch.manual_seed(0)
    small = dict(vocab_size=V, d_model=16, decoder_start_token_id=0)
    t5 = T.T5ForConditionalGeneration(T.T5Config(**small, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()
    bart = T.BartForConditionalGeneration(T.BartConfig(**small, encoder_layers=1, decoder_layers=1)).eval()
    for model in (t5, bart, LoRAModel(t5, ())):
        with Forwards(model) as forwards, pytest.raises(ValueError, match="encoder-decoder.*use its own generate"):
            call(model, PROMPTS, MASK, **how, **NO_END)
        assert not forwards.shapes
    decoder = T.BartForCausalLM(T.BartConfig(**small, decoder_layers=1, decoder_attention_heads=2)).eval()
    assert call(decoder, PROMPTS[1:], **how, **NO_END).lengths.min() == 8
    with pytest.raises(ValueError, match="prompts are empty.*BOS"):
        call(family("gpt2"), PROMPTS[:, :0], **how, **NO_END)
    with pytest.raises(ValueError, match=r"nothing of prompt\(s\) \[1\]"):
        call(family("gpt2"), PROMPTS, MASK * torch.tensor([[1], [0]]), **how, **NO_END)
    with pytest.raises(ValueError, match="at least one prompt"):
        call(family("gpt2"), PROMPTS[:0], **how, **NO_END)


LONGROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[2.0] * 4,
                original_max_position_embeddings=8)
TRAINED = {name: FAMILIES[name] for name in ("gpt2", "opt", "llama", "gemma3")} | dict(
    longrope=(T.LlamaConfig, dict(SHAPE, rope_parameters=LONGROPE)), # uses other frequencies for texts over 8 tokens
    windows=(T.MistralConfig, dict(GROUPED, sliding_window=10)),     # this one and the next are searched by `generate`
    mamba=(T.MambaConfig, SMALL_MAMBA))


@pytest.mark.filterwarnings("ignore:.*without a beam tree")
@pytest.mark.parametrize("name", TRAINED)
def test_a_training_step_after_a_search(name):
    "Searches run in inference mode: neither their results nor what they leave in a model may block gradients"
    kind, shape = TRAINED[name]
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(kind(**shape)).eval()
    model.generation_config.eos_token_id = None
    twin, prompt = deepcopy(model), PROMPTS[1:]                  # the twin never searches
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, twin)]

    def train(m, optimizer, found):
        rows = torch.cat([prompt.expand(len(found.sequences[0]), -1), found.sequences[0]], 1)
        logp = m(rows).logits[:, 5:-1].log_softmax(-1).gather(2, found.sequences[0][..., None])[..., 0]
        optimizer.zero_grad()
        (found.scores[0].softmax(0)[:, None] * logp).sum().backward()
        assert sum(p.grad.norm() for p in m.parameters() if p.grad is not None) > 0
        optimizer.step()

    def breaks(ids, scores): raise ZeroDivisionError
    for search, how in ((beam_search, dict(num_beams=4)), (sample, dict(num_return_sequences=3, generator=None))):
        with pytest.raises(ZeroDivisionError): search(model, prompt, logits_processor=breaks, **how, **NO_END)
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        found = search(model, prompt, **how, **NO_END)
        assert not any(x.is_inference() for x in found)
        assert torch.autograd.grad(found.scores.requires_grad_().exp().sum(), found.scores)[0].equal(found.scores.exp())
        found = found._replace(scores=found.scores.detach())
        for m, optimizer in zip((model, twin), optimizers): train(m, optimizer, found)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    after = beam_search(model, prompt, num_beams=4, **NO_END)   # sees the new weights
    assert_same(as_lists(after, 0), naive(twin, prompt_of(1), 4, 8, set()))


@pytest.mark.parametrize("static", [False, True])
def test_a_search_leaves_no_cache_behind(static):
    "Keys and values are the largest thing in a search: they must not wait for a garbage collection"
    gc.collect()
    gc.disable()
    try:
        for call, how in ((beam_search, dict(num_beams=3)), (sample, dict(num_return_sequences=3))):
            call(family("llama"), PROMPTS, MASK, static=static, **how, **NO_END)
            assert not [x for x in gc.get_objects() if type(x) is TreeCache]
    finally: gc.enable()


def test_the_prompt_is_read_once():
    with Forwards(family("llama")) as forwards: sample(family("llama"), PROMPTS, MASK, num_return_sequences=9, **NO_END)
    assert forwards.shapes == [(2, 6)] + [(2, 9)] * 7
    with Forwards(family("llama")) as forwards: beam_search(family("llama"), PROMPTS, MASK, num_beams=9, **NO_END)
    assert forwards.shapes == [(2, 6)] + [(2, 9)] * 7


def last_step(model, text, K, C, eos):
    "After how many tokens the naive loop has nothing open"
    return next((t for t in range(1, C + 1) if all(b[0][-1] in eos for b in naive(model, text, K, t, eos))), C)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_stops_when_nothing_open_can_enter(name):
    "An open beam is one of the K best, so a prompt is over when all K have ended, and not a step later"
    model, eos, texts = family(name), {1, 2, 3, 4, 5, 6, 7}, [[5, 3, 8], [9, 11, 2], [12, 2, 2], [8, 10, 7]]
    steps = [last_step(model, text, 4, 20, eos) for text in texts]
    assert len(set(steps)) > 1 and max(steps) < 20
    how = dict(num_beams=4, max_new_tokens=20, eos_token_id=list(eos), pad_token_id=0)
    with Forwards(model) as forwards: beam_search(model, torch.tensor(texts), **how)
    assert len(forwards.shapes) == max(steps)                    # a prefill, and a forward before every further token
    rows = [b for b, _ in forwards.shapes[1:]]
    assert rows == [sum(s > t for s in steps) for t in range(1, max(steps))]  # each prompt leaves at its own end
    with Forwards(model) as forwards: beam_search(model, torch.tensor(texts), static=True, **how)
    assert len(forwards.shapes) == -(-max(steps) // 8) * 8       # checked at every eighth token


@pytest.mark.parametrize("config, reason", [
    (T.MambaConfig(**SMALL_MAMBA), "recurrent state"),
    (T.MistralConfig(**GROUPED, sliding_window=10), "window of 10 tokens"),
    (T.Gemma3TextConfig(**HEAD, sliding_window=10), "window of 10 tokens"),
    (T.BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4, eos_token_id=None), "no position_ids"),
], ids=lambda x: type(x).__name__)
def test_families_without_a_tree_warn_once(config, reason):
    from bgrpo_nb.search import generation
    generation._WARNED.clear()
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        beams = [beam_search(model, PROMPTS, MASK, num_beams=3, **NO_END) for _ in range(2)]
        sample(model, PROMPTS, MASK, num_return_sequences=2, **NO_END)
    messages = [str(w.message) for w in caught if "without a beam tree" in str(w.message)]
    assert len(messages) == 1 and reason in messages[0]
    sequences, scores = by_generate(model, PROMPTS, MASK, 3, 8)
    assert torch.equal(beams[1].sequences, sequences)
    torch.testing.assert_close(beams[1].scores, scores, atol=1e-4, rtol=0)


WITHOUT_TREE = dict(
    windows=T.MistralConfig(**GROUPED, sliding_window=10),
    recurrent=T.MambaConfig(**dict(SMALL_MAMBA, initializer_range=0.6)),
    bloom=T.BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4, eos_token_id=None, initializer_range=0.6))
OPINIONS = dict(repetition_penalty=3.0, no_repeat_ngram_size=2, suppress_tokens=[2, 3, 4], min_new_tokens=3,
                bad_words_ids=[[5]], begin_suppress_tokens=[6], forced_eos_token_id=7, renormalize_logits=True,
                do_sample=True, temperature=9.0, top_k=1, top_p=0.1, min_p=0.5, typical_p=0.2, num_beams=3,
                length_penalty=2.0, early_stopping=True, eos_token_id=[8, 9], pad_token_id=3)


def without_tree(name):
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(WITHOUT_TREE[name]).eval()
    model.generation_config.eos_token_id = None
    return model


NEO = dict(vocab_size=V, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=64, window_size=32,
           eos_token_id=None, bos_token_id=None, initializer_range=0.6)
OSS = dict(HEAD, num_local_experts=4, sliding_window=32, rope_parameters=dict(rope_type="default", rope_theta=1e4))


@pytest.mark.filterwarnings("ignore:.*without a beam tree")
@pytest.mark.parametrize("config, reason", [
    (T.GptOssConfig(**OSS | dict(initializer_range=0.02)), "attention sinks"),
    (T.GptOssConfig(**OSS), "attention sinks"),
    (T.GPTNeoConfig(**NEO, attention_types=[[["global", "local"], 1]]), r"global, local\) has a mask of its own"),
    (T.GPTNeoConfig(**NEO, attention_types=[[["global"], 2]]), r"global\) has a mask of its own")])
def test_attention_that_a_tree_does_not_have_is_found_by_what_it_is(config, reason):
    "Short texts and fresh weights hide the difference from a probe; long searches do not"
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    assert re.search(reason, why_no_tree(model, 14) or "")
    found = beam_search(model, PROMPTS[1:], num_beams=8, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    assert_same(as_lists(found, 0), naive(model, prompt_of(1), 8, 12, set()))


@pytest.mark.parametrize("scale", [0.002, 0.05, 0.6])
def test_the_probe_measures_against_the_spread_of_the_logits(scale):
    "A model that ignores the mask is found with small weights too, and right ones pass in every precision"
    class Ignoring(T.LlamaForCausalLM):
        def forward(self, input_ids=None, position_ids=None, **kwargs): return super().forward(input_ids, **kwargs)
    shape = dict(GROUPED, initializer_range=scale)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        assert why_no_tree(T.AutoModelForCausalLM.from_config(T.LlamaConfig(**shape), dtype=dtype).eval(), 14) is None
    if scale < 0.05: return                                       # positions hardly reach these logits
    torch.manual_seed(0)
    assert "differ" in why_no_tree(Ignoring(T.LlamaConfig(**shape)).eval(), 14)


def test_a_probe_allows_what_autocast_rounds_and_no_more():
    "As a trainer prepares a model: products in bf16, weights and logits in float32"
    prompts, mask, path = torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.ones(2, 3), torch.tensor([[6, 7], [8, 9]])
    def answer(model, share):
        found = torch.stack([model(input_ids=torch.cat([prompts[b], path[b, [1, 1]]])[None]).logits[0, -1] for b in (0, 1)])
        return beam_tree.differs(model, found + share * found.abs().amax(-1, keepdim=True), prompts, mask, path)
    with torch.no_grad():
        model = deepcopy(family("llama"))
        assert answer(model, 0) is None and answer(model, 0.025)
        prepared = under_autocast(model)
        assert prepared(input_ids=prompts).logits.dtype == torch.float32 == prepared.dtype
        assert answer(prepared, 0.025) is None and answer(prepared, 0.2)
        assert not any(m._forward_hooks for m in prepared.modules())


@pytest.mark.filterwarnings("ignore:.*without a beam tree")
def test_a_term_that_grows_in_training_is_found_by_another_probe():
    "A bias by slot is near 0 at first; a tree has other slots. Small steps ask for few probes, and large weights for one"
    class Hidden(T.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.tilt = torch.nn.Parameter(torch.full((1,), 1e-6))
        def forward(self, input_ids=None, past_key_values=None, position_ids=None, **kwargs):
            start = past_key_values.get_seq_length() if past_key_values is not None else 0
            out = super().forward(input_ids, past_key_values=past_key_values, position_ids=position_ids, **kwargs)
            slots = start + torch.arange(input_ids.shape[1])[-out.logits.shape[1]:, None]
            out.logits = out.logits + self.tilt * slots * torch.arange(V)
            return out
    torch.manual_seed(0)
    model = Hidden(T.LlamaConfig(**GROUPED)).eval()
    assert why_no_tree(model, 14) is None
    with Forwards(model) as forwards, torch.no_grad():
        for _ in range(400):
            model.tilt += 1e-3                                     # 1e-6 ... 0.4: doubled 19 times
            reason = why_no_tree(model, 14)
    assert "differ" in reason and 10 < len(forwards.shapes) <= 19 * 5
    found = beam_search(model, PROMPTS[1:], num_beams=5, **NO_END)
    assert_same(as_lists(found, 0), naive(model, prompt_of(1), 5, 8, set()))


@pytest.mark.filterwarnings("ignore:.*without a beam tree")
@pytest.mark.parametrize("name", WITHOUT_TREE)
def test_a_checkpoint_s_generation_config_changes_no_search(name):
    model, text = without_tree(name), PROMPTS[1:]
    def searches():
        torch.manual_seed(1)
        drawn = sample(model, text, num_return_sequences=6, **NO_END)
        return beam_search(model, text, num_beams=5, **NO_END), greedy(model, text, **NO_END), drawn
    before = searches()
    own = T.GenerationConfig(**OPINIONS)
    model.generation_config = own
    after = searches()
    assert model.generation_config is own and own.repetition_penalty == 3.0 and own.eos_token_id == [8, 9]
    for a, b in zip(before, after): assert torch.equal(a.sequences, b.sequences) and torch.equal(a.scores, b.scores)
    assert_same(as_lists(after[0], 0), naive(model, prompt_of(1), 5, 8, set()))
    assert_same(as_lists(after[1], 0), naive(model, prompt_of(1), 1, 8, set()))
    ended = greedy(model, text, max_new_tokens=8, eos_token_id=after[1].sequences[0, 0, 2].item(), pad_token_id=0)
    assert ended.lengths.item() <= 3                              # the caller's end token is obeyed


@pytest.mark.parametrize("K", [1, 4])
def test_processors_and_temperature_are_the_same_with_and_without_a_tree(K, monkeypatch):
    "The fallback searches a model that also has a tree, so the two can be compared"
    model, penalty = family("llama"), T.RepetitionPenaltyLogitsProcessor(3.0)
    calls = (lambda: beam_search(model, PROMPTS, MASK, num_beams=K, logits_processor=penalty, **NO_END),
             lambda: greedy(model, PROMPTS, MASK, logits_processor=penalty, **NO_END),
             lambda: sample(model, PROMPTS, MASK, num_return_sequences=K, temperature=0.5, **NO_END,
                            logits_processor=[penalty, T.TopKLogitsWarper(1)]))
    by_tree = [call() for call in calls]
    monkeypatch.setattr(generation, "why_no_tree", lambda *args: "a test")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for call, expected in zip(calls, by_tree):
            found = call()
            assert torch.equal(found.sequences, expected.sequences)
            torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=0)


class LoRALinear(torch.nn.Module):
    "A product of two small matrices beside a layer; the second is zero at first"
    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.A = torch.nn.Parameter(torch.randn(4, layer.in_features))
        self.B = torch.nn.Parameter(torch.zeros(layer.out_features, 4))
    def forward(self, x):
        return self.base_layer(x) + x @ self.A.T @ self.B.T


class LoRAModel(torch.nn.Module):
    "In the shape of PEFT's: (*args, **kwargs) hides the signature, all other attributes are the base model's"
    def __init__(self, model, layers=None):
        super().__init__()
        torch.manual_seed(2)
        for layer in model.model.layers if layers is None else layers: layer.self_attn.q_proj = LoRALinear(layer.self_attn.q_proj)
        self.base_model = torch.nn.Module()
        self.base_model.model = model
    def __getattr__(self, name):
        try: return super().__getattr__(name)
        except AttributeError: return getattr(self.base_model.model, name)
    def get_base_model(self): return self.base_model.model
    def forward(self, *args, **kwargs): return self.base_model.model(*args, **kwargs)


def peft_model(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))


@pytest.mark.parametrize("wrap", [LoRAModel, peft_model])
def test_a_lora_is_searched_over_the_tree_with_its_adapters(wrap):
    plain, model = family("llama"), wrap(deepcopy(family("llama")))
    calls = (lambda m: beam_search(m, PROMPTS, MASK, num_beams=5, **NO_END), lambda m: greedy(m, PROMPTS, MASK, **NO_END),
             lambda m: sample(m, PROMPTS, MASK, num_return_sequences=5, **NO_END,
                              generator=torch.Generator().manual_seed(0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in calls:
            a, b = call(plain), call(model)
            assert torch.equal(a.sequences, b.sequences)
            torch.testing.assert_close(a.scores, b.scores, atol=1e-5, rtol=0)
        for name, x in model.named_parameters():
            if x.requires_grad and (name.endswith(".B") or "lora_B" in name): torch.nn.init.normal_(x, std=0.5)
        model.train()
        adapted = calls[0](model)
        assert model.training and model.get_base_model().config._attn_implementation == "sdpa"
    model.eval()
    assert not torch.equal(adapted.scores, calls[0](plain).scores)
    for b in range(2): assert_same(as_lists(adapted, b), naive(model, prompt_of(b), 5, 8, set()))


@pytest.mark.parametrize("kind", ["lora", "rank-stabilized", "dora", "ia3"])
def test_adapters_are_those_of_their_merged_model(kind):
    peft, plain = pytest.importorskip("peft"), family("llama")
    how = dict(target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    configs = {"lora": lambda: peft.LoraConfig(r=4, **how), "rank-stabilized": lambda: peft.LoraConfig(r=4, use_rslora=True, **how),
               "dora": lambda: peft.LoraConfig(r=4, use_dora=True, **how),
               "ia3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], **how)}
    torch.manual_seed(3)
    model = peft.get_peft_model(deepcopy(plain), configs[kind]()).eval()
    for x in model.parameters():
        if x.requires_grad: torch.nn.init.normal_(x, 1.0 if kind == "ia3" else 0.0, 0.3)
    def searches(m):
        return (beam_search(m, PROMPTS, MASK, num_beams=5, **NO_END), greedy(m, PROMPTS, MASK, **NO_END),
                sample(m, PROMPTS, MASK, num_return_sequences=5, generator=torch.Generator().manual_seed(0), **NO_END))
    def same(a, b): return torch.equal(a.sequences, b.sequences) and torch.allclose(a.scores, b.scores, atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted, base = searches(model), searches(plain)
        with model.disable_adapter(): assert all(map(same, searches(model), base))
        assert all(map(same, searches(model), adapted)) and not same(adapted[0], base[0])
    assert all(map(same, searches(deepcopy(model).merge_and_unload()), adapted))


@pytest.mark.filterwarnings("ignore:.*without a beam tree")
def test_soft_prompts_are_those_of_a_plain_forward():
    peft = pytest.importorskip("peft")
    torch.manual_seed(4)
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(deepcopy(family("llama")), config).eval()
    for x in model.parameters():
        if x.requires_grad: torch.nn.init.normal_(x)
    found = beam_search(model, PROMPTS[1:], num_beams=5, **NO_END)
    assert_same(as_lists(found, 0), naive(model, prompt_of(1), 5, 8, set()))


ROPES = dict(longrope=LONGROPE, dynamic=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0, original_max_position_embeddings=8))


@pytest.mark.filterwarnings("ignore:.*without a beam tree")
@pytest.mark.parametrize("kind", [T.LlamaConfig, T.Phi3Config])
@pytest.mark.parametrize("rope", ROPES)
def test_frequencies_that_change_with_the_length(kind, rope):
    "Across the original length beams are those of plain forwards, each prompt as if it were alone"
    if (kind, rope) == (T.Phi3Config, "dynamic"): pytest.skip("Phi-3 takes no dynamic frequencies")
    torch.manual_seed(0)
    extra = dict(original_max_position_embeddings=8) if kind is T.Phi3Config else {}
    model = T.AutoModelForCausalLM.from_config(kind(**SHAPE, rope_parameters=ROPES[rope], **extra)).eval()
    model.generation_config.eos_token_id = None
    assert why_no_tree(model, 8) is None and "after 8 tokens" in why_no_tree(model, 9)
    for C in (2, 8):
        found = beam_search(model, PROMPTS, MASK, num_beams=5, max_new_tokens=C, eos_token_id=None, pad_token_id=0)
        for b in range(2): assert_same(as_lists(found, b), naive(model, prompt_of(b), 5, C, set()))


def test_prompt_learning_goes_through_its_own_generate():
    "Its forward adds tokens to the prompt, so the model inside is another policy"
    class Soft(LoRAModel): active_peft_config = type("Config", (), dict(is_prompt_learning=True))
    assert why_no_tree(Soft(deepcopy(family("llama"))), 14) == "its forward takes no position_ids"


@pytest.mark.parametrize("static", [False, True])
def test_a_compiled_wrapper_is_searched_compiled(static):
    torch.compiler.reset()
    graphs, plain = [], family("llama")
    def backend(graph, inputs):
        graphs.append(1)
        return graph.forward
    model = torch.compile(deepcopy(plain), dynamic=True, fullgraph=True, backend=backend)
    for K in (3, 4):
        a, b = (beam_search(m, PROMPTS, MASK, num_beams=K, static=static, **NO_END) for m in (plain, model))
        assert torch.equal(a.sequences, b.sequences)
        torch.testing.assert_close(a.scores, b.scores, atol=1e-4, rtol=0)
        assert len(graphs) == 1


def test_a_wrapper_for_several_processes_is_taken_off():
    plain, model = family("llama"), torch.nn.DataParallel(deepcopy(family("llama")))
    a, b = (beam_search(m, PROMPTS, MASK, num_beams=5, **NO_END) for m in (plain, model))
    assert torch.equal(a.sequences, b.sequences) and torch.equal(a.scores, b.scores)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_greedy_and_samples_from_the_same_engine(name):
    model = family(name)
    expected = model.generate(PROMPTS, attention_mask=MASK, do_sample=False, max_new_tokens=8, pad_token_id=0)[:, 6:]
    assert torch.equal(greedy(model, PROMPTS, MASK, **NO_END).sequences[:, 0], expected)
    cold = sample(model, PROMPTS, MASK, num_return_sequences=3, temperature=1e-5, **NO_END)
    assert torch.equal(cold.sequences, expected[:, None].expand(-1, 3, -1))
    for static in (False, True):
        drawn = sample(model, PROMPTS, MASK, num_return_sequences=5, max_new_tokens=8, eos_token_id=[1, 4],
                       pad_token_id=0, static=static, generator=torch.Generator().manual_seed(0))
        for b in range(2):
            for tokens, score in as_lists(drawn, b):
                text = prompt_of(b)
                with torch.no_grad(): logits = model(torch.tensor([text + tokens])).logits[0, len(text) - 1:-1]
                logp = logits.log_softmax(-1)
                assert abs(logp.gather(1, torch.tensor(tokens)[:, None]).sum().item() - score) < 1e-4
                assert not {1, 4} & set(tokens[:-1]) and (len(tokens) == 8 or tokens[-1] in (1, 4))


def well_formed(words):
    "Prefix notation, read from the left; None while it is unfinished"
    need = 1
    for i, w in enumerate(words):
        if w in "0123456789": assert i and words[i - 1] in list("PN0123456789")
        else:
            assert not (i and words[i - 1] in list("PN")), "a sign without digits"
            if w == "&":
                assert need == 0
                need = 1
                continue
            assert need > 0
            need += 1 if w in "+*^" else -1
    return need == 0


def test_the_grammar_in_generate_and_in_beams():
    tokenizer = load_tokenizer("single")
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(T.LlamaConfig(**dict(GROUPED, vocab_size=len(tokenizer)))).eval()
    model.generation_config.eos_token_id = None
    ids, end = torch.tensor([[5, 6, 7, 8]]), tokenizer.eos_token_id
    everything, how = torch.ones_like(ids), dict(max_new_tokens=12, pad_token_id=0, eos_token_id=end)
    grammar = PrefixGrammar(tokenizer, prompt_length=4)
    greedy_theirs = model.generate(ids, attention_mask=everything, do_sample=False, logits_processor=[grammar], **how)
    ours = greedy(model, ids, logits_processor=grammar, **how)
    assert ours.sequences[0, 0, :ours.lengths[0, 0]].tolist() == greedy_theirs[0, 4:].tolist()
    sequences, _ = by_generate(model, ids, everything, 4, 12, eos_token_id=end, logits_processor=[grammar])
    theirs = sequences[0].tolist()
    wide = [beam_search(model, ids, num_beams=8, logits_processor=grammar, static=s, **how) for s in (False, True)]
    assert torch.equal(wide[0].sequences, wide[1].sequences)
    for tokens in theirs + [t for t, _ in as_lists(wide[0], 0)]:
        words = tokenizer.convert_ids_to_tokens(tokens)
        if "⁇" in words: assert well_formed(words[:words.index("⁇")])
        else: well_formed(words)


@pytest.mark.parametrize("static", [None, False, True])
def test_a_processor_that_counts_rows_gets_all_of_every_prompt(static):
    "The second prompt may write other tokens than the first; prompts and beams end at different times"
    model, words = family("llama"), [[2, 3, 4, 5, 1], [7, 8, 9, 10, 1]]
    def allowed(b, text): return words[b]
    how = dict(max_new_tokens=6, pad_token_id=0)
    for wrap in (lambda x: x, lambda x: [x], lambda x: T.LogitsProcessorList([x])):
        processor = wrap(T.PrefixConstrainedLogitsProcessor(allowed, 5))
        found = beam_search(model, PROMPTS, MASK, num_beams=5, logits_processor=processor, static=static,
                            eos_token_id=None, **how)
        sequences, scores = by_generate(model, PROMPTS, MASK, 5, 6, prefix_allowed_tokens_fn=allowed)
        assert torch.equal(found.sequences, sequences)
        torch.testing.assert_close(found.scores, scores, atol=1e-4, rtol=0)
        drawn = sample(model, PROMPTS, MASK, num_return_sequences=5, logits_processor=processor, static=static,
                       eos_token_id=1, **how)
        ended = beam_search(model, PROMPTS, MASK, num_beams=5, logits_processor=processor, static=static,
                            eos_token_id=[1, 9], **how)
        for beams in (drawn, ended):
            for b in range(2): assert {i for tokens, _ in as_lists(beams, b) for i in tokens} <= set(words[b])


def test_the_grammar_of_a_search_in_a_training_step():
    "Created and first used in inference mode, as in a search; then in a step with gradients"
    tokenizer = load_tokenizer("single")
    with torch.inference_mode():
        inside = PrefixGrammar(tokenizer, prompt_length=0)
        inside(torch.tensor([[1]]), torch.zeros(1, len(tokenizer)))
    outside, got = PrefixGrammar(tokenizer, prompt_length=0), []
    ids = torch.tensor([tokenizer.convert_tokens_to_ids("+ * P 2".split())] * 2)
    for grammar in (inside, outside):
        logits = torch.zeros(2, len(tokenizer), requires_grad=True)
        grammar(ids, logits.log_softmax(-1)).logsumexp(-1).sum().backward()
        got.append(logits.grad)
    assert torch.equal(*got) and got[0].abs().sum() > 0


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "opt", "mixtral"])
def test_a_compiled_model_is_searched_compiled(name, static):
    "One graph serves every later step and search; prompts and probes are not compiled; new weights are seen"
    torch.compiler.reset()
    graphs, counts, plain, model = [], [], deepcopy(family(name)), deepcopy(family(name))
    model.compile(dynamic=True, fullgraph=True, backend=lambda graph, inputs: (graphs.append(1), graph.forward)[1])
    for P, K in ((6, 3), (6, 4), (5, 3)):
        for m in (plain, model):
            with torch.no_grad():
                for x in m.parameters(): x.mul_(1.05)
        ids, mask = PROMPTS[:, -P:], MASK[:, -P:]
        def beams_and_samples(m):
            drawn = sample(m, ids, mask, num_return_sequences=K, static=static,
                           generator=torch.Generator().manual_seed(0), **NO_END)
            return beam_search(m, ids, mask, num_beams=K, static=static, **NO_END), drawn
        (a, b), (c, d) = beams_and_samples(plain), beams_and_samples(model)
        assert torch.equal(a.sequences, c.sequences) and torch.equal(b.sequences, d.sequences)
        torch.testing.assert_close(a.scores, c.scores, atol=1e-4, rtol=0)
        counts.append(len(graphs))
    assert counts == [2 if name == "gemma2" and not static else 1] * 3


NEEDS_COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=NEEDS_COMPILER)])
@pytest.mark.parametrize("kind, shape", [(T.LlamaConfig, dict(hidden_size=384, intermediate_size=512)),
                                         (T.GPT2Config, dict(n_embd=384, n_head=4))])
def test_a_compiled_model_with_packed_weights(kind, shape, backend):
    torch.compiler.reset()
    torch.manual_seed(0)
    layers = 1 if backend == "inductor" else 2                   # each is compiled anew, for half a minute
    plain = T.AutoModelForCausalLM.from_config(kind(**SHAPE | shape | {"num_hidden_layers": layers})).eval()
    model = deepcopy(plain)
    model.compile(dynamic=True, fullgraph=True, backend=backend)
    for K in (3, 4):
        a, b = (beam_search(m, PROMPTS, MASK, num_beams=K, **NO_END) for m in (plain, model))
        assert torch.equal(a.sequences, b.sequences)
        torch.testing.assert_close(a.scores, b.scores, atol=1e-4, rtol=0)


def test_packed_weights_are_those_of_their_layer():
    "Shared weights within a model and between models, nested blocks, weights that change, a call after the block"
    x, layers = torch.randn(5, 512), torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(2)))
    layers.insert(1, torch.nn.ReLU())
    layers[2].weight = layers[0].weight
    with torch.no_grad():
        plain = layers(x)
        with packed_linears(layers, rows=5, products=40):
            with packed_linears(layers, rows=5, products=40): torch.testing.assert_close(layers(x), plain)
            packed_forward = layers[0].forward
            torch.testing.assert_close(layers(x), plain)
            other = torch.nn.Linear(512, 512)
            other.weight, other.bias = layers[0].weight, layers[0].bias
            with packed_linears(other, rows=5, products=40): torch.testing.assert_close(other(x), packed_forward(x))
            torch.testing.assert_close(layers(x), plain)         # the end of the other block removed the shared copy
        layers[0].weight.mul_(2)
        assert torch.equal(packed_forward(x), layers[0](x)) and not torch.allclose(layers(x), plain)


@pytest.mark.skipif(not packs(), reason="this PyTorch packs no weights")
def test_packed_copies_lend_their_memory_and_nothing_else():
    "Each search packs again; old copies are freed by the next search, by a search in train mode, and with the model"
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(T.LlamaConfig(**WIDE)).eval()
    def search(m): return beam_search(m, PROMPTS, MASK, num_beams=4, **NO_END)
    def copies(m): return [weakref.ref(x) for x in packed._USED.get(m, [])]
    before, first = search(model), copies(model)
    assert len(first) == 8 and all(x() is not None for x in first) # two layers of four products
    for w in model.parameters(): w.data.neg_()                     # autograd does not notice
    after, second = search(model), copies(model)
    assert len(second) == 8 and all(x() is None for x in first) and not packed._PACKED
    fresh = search(deepcopy(model))
    assert torch.equal(after.sequences, fresh.sequences) and torch.equal(after.scores, fresh.scores)
    assert not torch.equal(after.sequences, before.sequences)
    search(model.train())
    assert not copies(model) and model.training
    search(model.eval())
    third = copies(model)
    del model
    gc.collect()
    assert third and all(x() is None for x in third)


@pytest.mark.parametrize("bias", [False, True])
def test_neighbours_that_are_fed_alike_are_one_product(bias):
    class Neighbours(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = torch.nn.Linear(384, 384, bias=bias)
            self.k_proj, self.v_proj = (torch.nn.Linear(384, 96, bias=bias) for _ in range(2)) # grouped heads
    layers, x, other = Neighbours(), torch.randn(2, 5, 384), torch.randn(2, 5, 384)
    def products(q, k, v): return [layers.q_proj(q), layers.k_proj(k), layers.v_proj(v)]
    with torch.no_grad():
        for rows in ((x, x, x), (x, other, x), (other, x, x), (other, other, other)):
            plain = products(*rows)
            with packed_linears(layers, rows=10, products=40), Operations() as operations:
                assert {"forward" in vars(layer) for layer in layers.children()} == {packs()}
                for a, b in zip(products(*rows), plain): torch.testing.assert_close(a, b)
            assert sum("packed_linear" in name for name, _ in operations.seen) == packs()
            others = sum(name in ("aten::linear", "aten::addmm", "aten::mm") for name, _ in operations.seen)
            assert others == (sum(x is not rows[0] for x in rows) if packs() else 3)


def tensors(tree): return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Operations(TorchDispatchMode):
    "Every operation with the shapes of its inputs; separately, those that make Python wait for the device"
    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique")
    def __init__(self):
        super().__init__()
        self.seen, self.waits = [], []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shapes = tuple(tuple(x.shape) for x in tensors((args, kwargs)))
        self.seen.append((func.name(), shapes))
        if any(w in func.name() for w in self.WAITS): self.waits.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("call, how", [(beam_search, dict(num_beams=5)), (sample, dict(num_return_sequences=5))],
                         ids=["beams", "samples"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_static_steps_repeat_one_list_of_operations(name, call, how):
    "What a captured step needs: the same operations on the same shapes, and no waiting for the device between them"
    model, marks, operations = family(name), [], Operations()
    call(model, PROMPTS, MASK, **how, **NO_END)                  # probes are done
    hook = model.register_forward_pre_hook(lambda *_: marks.append((len(operations.seen), len(operations.waits))))
    how = how | dict(max_new_tokens=15, eos_token_id=1, pad_token_id=0)
    try:
        with operations: call(model, PROMPTS, MASK, static=True, **how)
    finally: hook.remove()
    between = [(operations.seen[a:b], w2 - w) for (a, w), (b, w2) in zip(marks[1:], marks[2:])]
    assert len(between) == 13
    quiet = [ops for ops, waits in between if not waits]
    assert len(quiet) == 12 and all(ops == quiet[0] for ops in quiet) # one check in between: has everything ended?


def test_attention_choice(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_attention("auto", cpu, torch.bfloat16) == "sdpa"
    assert choose_attention("eager", cpu, torch.float32) == "eager"
    with pytest.raises(ValueError, match=r"a CUDA device.*bfloat16.*flash-attn \(pip install 'bgrpo_nb\[gpu\]'\)"):
        choose_attention("flash_attention_2", cpu, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    for asked in ("auto", "flash_attention_2"):
        assert choose_attention(asked, gpu, torch.bfloat16) == "flash_attention_2"
    assert choose_attention("auto", gpu, torch.float32) == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(ValueError, match="compute capability 8.0"):
        choose_attention("flash_attention_2", gpu, torch.bfloat16)


EXPECTED = {
    "an attention function (transformers.integrations.sdpa_attention.sdpa_attention_forward)":
        ("module", "query", "key", "value", "attention_mask", "dropout", "scaling"),
    "Cache.__init__": ("self", "layers", "layer_class_to_replicate"),
    "Cache.update": ("self", "key_states", "value_states", "layer_idx", "args", "kwargs"),
    "DynamicLayer.update": ("self", "key_states", "value_states", "args", "kwargs"),
    "DynamicLayer.lazy_initialization": ("self", "key_states", "value_states"),
    "DynamicLayer.get_seq_length": ("self",),
    "sdpa_mask": ("batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask",
                  "local_size", "allow_is_causal_skip"),
    "AttentionInterface.register": ("key", "value"), "AttentionMaskInterface.register": ("key", "value"),
    "PreTrainedModel.set_attn_implementation": ("self", "attn_implementation")}


def test_transformers_still_has_the_interfaces_that_a_tree_uses():
    from transformers.cache_utils import Cache, DynamicLayer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    functions = (sdpa_attention_forward, Cache.__init__, Cache.update, DynamicLayer.update,
                 DynamicLayer.lazy_initialization, DynamicLayer.get_seq_length, sdpa_mask,
                 T.AttentionInterface.register, AttentionMaskInterface.register,
                 T.PreTrainedModel.set_attn_implementation)
    for (name, expected), function in zip(EXPECTED.items(), functions, strict=True):
        parameters = tuple(inspect.signature(function).parameters)[:len(expected)]
        assert parameters == expected, (
            f"transformers {T.__version__} changed {name}: its parameters begin {parameters}, 02a_beam_tree expects "
            f"{expected}; read TreeCache, _TreeLayer, tree_attention and _whole_mask again")


def test_transformers_still_calls_them_as_a_tree_expects():
    seen = {}
    def attention(module, query, key, value, attention_mask, **kwargs):
        seen.update(query=query.shape, key=key.shape, mask=attention_mask, kwargs=set(kwargs))
        return query.transpose(1, 2).contiguous(), None
    T.AttentionInterface.register("spy", attention)
    model, before = family("llama"), family("llama").config._attn_implementation
    model.set_attn_implementation("spy")
    mask = torch.zeros(1, 1, 3, 3)
    try:
        positions = torch.zeros(1, 3, dtype=torch.long)
        with torch.no_grad(): model(torch.tensor([[1, 2, 3]]), attention_mask=mask, position_ids=positions)
    finally: model.set_attn_implementation(before)
    changed = f"transformers {T.__version__} changed"
    layout = f"{changed} the layout of queries and keys: not (B, H, Q, D) and (B, H_kv, N, D)"
    assert seen["query"] == (1, 4, 3, 8) and seen["key"] == (1, 2, 3, 8), layout
    found = seen["mask"]
    assert found is not None and torch.equal(found, mask), f"{changed} how a 4-D mask reaches attention"
    assert "scaling" in seen["kwargs"], f"{changed} the keywords of attention: {seen['kwargs']} has no scaling"


def test_a_model_in_train_mode_is_probed_as_it_searches():
    "Under gradient checkpointing train mode has no cache; the answer of the probe would be kept"
    from bgrpo_nb.policy.model import new_model
    model = new_model("tiny", seed=5)
    model.gradient_checkpointing_enable()
    model.train()
    model.lm_head.eval()                                    # a module with a mode of its own keeps it
    assert why_no_tree(model, 20) is None
    assert model.training and model.model.training and not model.lm_head.training


CASTS = ("aten::_to_copy", "aten::copy_", "aten::to.dtype")


class WeightCasts(TorchDispatchMode):
    "Every operation that makes or fills a tensor of another dtype from a weight"
    def __init__(self, model):
        super().__init__()
        self.weights, self.seen = {x.untyped_storage().data_ptr() for x in model.parameters() if x.ndim > 1}, []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.name().startswith(CASTS):
            x = args[1] if func.name().startswith("aten::copy_") else args[0]
            if x.untyped_storage().data_ptr() in self.weights and x.dtype != out.dtype: self.seen.append(func.name())
        return out


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2"])
def test_under_autocast_weights_are_cast_once_a_search(name, static, monkeypatch):
    "For beams, greedy and samples: each weight of a product once, and none inside of a step; values are autocast's"
    model = under_autocast(deepcopy(family(name)))
    products = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, T.pytorch_utils.Conv1D))]
    for call, how in ((beam_search, dict(num_beams=4)), (greedy, {}), (sample, dict(num_return_sequences=4))):
        def search():
            if call is sample: how.update(generator=torch.Generator().manual_seed(0))
            return call(model, PROMPTS, MASK, static=static, **how, **NO_END)
        with monkeypatch.context() as patched:
            patched.setattr(packed, "_cast_once", lambda layer, otherwise, copies: otherwise)
            with WeightCasts(model) as casts: slow = search()
            assert len(casts.seen) >= 8 * len(products)          # each weight at each token: this is what is saved
        marks = []
        with WeightCasts(model) as casts:
            hook = model.register_forward_pre_hook(lambda *_: marks.append(len(casts.seen)))
            fast = search()
            hook.remove()
        assert len(casts.seen) == len(products) and marks[0] == 0 and set(marks[1:]) == {len(products)}
        assert torch.equal(fast.sequences, slow.sequences)
        assert torch.allclose(fast.scores, slow.scores, atol=1e-5)
        assert not any("forward" in vars(m) for m in products)


def under_autocast(model, device="cpu"):
    "As a trainer has it: autocast is on inside of the forward only"
    plain = model.forward
    @wraps(plain)
    def forward(*args, **kwargs):
        with torch.autocast(device, dtype=torch.bfloat16): out = plain(*args, **kwargs)
        out.logits = out.logits.float()
        return out
    model.forward = forward
    return model


def test_the_first_search_of_a_process_leaves_random_numbers_alone():
    "What is tried once a process would shift the samples of a training that continues in a new one"
    code = """
import torch
from bgrpo_nb import beam_search, greedy, load_model, load_tokenizer, trie_logps
model, end = load_model("tiny", device="cpu"), dict(eos_token_id=1, pad_token_id=0)
ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
for search in (lambda: beam_search(model, ids, num_beams=3, max_new_tokens=9, **end),
               lambda: greedy(model, ids, max_new_tokens=9, **end), lambda: trie_logps(model, ids, ids > 0, 2)):
    before = torch.get_rng_state()
    search()
    assert torch.equal(before, torch.get_rng_state())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_adapters_that_the_text_switches_on_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[6])
    model = peft.get_peft_model(deepcopy(family("llama")), config)
    for search in (beam_search, greedy, sample):
        with pytest.raises(ValueError, match="activated LoRA.*use plain LoRA"): search(model, PROMPTS, MASK, **NO_END)


def test_an_end_that_cannot_be_written_and_padding_that_is_missing_are_refused():
    model, how = family("llama"), dict(num_beams=2, max_new_tokens=3)
    with pytest.raises(ValueError, match="pad_token_id is missing; give tokenizer.pad_token_id"):
        beam_search(model, PROMPTS, MASK, eos_token_id=1, pad_token_id=None, **how)
    with pytest.raises(ValueError, match=rf"eos_token_id=\[{V}\] is outside of the model's {V} tokens"):
        beam_search(model, PROMPTS, MASK, eos_token_id=V, pad_token_id=0, **how)
    found = [beam_search(model, PROMPTS, MASK, eos_token_id=ends, pad_token_id=0, **how).sequences
             for ends in (1, [1], torch.tensor(1), torch.tensor([1]), [1, V])]
    for other in found[1:]: assert torch.equal(found[0], other)
