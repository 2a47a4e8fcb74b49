"Too little memory, acted out: a model that raises torch.OutOfMemoryError above a number of rows, and in its backward."
import warnings
from copy import deepcopy

import pytest
import torch
import transformers as T
from datasets import Dataset

from bgrpo_nb.learn.config import BGRPOConfig
from bgrpo_nb.learn.trainer import BGRPOTrainer
from bgrpo_nb.policy.model import load_tokenizer, new_model
from bgrpo_nb.search import captured, generation, memory
from bgrpo_nb.search.beam_rows import why_no_cache
from bgrpo_nb.search.beam_tree import why_no_tree
from bgrpo_nb.search.captured import release_graphs
from bgrpo_nb.search.generation import beam_search, greedy, sample
from bgrpo_nb.search.memory import AddedOnce, in_parts, is_out_of_memory
from test_generation import MASK, PROMPTS, family, padded

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT_ROWS = padded([[5, 3, 8], [7, 2], [6, 6, 3, 1], [9], [2, 4, 4]])
HOW = dict(max_new_tokens=9, eos_token_id=[1, 4], pad_token_id=0)


@pytest.fixture(autouse=True)
def nothing_told(): memory._TOLD.clear()


def limited(model, most, rows=lambda ids: len(ids)): # prompts in a forward
    "A copy whose forward fails above a number of rows; and the sizes that it was called with"
    model, sizes = deepcopy(model), []
    assert why_no_tree(model, 20) is None                         # probed before
    def check(module, args, kwargs):
        sizes.append(rows(kwargs["input_ids"] if "input_ids" in kwargs else args[0]))
        if sizes[-1] > most: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
    model.register_forward_pre_hook(check, with_kwargs=True)
    return model, sizes


@pytest.mark.parametrize("most", [1, 2, 3, 4])
@pytest.mark.parametrize("static", [None, True])
def test_a_search_is_halved_and_finds_the_same(most, static):
    ids, mask = PROMPT_ROWS
    plain = family("llama")
    model, sizes = limited(plain, most)
    for call, how in ((beam_search, dict(num_beams=4)), (greedy, {})):
        with pytest.warns(UserWarning, match="prompts at once.*lower prompts_at_once in training, or batch_size") as caught:
            memory._TOLD.clear()
            found = call(model, ids, mask, static=static, **how, **HOW)
        assert len(caught) == 1
        expected = call(plain, ids, mask, static=static, **how, **HOW)
        assert torch.equal(found.sequences, expected.sequences) and torch.equal(found.lengths, expected.lengths)
        torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=0)
        sizes.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(model, ids, mask, static=static, **how, **HOW)
        assert max(sizes) <= most                                 # the size that fits is remembered


def test_samples_of_a_halved_search_are_those_of_its_halves():
    "A failed try draws nothing; the parts draw one after the other, so a seed gives the same each time"
    ids, mask = PROMPT_ROWS
    for generator in (torch.Generator(), None):
        def seed(): return generator.manual_seed(1) if generator else torch.manual_seed(1) and None
        def draw(m, rows): return sample(m, ids[rows], mask[rows], num_return_sequences=3, generator=generator, **HOW)
        model, calls = deepcopy(family("llama")), []
        def late(module, args): # in the third forward, after numbers have been drawn
            calls.append(1)
            if len(calls) == 3: raise torch.OutOfMemoryError("CUDA out of memory. ")
        greedy(model, ids[:1], mask[:1], **HOW)
        model.lm_head.register_forward_pre_hook(late)
        seed()
        with pytest.warns(UserWarning, match="out of memory"): found = draw(model, slice(None))
        seed()
        halves = [draw(family("llama"), slice(a, a + 2)) for a in (0, 2, 4)]
        for b in range(5):
            part, row = halves[b // 2], b % 2
            assert torch.equal(found.lengths[b], part.lengths[row])
            for k, n in enumerate(found.lengths[b].tolist()):
                assert torch.equal(found.sequences[b, k, :n], part.sequences[row, k, :n])
        memory._TOLD.clear()


SHORTAGES = [torch.OutOfMemoryError("CUDA out of memory. "), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"),
             RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]


@pytest.mark.parametrize("shortage", SHORTAGES, ids=lambda e: str(e)[:30])
@pytest.mark.parametrize("why_not", [why_no_tree, why_no_cache])
def test_a_probe_that_runs_out_of_memory_says_nothing_about_the_model(why_not, shortage):
    model, calls = deepcopy(family("llama")), []
    def once(module, args, kwargs):
        calls.append(1)
        if len(calls) == 1: raise shortage
    model.register_forward_pre_hook(once, with_kwargs=True)
    with pytest.raises(RuntimeError, match="(?i)memory|ALLOC_FAILED") as caught: why_not(model, 20)
    assert caught.value is shortage and why_not(model, 20) is None


@pytest.mark.parametrize("shortage", SHORTAGES, ids=lambda e: str(e)[:30])
def test_a_recording_that_runs_out_of_memory_is_tried_again(stage, monkeypatch, shortage):
    model, record, fails = deepcopy(family("llama")), captured._record, [shortage]
    def short_of_memory(*args):
        if fails: raise fails.pop()
        return record(*args)
    monkeypatch.setattr(captured, "_record", short_of_memory)
    with pytest.warns(UserWarning, match="lower .* for good"):
        found = beam_search(model, PROMPTS, MASK, num_beams=2, **HOW)
    plain = beam_search(model, PROMPTS, MASK, num_beams=2, static=True, **HOW)
    assert torch.equal(found.sequences, plain.sequences) and stage.replays


def test_what_cannot_be_halved_says_so_in_one_line():
    model, _ = limited(family("llama"), 0)
    with pytest.raises(torch.OutOfMemoryError, match="not even one of the prompts.*lower num_beams") as caught:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            beam_search(model, *PROMPT_ROWS, num_beams=3, **HOW)
    assert is_out_of_memory(caught.value) and not is_out_of_memory(RuntimeError("another"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    with pytest.raises(RuntimeError, match="another"):
        in_parts(lambda part: (_ for _ in ()).throw(RuntimeError("another")), 4, "a", "b", "c", {}, 0)


def test_one_prompt_that_does_not_fit_with_static_shapes_is_searched_without(stage, monkeypatch):
    "On a device; a tree that grows as it needs has room for a few steps only"
    plain, find, forms = family("llama"), generation._find, []
    def check(*args):
        forms.append((len(args[1]), args[-1]))
        if args[-1] is None: raise torch.OutOfMemoryError("CUDA out of memory. ")
        return find(*args)
    monkeypatch.setattr(generation, "_find", check)
    with pytest.warns(UserWarning, match="prompts at once"), pytest.warns(UserWarning, match="without static shapes"):
        found = beam_search(plain, PROMPTS, MASK, num_beams=3, **HOW)
    assert forms == [(2, None), (1, None), (1, False), (1, None), (1, False)]
    monkeypatch.undo()
    expected = beam_search(plain, PROMPTS, MASK, num_beams=3, static=False, **HOW)
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.cuda
def test_on_a_device_a_search_that_does_not_fit_is_halved():
    "Half a gibibyte is left to this process; a search of all prompts wants more"
    torch.manual_seed(0)
    shape = dict(vocab_size=50_000, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    model = T.LlamaForCausalLM(T.LlamaConfig(**shape, eos_token_id=None)).cuda().eval()
    ids, how = torch.randint(1, 50_000, (64, 8), device="cuda"), dict(eos_token_id=None, pad_token_id=0)
    expected = [beam_search(model, part, num_beams=25, max_new_tokens=9, **how) for part in ids.split(8)]
    release_graphs()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**29) / total)
    try:
        with pytest.warns(UserWarning, match="prompts at once"):
            found = beam_search(model, ids, num_beams=25, max_new_tokens=9, **how)
    finally: torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(found.scores, torch.cat([part.scores for part in expected]), atol=1e-3, rtol=0)


def test_parts_are_in_order_and_sizes_are_kept():
    calls, limits = [], {}
    def run(part):
        calls.append(part.stop - part.start)
        if part.stop - part.start > 3: raise torch.OutOfMemoryError("CUDA out of memory. ")
        return list(range(part.start, part.stop))
    with pytest.warns(UserWarning) as caught: found = in_parts(run, 11, "things", "some_setting", "x", limits, "k")
    assert sum(found, []) == list(range(11)) and calls == [11, 5, 2, 2, 2, 2, 2, 1] and limits == {"k": 2}
    assert len(caught) == 1 and "11 things at once: there are 5" in str(caught[0].message)
    last = in_parts(lambda part: run(slice(0, 9)), 1, "things", "s", "w", {}, "k", lambda part: "other way")
    assert last == ["other way"]


def test_gradients_of_a_failed_backward_are_not_counted_twice():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
    x, fails = torch.randn(3, 4), []
    def loss():
        y = layers[:2](x)
        if fails: y.register_hook(lambda g: fails.pop() and (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. ")))
        return layers[2:](y).square().sum()
    loss().backward()                                             # an earlier micro-batch
    loss().backward()
    expected = [p.grad.clone() for p in layers.parameters()]
    layers.zero_grad()
    loss().backward()
    fails += [1, 1]                                               # fails twice, in the middle
    with AddedOnce(layers.parameters()) as gradients:
        for _ in range(3):
            try: loss().backward()
            except torch.OutOfMemoryError: gradients.set_aside()
    assert not fails
    for p, g in zip(layers.parameters(), expected): torch.testing.assert_close(p.grad, g)


def run(folder, wrap=lambda model, trainer: None, rollout="beam", **more):
    "Two optimizer steps of two micro-batches; the trainer, its weights before each, and what it logged"
    torch.manual_seed(0)
    tokenizer = load_tokenizer("single")
    settings = dict(rollout=rollout, num_generations=4, per_device_train_batch_size=8, gradient_accumulation_steps=2,
                    max_completion_length=6, max_steps=2, learning_rate=1e-3, logging_steps=1, report_to="none",
                    output_dir=str(folder), use_cpu=True, save_strategy="no", bf16=False, seed=3) | more
    def reward(completion_ids, **kwargs): return [float(sum(ids) % 7) for ids in completion_ids]
    prompts = Dataset.from_dict({"prompt": ["P 1 a + P 2", "N 3 b", "* a b", "P 4"] * 4})
    trainer = BGRPOTrainer(new_model("tiny", seed=5), reward, BGRPOConfig(**settings), prompts, processing_class=tokenizer)
    wrap(trainer.model, trainer)
    trainer.train()
    return trainer


def logged(trainer):
    skip = ("time", "runtime", "per_second", "flos")
    return [{k: v for k, v in row.items() if not any(s in k for s in skip)} for row in trainer.state.log_history]


def in_training(model, trainer, most):
    "Forwards with gradients fail above a number of rows"
    plain = trainer._logps
    def check(model, input_ids, *more, **kwargs):
        if torch.is_grad_enabled() and len(input_ids) > most: raise torch.OutOfMemoryError("CUDA out of memory. ")
        return plain(model, input_ids, *more, **kwargs)
    trainer._logps = check


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rollout", ["beam", "sample"])
def test_a_step_in_parts_is_the_same_step(tmp_path, rollout):
    whole = run(tmp_path / "a", rollout=rollout)
    halves = run(tmp_path / "b", lambda m, t: in_training(m, t, 4), rollout=rollout)
    backward = run(tmp_path / "c", fail_in_backward, rollout=rollout)
    assert halves._fit == {"rows": 4} and backward._fit == {"rows": 4} and not whole._fit
    for other in (halves, backward):
        for (name, a), b in zip(whole.model.named_parameters(), other.model.parameters()):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4, msg=name)
        for a, b in zip(logged(whole), logged(other), strict=True): assert a == pytest.approx(b, abs=1e-4, nan_ok=True)


def fail_in_backward(model, trainer):
    "Once, in the second micro-batch, when the last layers have their gradients already"
    calls = []
    def late(gradient):
        calls.append(1)
        if len(calls) == 2: raise torch.OutOfMemoryError("CUDA out of memory. ")
        return gradient
    def hook(module, args, out):
        hidden = out[0] if isinstance(out, tuple) else out
        if hidden.requires_grad: hidden.register_hook(late)
    model.model.layers[0].register_forward_hook(hook)


@pytest.mark.filterwarnings("ignore")
def test_a_step_that_never_fits_ends_with_one_message_and_keeps_the_checkpoint(tmp_path):
    def wrap(model, trainer):
        plain = trainer._logps
        def check(*args, **kwargs):
            if torch.is_grad_enabled() and trainer.state.global_step == 1: raise torch.OutOfMemoryError("CUDA out of memory. ")
            return plain(*args, **kwargs)
        trainer._logps = check
    with pytest.raises(torch.OutOfMemoryError, match="not even one of the rows.*lower per_device_train_batch_size"):
        run(tmp_path, wrap, save_strategy="steps", save_steps=1)
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()


@pytest.mark.filterwarnings("error:.*captured step")
@pytest.mark.parametrize("free", [0, 2**40], ids=["little", "plenty"])
@pytest.mark.parametrize("more", [dict(), dict(rollout="sample"), dict(gradient_checkpointing=False, bf16=True)])
def test_training_is_captured_without_a_flag_and_gives_the_memory_back(tmp_path, stage, monkeypatch, more, free):
    "Before each optimizer step nothing is kept where memory is short; the next search sees the weights that it writes"
    kept, seen = [], []
    monkeypatch.setattr(captured, "_free_bytes", lambda device: free)
    def wrap(model, trainer):
        plain, order = trainer._logps, trainer._generate_and_score_completions
        def look(*args, **kwargs):
            kept.append(len(captured._GRAPHS))
            return plain(*args, **kwargs)
        def note(*args):
            found = order(*args)
            seen.append(found["completion_ids"])
            return found
        trainer._logps, trainer._generate_and_score_completions = look, note
    run(tmp_path / "a", wrap, max_completion_length=9, **more)
    assert len(stage.tapes) == (1 if free else 2) and stage.replays > 4 and kept
    assert all(kept) if free else not any(kept)
    fast, choose = list(seen), generation.choose_form
    seen.clear()
    generation.choose_form = lambda asked, device, *others: choose(True, device, *others)
    try: run(tmp_path / "b", wrap, max_completion_length=9, **more)
    finally: generation.choose_form = choose
    for a, b in zip(fast, seen, strict=True): assert torch.equal(a, b)


@pytest.mark.filterwarnings("error:.*captured step")
def test_evaluations_are_captured_without_a_flag(stage):
    from bgrpo_nb.algebra.problems import generate_problems
    from bgrpo_nb.solve.beam_filter import search_problems
    from bgrpo_nb.solve.evaluation import evaluate
    model, tokenizer, problems = new_model("tiny", seed=5), load_tokenizer("single"), generate_problems(3, 2, 2)
    evaluate(model, tokenizer, problems, num_beams=2, wide_beams=3, num_samples=2, max_new_tokens=12)
    assert len(stage.tapes) == 4                                  # greedy, two widths, samples
    found = search_problems(model, tokenizer, problems, num_beams=3, max_new_tokens=12)
    assert len(stage.tapes) == 4 and len(found) == 3              # with the recording of the evaluation


@pytest.mark.cuda
@pytest.mark.filterwarnings("error:.*captured step")
@pytest.mark.parametrize("free", [0, 2**40], ids=["little", "plenty"])
def test_on_a_device_training_is_captured_and_gives_the_memory_back(tmp_path, monkeypatch, free):
    "The second rollout records again where the graphs of the first are gone"
    release_graphs()
    recorded, record, kept = [], captured._record, []
    monkeypatch.setattr(captured, "_free_bytes", lambda device: free)
    monkeypatch.setattr(captured, "_record", lambda *args: recorded.append(1) or record(*args))
    def wrap(model, trainer):
        plain = trainer._logps
        def look(*args, **kwargs):
            kept.append(len(captured._GRAPHS))
            return plain(*args, **kwargs)
        trainer._logps = look
    run(tmp_path, wrap, max_completion_length=9, use_cpu=False, bf16=True)
    assert len(recorded) == (1 if free else 2) and kept
    assert all(kept) if free else not any(kept)
