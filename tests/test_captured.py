"Captured searches: the same results as without, in every kind of search, and no recorded step where it would be wrong."
import gc
import warnings
from copy import deepcopy

import pytest
import torch
import transformers as T

from bgrpo_nb.policy.model import load_tokenizer
from bgrpo_nb.search import captured, generation
from bgrpo_nb.search.allowed_sequences import AllowedSequences
from bgrpo_nb.search.captured import FEWEST_STEPS, Form, bucket, choose_form, release_graphs, why_not_recorded
from bgrpo_nb.search.constraints import Constraint
from bgrpo_nb.search.decoding import Decoding
from bgrpo_nb.search.generation import beam_search, greedy, sample
from bgrpo_nb.solve.grammar import PrefixGrammar
from test_generation import FAMILIES, GROUPED, MASK, PROMPTS, V, WeightCasts, family, padded, under_autocast

pytestmark = pytest.mark.usefixtures("one_thread")
ENDS = dict(eos_token_id=[1, 4], pad_token_id=0)
CPU = torch.device("cpu")
OTHERS = padded([[9, 3], [2, 2, 7, 12, 5, 5, 3, 6]]) # of a like shape
ROWS = [[2 + i % 7, 2 + i % 5, *([3] * (i % 11)), 12] for i in range(200)]


def seeded(): return torch.Generator().manual_seed(3)


def beams(model, ids, mask, C=20, **how): return beam_search(model, ids, mask, num_beams=6, max_new_tokens=C, **ENDS | how)


def best(model, ids, mask, C=20, **how): return greedy(model, ids, mask, max_new_tokens=C, **ENDS | how)


def samples(model, ids, mask, C=20, **how):
    return sample(model, ids, mask, num_return_sequences=5, max_new_tokens=C, generator=seeded(), temperature=0.8,
                  **ENDS | how)


SEARCHES = dict(beams=beams, greedy=best, samples=samples)


def same(found, expected, tolerance=0.0):
    assert torch.equal(found.sequences, expected.sequences) and torch.equal(found.lengths, expected.lengths)
    torch.testing.assert_close(found.scores, expected.scores, atol=tolerance, rtol=0)


def NO(): return None


@pytest.mark.parametrize("given, expected", [
    ((None, "cpu", 40, False, NO), Form("dynamic")), ((None, "cpu", 40, True, NO), Form("static")),
    ((None, "mps", 40, False, NO), Form("static")), ((None, "cuda", 40, False, NO), Form("captured")),
    ((None, "cuda", 40, False, lambda: "a reason"), Form("static", "a reason")),
    ((None, "cuda", FEWEST_STEPS - 1, False, lambda: 1 / 0), Form("static")),          # not even asked
    ((None, "cuda", FEWEST_STEPS, True, lambda: "a reason"), Form("static", "a reason")),
    ((True, "cuda", 40, False, lambda: 1 / 0), Form("static")), ((False, "cuda", 40, False, NO), Form("dynamic")),
    ((False, "cuda", 40, True, NO), Form("static")), ((True, "cpu", 40, False, NO), Form("static")),
    (("capture", "cuda", 2, False, NO), Form("captured"))])
def test_one_place_decides_the_form(given, expected): assert choose_form(*given) == expected


def test_forms_that_cannot_be():
    with pytest.raises(ValueError, match="CUDA"): choose_form("capture", "cpu", 40, False, NO)
    with pytest.raises(ValueError, match="not possible: a reason"): choose_form("capture", "cuda", 40, False, lambda: "a reason")
    with pytest.raises(ValueError, match="no form"): choose_form("captured", "cuda", 40, False, NO)
    for call in SEARCHES.values():
        with pytest.raises(ValueError, match="CUDA"): call(family("gpt2"), PROMPTS, MASK, static="capture")


def test_buckets_waste_at_most_a_quarter():
    found = [bucket(n) for n in range(1, 5000)]
    assert found == sorted(found) and all(b % 8 == 0 and n <= b for n, b in enumerate(found, 1))
    assert all(b <= 1.25 * n for n, b in enumerate(found, 1) if n >= 32) and len(set(found)) < 40
    assert [bucket(n) for n in (40, 250, 512, 2048)] == [40, 256, 512, 2048]


@pytest.mark.parametrize("kind", SEARCHES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "qwen3", "opt", "phi"])
def test_the_results_of_a_captured_search(stage, name, kind):
    "By default, and for other prompts, lengths and seeds of a like shape with the same recording"
    model, search = family(name), SEARCHES[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for (ids, mask), C in ((PROMPTS, MASK), 20), (OTHERS, 23), ((PROMPTS, MASK), 18):
            same(search(model, ids, mask, C), search(model, ids, mask, C, static=True), 1e-5)
    assert len(stage.tapes) == 1 and len(stage.tapes[0].tape) > 50 and stage.replays > 15


def test_samples_are_those_that_torch_draws(monkeypatch):
    "The numbers are drawn beforehand, in the order of torch.multinomial"
    seen, model = [], family("llama")
    def note(ids, scores):
        seen.append((scores / 0.8).softmax(-1))
        return scores
    found = samples(model, PROMPTS, MASK, eos_token_id=None, logits_processor=note)
    generator = seeded()
    drawn = torch.stack([torch.multinomial(chances, 1, generator=generator).view(2, 5) for chances in seen], -1)
    assert torch.equal(found.sequences, drawn)
    same(samples(model, PROMPTS, MASK, eos_token_id=None, static=True), found, 1e-5)


def test_chances_that_are_not_numbers_are_an_error(stage):
    def nothing(ids, scores): return scores.fill_(-torch.inf)
    nothing.scores_alone = True
    for static in (None, True, False):
        with pytest.raises(ValueError, match="not numbers"):
            samples(family("llama"), PROMPTS, MASK, logits_processor=nothing, static=static)


def everything(static):
    "One of each, under constraints and processors"
    rows = AllowedSequences.from_ids(ROWS, end=1)
    keep = torch.rand(2, rows.nodes, generator=torch.Generator().manual_seed(2)) < 0.5
    shared = AllowedSequences.from_ids(ROWS, end=1, renormalize=True)
    top = T.LogitsProcessorList([T.TemperatureLogitsWarper(0.9), T.TopPLogitsWarper(0.9), T.TopKLogitsWarper(4)])
    for constraint in (rows, rows.restricted(keep), shared):
        for search in SEARCHES.values():
            yield lambda model, ids, mask: search(model, ids, mask, constraint=constraint, static=static, eos_token_id=1)
    for search in (beams, samples):
        yield lambda model, ids, mask: search(model, ids, mask, logits_processor=top, static=static)


def test_constraints_and_processors_are_captured(stage):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ids, mask in ((PROMPTS, MASK), OTHERS):
            for fast, slow in zip(everything(None), everything(True)):
                same(fast(family("llama"), ids, mask), slow(family("llama"), ids, mask), 1e-5)
    assert len(stage.tapes) > 10 and stage.replays > 80


def test_a_grammar_is_captured(stage):
    tokenizer = load_tokenizer("single")
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(T.LlamaConfig(**dict(GROUPED, vocab_size=len(tokenizer)))).eval()
    grammar, how = PrefixGrammar(tokenizer), dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    for search in SEARCHES.values():
        for ids in (torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9, 6, 4, 4, 4]])):
            fast, slow = (search(model, ids, None, constraint=grammar, static=s, **how) for s in (None, True))
            same(fast, slow, 1e-5)
    assert len(stage.tapes) == 3


def test_memory_is_bounded_and_given_back(stage, monkeypatch):
    model = deepcopy(family("llama"))
    def kept(): return [r.search.asked.K for r in sorted(captured._GRAPHS[model].values(), key=lambda r: r.turn)]
    def search(K): beam_search(model, PROMPTS, MASK, num_beams=K, max_new_tokens=12, **ENDS)
    for K in (1, 2, 3, 4): search(K)
    search(1)                                                    # used again, so 2 is the oldest
    search(5)
    assert kept() == [3, 4, 1, 5] and len(stage.tapes) == 5
    search(2)
    assert kept() == [4, 1, 5, 2] and len(stage.tapes) == 6
    sizes = {r.search.asked.K: captured._bytes(r) for r in captured._GRAPHS[model].values()}
    assert sizes[1] < sizes[2] < sizes[4] < sizes[5]
    monkeypatch.setattr(captured, "_most_bytes", lambda device: sizes[5] + sizes[2] + 1)
    search(2)
    assert kept() == [5, 2]
    monkeypatch.setattr(captured, "_most_bytes", lambda device: 1)
    same(beams(model, PROMPTS, MASK), beams(model, PROMPTS, MASK, static=True), 1e-5)
    assert not kept()                                            # too large to keep, and found all the same
    monkeypatch.setattr(captured, "_most_bytes", lambda device: 2**40)
    search(2)
    assert kept() == [2]
    with monkeypatch.context() as shared:
        shared.setattr(captured, "_shared_bytes", lambda device: 2**50 if captured._GRAPHS else 0)
        search(3)
    assert not kept()                                            # nor what graphs work in
    search(2)
    monkeypatch.setattr(captured, "_most_bytes", lambda device: 1)
    captured._limit(torch.device("cuda:1"))                      # each device has its own share
    assert kept() == [2]
    captured._limit(torch.device("cpu"))
    assert not kept()
    monkeypatch.setattr(captured, "_most_bytes", lambda device: 2**40)
    search(2)
    assert kept() == [2]
    release_graphs()
    assert not captured._GRAPHS and not captured._COPIES


def test_recordings_go_with_their_model(stage):
    model = deepcopy(family("llama"))
    beams(model, PROMPTS, MASK)
    assert len(captured._GRAPHS) == 1
    assert not any(m is model for r in captured._GRAPHS[model].values() for m in gc.get_referents(r.search.tree))
    stage.tapes.clear()
    del model
    gc.collect()
    assert not len(captured._GRAPHS)


def test_recordings_outlive_training_settings_and_precision_may_be_set_in_any_way(stage):
    "TRL switches gradient checkpointing off and on around each rollout; Transformers sets tf32 by PyTorch's new names"
    model = deepcopy(family("llama"))
    for _ in range(3):
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        model.gradient_checkpointing_disable()
        beams(model, PROMPTS, MASK)
    assert len(stage.tapes) == 1 and len(captured._FOUND[model]) == 1
    before = torch.backends.fp32_precision
    torch.backends.fp32_precision = "tf32"
    try: beams(model, PROMPTS, MASK)
    finally: torch.backends.fp32_precision = before
    assert len(stage.tapes) == 2


def test_a_search_that_fails_leaves_no_recording(stage):
    model, calls = family("llama"), []
    class Breaks(AllowedSequences):
        def advance(self, state, tokens):
            calls.append(1)
            if len(calls) == 3: raise ZeroDivisionError
            return super().advance(state, tokens)
    with pytest.raises(ZeroDivisionError): beams(model, PROMPTS, MASK, constraint=Breaks.from_ids(ROWS, end=1), eos_token_id=1)
    assert not captured._GRAPHS[model]


def changes():
    "What may happen to a model between two searches"
    def step(m):
        for x in m.parameters(): x.data.mul_(1.05)
    def replaced(m): m.lm_head.weight = torch.nn.Parameter(m.lm_head.weight.data * 1.3)
    def data_replaced(m): m.lm_head.weight.data = m.lm_head.weight.data * 1.3
    def resized(m): m.resize_token_embeddings(V + 3)
    def other_type(m): m.bfloat16()
    def scaled(m): m.model.layers[0].self_attn.scaling *= 3
    def forward(m):
        plain = m.model.layers[0].mlp.forward
        m.model.layers[0].mlp.forward = lambda x: plain(x) * 3
    return dict(step=step, replaced=replaced, data_replaced=data_replaced, resized=resized, other_type=other_type,
                scaled=scaled, forward=forward)


@pytest.mark.parametrize("change", changes())
def test_a_stale_recording_is_never_replayed(stage, change):
    "Weights that are updated in place are seen by the recording; all else needs another one"
    torch.manual_seed(0)
    model = T.LlamaForCausalLM(T.LlamaConfig(**GROUPED)).eval()
    before = beams(model, PROMPTS, MASK)
    with torch.no_grad(): changes()[change](model)
    for search in (beams, beams):
        after = search(model, PROMPTS, MASK)
        same(after, search(model, PROMPTS, MASK, static=True), 1e-5 if change != "other_type" else 0.05)
    assert not torch.equal(after.scores, before.scores)
    assert len(stage.tapes) == (1 if change == "step" else 2)
    stale = change in ("replaced", "data_replaced", "resized", "other_type")
    assert len(captured._GRAPHS[model]) == (1 if stale or change == "step" else 2)


def test_adapters_are_part_of_what_was_recorded(stage):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(deepcopy(family("llama")), config, adapter_name="one").eval()
    model.add_adapter("two", config)
    for name, x in model.named_parameters():
        if "lora_" in name: torch.nn.init.normal_(x, std=0.4)
    def check(): # one search after the other, the second by the recording
        for _ in range(2):
            found = beams(model, PROMPTS, MASK)
            same(found, beams(model, PROMPTS, MASK, static=True), 1e-5)
        return found.scores
    one = check()
    model.set_adapter("two")
    two = check()
    with model.disable_adapter(): none = check()
    model.set_adapter("one")
    assert torch.equal(check(), one) and not torch.equal(one, two) and not torch.equal(one, none)
    for layer in model.modules():
        if hasattr(layer, "scaling") and isinstance(layer.scaling, dict): layer.scaling["one"] *= 2
    assert not torch.equal(check(), one)


class Watched(Constraint):
    "Allows everything, by code of the given kind"
    def __init__(self, how): self.how, self.calls, self.table = how, 0, torch.ones(V, dtype=torch.bool)
    def start(self, rows): return torch.zeros(rows, dtype=torch.long, device=self.table.device)
    def advance(self, state, tokens):
        self.calls += 1
        if self.how == "number": return state * 0 + self.calls          # a number of Python's
        if self.how == "waits": return state * int(state.max() >= 0)
        if self.how == "mask": return state.index_put((state < 0,), state[:1, 0].sum())
        if self.how == "same": return state if torch.equal(state, state) else tokens
        if self.how == "list": return state + torch.tensor([0] * state.shape[-1], device=state.device)
        if self.how == "memory":
            self.__dict__.pop("kept", None)
            return state + self.shared[:1]
        return state
    def allowed(self, state, V): return self.table.expand(*state.shape, V)


@pytest.mark.parametrize("how, reason", [
    ("number", "its steps are not alike"), ("waits", "waits for the device"),
    ("mask", "waits for the device"), ("same", "waits for the device"), ("list", "from Python's numbers"),
    ("memory", "memory that may be gone"), ("pure", None)])
def test_a_step_that_a_recording_would_get_wrong_is_found(stage, how, reason):
    model, constraint = family("llama"), Watched(how)
    Watched.shared = torch.zeros(1, dtype=torch.long)             # not the constraint's own
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for ids, mask in ((PROMPTS, MASK), OTHERS):
            same(beams(model, ids, mask, constraint=constraint), beams(model, ids, mask, static=True), 1e-5)
    assert bool(stage.tapes) == (reason is None)
    messages = [str(w.message) for w in caught if "captured step" in str(w.message)]
    assert len(messages) == (reason is not None)                  # once for both searches
    if not reason: return
    assert reason in messages[0] and "LlamaForCausalLM is searched without a captured step" in messages[0]
    for _ in range(2):                                            # who insists gets an error, the first time too
        captured._FOUND.clear()
        with pytest.raises(ValueError, match=f"not possible: .*{reason}"):
            beams(model, PROMPTS, MASK, constraint=constraint, static="capture")


def test_a_recording_that_fails_is_not_tried_again(stage, monkeypatch):
    tries = []
    def fails(advance, device):
        tries.append(1)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
    monkeypatch.setattr(captured, "_record", fails)
    with pytest.warns(UserWarning, match="could not be recorded.*not permitted") as caught:
        for _ in range(2): same(beams(family("gpt2"), PROMPTS, MASK), beams(family("gpt2"), PROMPTS, MASK, static=True), 1e-5)
    assert len(tries) == 1 and len(caught) == 1


def with_hook(model):
    model = deepcopy(model)
    model.lm_head.register_forward_hook(lambda *args: None)
    return model


def compiled(model):
    model = deepcopy(model)
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("how, wrap, reason", [
    (dict(logits_processor=T.RepetitionPenaltyLogitsProcessor(1.5)), None, "RepetitionPenaltyLogitsProcessor may read"),
    (dict(logits_processor=lambda ids, scores: scores), None, "may read texts"),
    (dict(stopping_criteria=T.MaxTimeCriteria(100.0)), None, "stopping criteria"),
    ({}, with_hook, "Linear has a forward hook"), ({}, compiled, "compiled")])
def test_what_forbids_a_recording_is_named_once(stage, how, wrap, reason):
    plain = family("llama")
    model = wrap(plain) if wrap else plain
    with pytest.warns(UserWarning, match=reason) as caught:
        for _ in range(2): same(beams(model, PROMPTS, MASK, **how), beams(plain, PROMPTS, MASK, static=True, **how), 1e-4)
    assert len([w for w in caught if "captured step" in str(w.message)]) == 1 and not stage.tapes
    with pytest.raises(ValueError, match=reason): beams(model, PROMPTS, MASK, static="capture", **how)


def test_a_constraint_among_the_processors_is_named():
    grammar = PrefixGrammar(load_tokenizer("single"), prompt_length=4)
    reason = why_not_recorded(family("llama"), CPU, [grammar], None, None)
    assert reason == "PrefixGrammar is a logits processor here; pass it as constraint="


def test_two_searches_at_once_have_a_recording_each(stage):
    "A search inside of another one, as two threads would have it"
    model, inner = family("llama"), []
    class Nested(Watched):
        def allowed(self, state, V):
            if not inner:
                inner.append(None)                                # before the inner search asks
                inner[0] = beams(model, PROMPTS, MASK, constraint=self)
            return super().allowed(state, V)
    nested = Nested("pure")
    outer = beams(model, PROMPTS, MASK, constraint=nested)
    same(outer, inner[0]), same(outer, beams(model, PROMPTS, MASK, static=True), 1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_captured_search_under_autocast_reads_copies_that_stay(stage, name):
    "Cast once a search and outside of the recorded step, at the same addresses; new weights are cast anew"
    model = under_autocast(deepcopy(family(name)))
    def search(**how): return beams(model, PROMPTS, MASK, **how)
    first = search()
    places = {copy.data_ptr() for pair in captured._COPIES[model].values() for copy in pair if copy is not None}
    with WeightCasts(model) as casts: same(search(), first)
    products = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, T.pytorch_utils.Conv1D))]
    assert len(casts.seen) == len(products) == len(captured._COPIES[model])  # refreshed before, none in the steps
    with torch.no_grad():
        for x in model.parameters(): x.mul_(1.1)
    again = search()
    assert not torch.equal(again.scores, first.scores) and len(stage.tapes) == 1
    same(again, search(static=True), 1e-5)
    assert {c.data_ptr() for pair in captured._COPIES[model].values() for c in pair if c is not None} == places
    with torch.autocast("cpu", dtype=torch.bfloat16): outside = search() # another region around it: another recording
    same(outside, again, 1e-5)
    assert len(stage.tapes) == 2


def on_device(name, **how):
    kind, shape = FAMILIES[name]
    torch.manual_seed(0)
    return T.AutoModelForCausalLM.from_config(kind(**shape), **how).eval().cuda()


@pytest.mark.cuda
@pytest.mark.parametrize("kind", SEARCHES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_on_a_device_searches_are_captured_by_default(name, kind, monkeypatch):
    "One graph for three searches of like shape; the same results as with static shapes, samples with the same seed too"
    release_graphs()
    model, recorded, record = on_device(name), [], captured._record
    monkeypatch.setattr(captured, "_record", lambda *args: recorded.append(1) or record(*args))
    monkeypatch.setitem(globals(), "seeded", lambda: torch.Generator("cuda").manual_seed(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for (ids, mask), C in ((PROMPTS, MASK), 20), (OTHERS, 23), ((PROMPTS, MASK), 18):
            found = SEARCHES[kind](model, ids.cuda(), mask.cuda(), C)
            same(found, SEARCHES[kind](model, ids.cuda(), mask.cuda(), C, static=True), 1e-3)
    assert len(recorded) == 1
    release_graphs()
    assert not captured._GRAPHS


@pytest.mark.cuda
def test_on_a_device_constraints_are_captured(monkeypatch):
    monkeypatch.setitem(globals(), "seeded", lambda: torch.Generator("cuda").manual_seed(3))
    model = on_device("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fast, slow in zip(everything(None), everything(True)):
            same(fast(model, PROMPTS.cuda(), MASK.cuda()), slow(model, PROMPTS.cuda(), MASK.cuda()), 1e-3)
    assert captured._GRAPHS[model]


@pytest.mark.cuda
def test_on_a_device_weights_are_cast_once_and_stale_graphs_are_not_replayed():
    model = under_autocast(on_device("llama"), "cuda")
    ids, mask = PROMPTS.cuda(), MASK.cuda()
    in_place = {name: change for name, change in changes().items() if name != "other_type"}
    for change in (None, *in_place.values()):
        if change is not None:
            with torch.no_grad(): change(model)
        for _ in range(2):
            found, expected = beams(model, ids, mask), beams(model, ids, mask, static=True)
            torch.testing.assert_close(found.scores, expected.scores, atol=0.5, rtol=0)  # bf16: beams may change places


@pytest.mark.cuda
def test_on_a_device_memory_is_given_back():
    model, ids = on_device("llama"), PROMPTS.cuda()
    beams(model, ids, MASK.cuda())
    release_graphs()                                              # what the first search leaves for all others stays
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    beam_search(model, ids, num_beams=256, max_new_tokens=40, **ENDS)
    kept = torch.cuda.memory_allocated() - before
    release_graphs()
    gc.collect()
    assert kept > 2**20 and torch.cuda.memory_allocated() - before < kept / 4


@pytest.mark.cuda
def test_on_a_device_graphs_are_recorded_after_all_of_them_are_gone():
    "Several times; by models that come and go, too"
    for _ in range(3):
        model = on_device("llama")
        for _ in range(2):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = beams(model, PROMPTS.cuda(), MASK.cuda())
            same(found, beams(model, PROMPTS.cuda(), MASK.cuda(), static=True), 1e-3)
            release_graphs()


@pytest.mark.cuda
def test_on_a_device_a_recording_that_fails_leaves_all_as_it_was():
    "The stream, the random numbers, and the recordings that come after it"
    release_graphs()
    stream, device = torch.cuda.current_stream(), torch.device("cuda", torch.cuda.current_device())
    def waits(): return torch.ones(3, device="cuda").sum().item()
    with pytest.raises(RuntimeError): captured._record(waits, device)
    assert torch.cuda.current_stream() == stream and torch.rand(3, device="cuda").isfinite().all()
    x = torch.zeros(3, device="cuda")
    replay = captured._record(lambda: x.add_(1), device)
    replay()
    torch.cuda.synchronize()
    assert x.tolist() == [1, 1, 1]


@pytest.mark.cuda
def test_on_a_device_waits_inside_of_operations_are_found():
    device = torch.device("cuda")
    counts = torch.tensor([1, 2], device=device)
    with captured._reported_waits(device) as waits: counts.repeat_interleave(counts)
    assert waits
    with captured._reported_waits(device) as waits: counts + 1
    assert not waits and torch.cuda.get_sync_debug_mode() == 0


@pytest.mark.cuda
def test_on_a_device_what_cannot_be_recorded_is_searched_all_the_same():
    model = on_device("llama")
    for how in ("number", "waits", "list", "memory"):
        Watched.shared, constraint = torch.zeros(1, dtype=torch.long, device="cuda"), Watched(how)
        with pytest.warns(UserWarning, match="captured step"):
            generation._WARNED.clear()
            found = beams(model, PROMPTS.cuda(), MASK.cuda(), constraint=constraint)
        same(found, beams(model, PROMPTS.cuda(), MASK.cuda(), static=True), 1e-3)


def attributes(monkeypatch):
    "State that is another tensor after each step"
    monkeypatch.setattr(Decoding, "_update", lambda self, **new: [setattr(self, name, x) for name, x in new.items()])


def number(monkeypatch):
    "The step as a number of Python's"
    write = Decoding.write
    def by_number(self, *args):
        self.column.fill_(self.step)
        return write(self, *args)
    monkeypatch.setattr(Decoding, "write", by_number)


@pytest.mark.parametrize("fault", [attributes, number])
@pytest.mark.parametrize("watched", [True, False])
def test_a_fault_in_the_search_itself_is_found(stage, monkeypatch, fault, watched):
    "By watching the first steps; and without that the acted-out replay gives other results, so it can fail"
    expected = beams(family("llama"), PROMPTS, MASK, static=True)
    fault(monkeypatch)
    if not watched: monkeypatch.setattr(captured.Recording, "_watch", lambda self, advance: self.watched.append(advance()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = beams(family("llama"), PROMPTS, MASK)
    assert bool(stage.tapes) == (not watched) and any("captured step" in str(w.message) for w in caught) == watched
    assert torch.equal(found.sequences, expected.sequences) == watched
