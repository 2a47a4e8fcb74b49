"Constraints: searches that can write nothing else, against `generate`, brute force and sets of tuples."
import os
from functools import lru_cache
from itertools import product

import numpy as np
import pytest
import torch
import transformers as T
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bgrpo_nb.policy.model import load_tokenizer
from bgrpo_nb.search.allowed_sequences import AllowedSequences
from bgrpo_nb.search.beam_tree import why_no_tree
from bgrpo_nb.search.constraints import Constraint
from bgrpo_nb.search.generation import beam_search, greedy, sample
from bgrpo_nb.solve.grammar import PrefixGrammar
from test_generation import FAMILIES, GROUPED, MASK, PROMPTS, Operations, V, as_lists, by_generate, family

PAD = dict(pad_token_id=0)
random = torch.Generator().manual_seed(0)
CATALOGUE = torch.randint(2, V, (40, 3), generator=random)
RAGGED = [[2], [2, 3], [2, 3, 4], [5, 6], [5, 7, 8, 9], [11], [12, 2, 2, 2], [3, 3], [3, 4], [3, 5]]


@lru_cache
def catalogue(renormalize=False): return AllowedSequences.from_ids(CATALOGUE, renormalize=renormalize)


@lru_cache
def ragged(renormalize=False): return AllowedSequences.from_ids(RAGGED, end=1, renormalize=renormalize)


def plain_processor(sequences, P, prompts=None):
    "Transformers' own, over a Python set; `prompts`: a set for each prompt"
    def of(rows):
        follow = {}
        for row in map(tuple, rows):
            for i, token in enumerate(row): follow.setdefault(row[:i], set()).add(token)
        return follow
    tries = [of(rows) for rows in prompts or [sequences]]
    def allowed(b, ids): return sorted(tries[b if prompts else 0].get(tuple(ids[P:].tolist()), {0}))
    return allowed


@torch.no_grad()
def scores_of(model, b, sequences, renormalize=False):
    "Score of every sequence after prompt b, by plain forwards and a Python set"
    text, rows = PROMPTS[b][MASK[b].bool()].tolist(), [tuple(x) for x in sequences]
    found = {}
    for row in set(rows):
        logits = model(torch.tensor([text + list(row)])).logits[0, len(text) - 1:-1].float()
        if renormalize:
            keep = torch.zeros_like(logits, dtype=torch.bool)
            for i in range(len(row)): keep[i, [x[i] for x in rows if len(x) > i and x[:i] == row[:i]]] = True
            logits = logits.masked_fill(~keep, -torch.inf)
        found[row] = logits.log_softmax(-1).gather(1, torch.tensor(row)[:, None]).sum().item()
    return sorted(found.items(), key=lambda x: -x[1])


def assert_found(beams, b, expected, tolerance=1e-4):
    found = as_lists(beams, b)
    assert [tuple(tokens) for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert max(abs(a - e) for (_, a), (_, e) in zip(found, expected)) < tolerance


# Searches

@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_beams_are_those_of_generate_with_its_own_processor(name, static):
    model, allowed = family(name), plain_processor(CATALOGUE.tolist(), 6)
    for K in (1, 4, 11):
        ours = beam_search(model, PROMPTS, MASK, num_beams=K, max_new_tokens=3, eos_token_id=None, static=static, **PAD,
                           constraint=catalogue())
        if K == 1:
            theirs = model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=3, do_sample=False,
                                    prefix_allowed_tokens_fn=allowed, **PAD)[:, 6:]
            assert torch.equal(ours.sequences[:, 0], theirs)
            continue
        sequences, scores = by_generate(model, PROMPTS, MASK, K, 3, prefix_allowed_tokens_fn=allowed)
        assert torch.equal(ours.sequences, sequences)
        torch.testing.assert_close(ours.scores, scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_a_wide_search_finds_the_whole_set_and_no_copies(name, static, renormalize):
    "Brute force: every sequence once, in the order of its score; further beams are empty"
    for constraint, rows, eos in ((catalogue(renormalize), CATALOGUE.tolist(), None),
                                  (ragged(renormalize), [x + [1] for x in RAGGED], [1, 10])):
        for K in (64, 12):
            found = beam_search(family(name), PROMPTS, MASK, num_beams=K, max_new_tokens=9, eos_token_id=eos,
                                static=static, constraint=constraint, **PAD)
            for b in range(2):
                expected = scores_of(family(name), b, rows, renormalize)
                if K == 64: assert_found(found, b, expected)
                else: assert {tuple(x) for x, _ in as_lists(found, b)} <= {x for x, _ in expected}


def test_the_probabilities_of_a_renormalised_set_add_up_to_one():
    for constraint, eos in ((catalogue(True), None), (ragged(True), 1)):
        found = beam_search(family("llama"), PROMPTS, MASK, num_beams=64, max_new_tokens=9, eos_token_id=eos, **PAD,
                            constraint=constraint)
        torch.testing.assert_close(found.scores.exp().sum(1), torch.ones(2))


def windowed():
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(T.MistralConfig(**dict(GROUPED, sliding_window=4))).eval()
    model.generation_config.eos_token_id = None
    assert why_no_tree(model, 9)
    return model


def test_over_rows_where_there_is_no_tree():
    model = windowed()
    found = beam_search(model, PROMPTS, MASK, num_beams=64, max_new_tokens=3, eos_token_id=None,
                        constraint=catalogue(), **PAD)
    for b in range(2): assert_found(found, b, scores_of(model, b, CATALOGUE.tolist()))


@pytest.mark.parametrize("static", [False, True])
def test_a_set_for_each_prompt(static):
    "Unseen items: other sets, other sizes, prompts that are done at different times; as `generate` and brute force"
    rows = sorted(set(map(tuple, CATALOGUE.tolist())))
    sets = [rows[:7], rows[5:]]
    whole = AllowedSequences.from_ids(rows)
    keep = torch.zeros(2, whole.nodes, dtype=torch.bool)
    for b, some in enumerate(sets): keep[b, whole.find(some)] = True
    own = whole.restricted(keep)
    how = dict(max_new_tokens=3, eos_token_id=None, static=static, **PAD)
    found = beam_search(family("llama"), PROMPTS, MASK, num_beams=50, constraint=own, **how)
    for b, some in enumerate(sets): assert_found(found, b, scores_of(family("llama"), b, some))
    narrow = beam_search(family("llama"), PROMPTS, MASK, num_beams=5, constraint=own, **how)
    sequences, scores = by_generate(family("llama"), PROMPTS, MASK, 5, 3,
                                    prefix_allowed_tokens_fn=plain_processor(None, 6, sets))
    assert torch.equal(narrow.sequences, sequences)
    torch.testing.assert_close(narrow.scores, scores, atol=1e-4, rtol=0)
    by_ours = by_generate(family("llama"), PROMPTS, MASK, 5, 3, logits_processor=[own.after(6)])
    assert torch.equal(by_ours[0], sequences)
    as_processor = beam_search(family("llama"), PROMPTS, MASK, num_beams=5, logits_processor=own.after(6), **how)
    assert torch.equal(as_processor.sequences, sequences)
    drawn = sample(family("llama"), PROMPTS, MASK, num_return_sequences=200, constraint=own, **how)
    for b, some in enumerate(sets): assert {tuple(x) for x, _ in as_lists(drawn, b)} <= set(some)
    with pytest.raises(ValueError, match="2 prompts, and the batch has 1"):
        beam_search(family("llama"), PROMPTS[:1], num_beams=2, constraint=own, **how)
    with pytest.raises(ValueError, match="3 rows"): own.start(3)


def test_prompts_that_leave_take_their_own_set_with_them():
    "One prompt may write one short text only and leaves at once; the others keep their sets"
    rows = [[2], *([3, i, i, i] for i in range(3, 10))]
    whole = AllowedSequences.from_ids(rows, end=1)
    keep = torch.zeros(3, whole.nodes, dtype=torch.bool)
    for b, some in enumerate((rows[:1], rows[1:3], rows[3:])): keep[b, whole.find(some)] = True
    ids = torch.tensor([[5, 3], [7, 2], [6, 6]])
    found = beam_search(family("gpt2"), ids, num_beams=6, max_new_tokens=5, eos_token_id=1, static=False, **PAD,
                        constraint=whole.restricted(keep))
    for b, some in enumerate((rows[:1], rows[1:3], rows[3:])):
        assert sorted(x for x, _ in as_lists(found, b)) == sorted(x + [1] for x in some)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_samples_follow_the_restricted_policy(static, renormalize):
    "Drawn from the probabilities of allowed tokens alone; scored as the setting says"
    model, rows = family("llama"), [x + [1] for x in RAGGED]
    drawn = sample(model, PROMPTS, MASK, num_return_sequences=3000, max_new_tokens=7, eos_token_id=1, static=static,
                   constraint=ragged(renormalize), generator=torch.Generator().manual_seed(0), **PAD)
    for b in range(2):
        shared, expected = dict(scores_of(model, b, rows, True)), dict(scores_of(model, b, rows, renormalize))
        found = as_lists(drawn, b)
        for row, score in found: assert abs(score - expected[tuple(row)]) < 1e-4
        for row, logp in shared.items():
            p = np.exp(logp)
            share = sum(tuple(x) == row for x, _ in found) / 3000
            assert abs(share - p) < 5 * (p * (1 - p) / 3000) ** 0.5 + 1e-3


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_step_under_a_constraint_can_be_captured_and_replayed(name, stage):
    long = AllowedSequences.from_ids(torch.randint(2, 6, (300, 12), generator=torch.Generator().manual_seed(1)), end=1)
    keep = torch.rand(2, long.nodes, generator=torch.Generator().manual_seed(2)) < 0.5
    for constraint in (long, long.restricted(keep), AllowedSequences.from_ids(long_rows(), end=1, renormalize=True)):
        how = dict(num_beams=6, max_new_tokens=13, eos_token_id=1, constraint=constraint, **PAD)
        a, b, c = (beam_search(family(name), PROMPTS, MASK, static=s, **how) for s in (False, True, "capture"))
        assert torch.equal(a.sequences, b.sequences) and torch.equal(b.sequences, c.sequences)
        torch.testing.assert_close(b.scores, c.scores, atol=1e-5, rtol=0)
        assert len(stage.tapes.pop().tape) > 50


def long_rows(): return [[2 + i % 7, 2 + i % 5, *([3] * (i % 9)), 4] for i in range(200)]


def test_static_steps_under_a_constraint_never_wait_for_the_device():
    model, marks, operations = family("llama"), [], Operations()
    constraint = AllowedSequences.from_ids(torch.randint(2, 6, (300, 14), generator=torch.Generator().manual_seed(1)))
    how = dict(num_beams=5, max_new_tokens=14, eos_token_id=None, static=True, constraint=constraint, **PAD)
    beam_search(model, PROMPTS, MASK, **how)
    hook = model.register_forward_pre_hook(lambda *_: marks.append((len(operations.seen), len(operations.waits))))
    try:
        with operations: beam_search(model, PROMPTS, MASK, **how)
    finally: hook.remove()
    waits = [b - a for (_, a), (_, b) in zip(marks[1:], marks[2:])]
    names = [[name for name, _ in operations.seen[a:b]] for (a, _), (b, _) in zip(marks[1:], marks[2:])]
    quiet = [ops for ops, w in zip(names, waits) if not w]
    assert len(quiet) >= 10 and all(ops == quiet[0] for ops in quiet)


def test_processors_see_only_what_is_allowed_and_cannot_allow_more():
    model, how = family("llama"), dict(max_new_tokens=5, eos_token_id=1, **PAD)
    def force(ids, scores): return torch.zeros_like(scores)      # would allow everything
    free = beam_search(model, PROMPTS, MASK, num_beams=20, logits_processor=T.LogitsProcessorList([force]),
                       constraint=ragged(), **how)
    assert {tuple(x) for x, _ in as_lists(free, 0)} == {(*x, 1) for x in RAGGED}
    top = T.TopKLogitsWarper(1)                                  # of the allowed tokens, not of all
    for renormalize in (False, True):
        drawn = sample(model, PROMPTS, MASK, num_return_sequences=9, logits_processor=top, **how,
                       constraint=ragged(renormalize))
        best = greedy(model, PROMPTS, MASK, constraint=ragged(renormalize), **how)
        assert torch.equal(drawn.sequences, best.sequences.expand(-1, 9, -1))
        torch.testing.assert_close(drawn.scores, best.scores.expand(-1, 9), atol=1e-4, rtol=0)
    penalty = T.RepetitionPenaltyLogitsProcessor(1.7)
    ours = beam_search(model, PROMPTS, MASK, num_beams=6, max_new_tokens=3, eos_token_id=None, constraint=catalogue(),
                       logits_processor=penalty, **PAD)
    theirs = by_generate(model, PROMPTS, MASK, 6, 3, logits_processor=[penalty],
                         prefix_allowed_tokens_fn=plain_processor(CATALOGUE.tolist(), 6))
    assert torch.equal(ours.sequences, theirs[0])
    torch.testing.assert_close(ours.scores, theirs[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("renormalize", [False, True])
def test_the_same_object_in_generate(renormalize):
    model, how = family("qwen3"), dict(max_new_tokens=3, eos_token_id=None, **PAD)
    constraint = catalogue(renormalize)
    ours = beam_search(model, PROMPTS, MASK, num_beams=9, constraint=constraint, **how)
    sequences, scores = by_generate(model, PROMPTS, MASK, 9, 3, logits_processor=[constraint.after(6)])
    assert torch.equal(ours.sequences, sequences)
    torch.testing.assert_close(ours.scores, scores, atol=1e-4, rtol=0)
    torch.manual_seed(0)
    drawn = model.generate(PROMPTS, attention_mask=MASK, do_sample=True, num_return_sequences=50, max_new_tokens=7,
                           logits_processor=[ragged(renormalize).after(6)], eos_token_id=1, top_k=0, **PAD)[:, 6:]
    assert {tuple(t for t in row if t) for row in drawn.tolist()} <= {(*x, 1) for x in RAGGED}


# What cannot be obeyed

def test_refusals_of_a_search():
    model, how = family("llama"), dict(num_beams=3, **PAD)
    def search(constraint, C, eos):
        return beam_search(model, PROMPTS, MASK, max_new_tokens=C, eos_token_id=eos, constraint=constraint, **how)
    with pytest.raises(ValueError, match="max_new_tokens=2 would cut completions of up to 3"): search(catalogue(), 2, None)
    with pytest.raises(ValueError, match="max_new_tokens=4 would cut"): search(ragged(), 4, 1)
    with pytest.raises(ValueError, match="ends completions with token 1"): search(ragged(), 9, None)
    with pytest.raises(ValueError, match="ends completions with token 1"): search(ragged(), 9, [2])
    with pytest.raises(ValueError, match=r"end token\(s\) \[2\] occur inside"): search(ragged(), 9, [1, 2])
    with pytest.raises(ValueError, match="token 99, and the model has a vocabulary of 13"):
        search(AllowedSequences.from_ids([[4, 99]]), 9, None)
    with pytest.raises(ValueError, match="token 99, and the model has a vocabulary of 13"):
        search(AllowedSequences.from_ids([[4, 9]], end=99), 9, 99)
    with pytest.raises(ValueError, match="inside"): search(AllowedSequences.from_ids([[4, 5, 6]]), 9, 5)
    last = search(AllowedSequences.from_ids([[4, 5, 6], [4, 6]]), 9, 6)
    assert sorted(x for x, _ in as_lists(last, 0)) == [[4, 5, 6], [4, 6]]
    assert beam_search(model, PROMPTS, MASK, max_new_tokens=9, eos_token_id=[5], constraint=catalogue_without(5),
                       **how).lengths.max() == 3


def catalogue_without(token): return AllowedSequences.from_ids([x for x in CATALOGUE.tolist() if token not in x])


def test_refusals_of_a_processor():
    scores = torch.zeros(1, V)
    for constraint in (catalogue(), catalogue().after(7)):
        with pytest.raises(ValueError, match=r"constraint.after\(P\)"): constraint(PROMPTS[:1], scores)
    with pytest.raises(ValueError, match="prompt_length=4 is not the length"): ragged().after(4)(PROMPTS, scores)
    whole = torch.cat([PROMPTS[:1], CATALOGUE[:1]], 1)
    with pytest.raises(ValueError, match="has no end token"): catalogue().after(6)(whole, scores)
    model = family("llama")
    with pytest.raises(ValueError, match="has no end token"):
        model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=5, logits_processor=[catalogue().after(6)], **PAD)


@pytest.mark.parametrize("sequences, end, message", [
    ([], None, "there is no sequence"), (np.zeros((0, 3), int), None, "there is no sequence"),
    ([3, 7], None, "in brackets"), ([[1, 2], []], None, "sequence 1 is empty"), (np.zeros((2, 0), int), None, "sequence 0 is empty"),
    ([[1, 2], [3, -1]], None, "sequence 1 holds a number that is no token id"),
    ([[1], [2**31, 4]], None, "sequence 1 holds a number"), ([[1.5]], None, "whole numbers, not float64"),
    (torch.ones(2, 2), None, "whole numbers, not float32"), (torch.ones(2, 2).bool(), None, "whole numbers, not bool"),
    (np.ones(3, int), None, r"must be \(N, C\), not \(3,\)"), (["ab"], None, "from_texts"),
    ([[3, 7], [3, 7, 2]], None, r"the sequence \[3, 7\] is the beginning of another"),
    ([[3, 7], [3, 1, 2]], 1, "sequence 1 holds the end token 1")])
def test_refusals_of_sequences(sequences, end, message):
    with pytest.raises(ValueError, match=message): AllowedSequences.from_ids(sequences, end)


def test_refusals_of_a_restriction():
    whole = catalogue()
    nothing = torch.zeros(2, whole.nodes, dtype=torch.bool)
    nothing[1, whole.find(CATALOGUE[:1])] = True
    with pytest.raises(ValueError, match=r"nothing is left to write for prompt\(s\) \[0\]"): whole.restricted(nothing)
    with pytest.raises(ValueError, match="must be"): whole.restricted(nothing[0])
    with pytest.raises(ValueError, match="must be"): whole.restricted(nothing.long())
    with pytest.raises(ValueError, match=r"sequence\(s\) \[1\] are not in the set"): whole.find([CATALOGUE[0].tolist(), [2]])
    own = whole.restricted(~nothing)
    with pytest.raises(ValueError, match="already"): own.restricted(~nothing)
    with pytest.raises(ValueError, match="save the set that it comes from"): own.save("x.safetensors")


# The tree

rows = st.lists(st.lists(st.integers(2, 6), min_size=1, max_size=5), min_size=1, max_size=30)


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(rows, st.lists(st.integers(0, 9), max_size=6))
def test_the_tree_says_what_a_set_of_tuples_says(rows, text):
    tree, known = AllowedSequences.from_ids(rows, end=1), {(*x, 1) for x in map(tuple, rows)}
    beginnings = {x[:i] for x in known for i in range(len(x))}
    assert len(tree) == len(known) and tree.nodes == len(beginnings)
    assert tree.longest == max(map(len, known))
    assert {tuple(tree.path(n)) for n in range(tree.nodes)} == beginnings
    for beginning in beginnings | {tuple(text)}:
        state = tree.states(torch.tensor([beginning], dtype=torch.long).view(1, -1))[:, -1]
        after = {x[len(beginning)] for x in known if len(x) > len(beginning) and x[:len(beginning)] == beginning}
        assert set(tree.allowed(state, 10)[0].nonzero().flatten().tolist()) == after
        tokens, allowed = tree.choices(state, 10, len(beginning))
        assert sorted(tokens[allowed].tolist()) == sorted(after)


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(rows, st.data())
def test_a_restricted_tree_is_the_tree_of_the_rest(rows, data):
    tree, rows = AllowedSequences.from_ids(rows, end=1), sorted(set(map(tuple, rows)))
    some = st.lists(st.sampled_from(rows), min_size=1, unique=True)
    kept = [data.draw(some), data.draw(some)]
    keep = torch.zeros(2, tree.nodes, dtype=torch.bool)
    for b in range(2): keep[b, tree.find(kept[b])] = True
    own, alone = tree.restricted(keep), [AllowedSequences.from_ids(x, end=1) for x in kept]
    for row in rows:
        ids = torch.tensor([[*row, 1]] * 2)
        expected = [one.states(ids[:1])[0] for one in alone]
        for state, *plain in zip(own.states(ids).T, *expected):
            for b in range(2):
                assert torch.equal(own.allowed(state, 8)[b], alone[b].allowed(plain[b], 8))


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(rows, st.booleans())
def test_a_file_holds_the_tree(tmp_path_factory, rows, renormalize):
    path = tmp_path_factory.mktemp("tree") / "new" / "set.safetensors"
    tree = AllowedSequences.from_ids(rows, end=1, renormalize=renormalize)
    again = AllowedSequences.load(tree.save(path))
    assert os.listdir(path.parent) == [path.name]
    for name, x in vars(tree).items():
        y = vars(again)[name]
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, name


def test_files_that_hold_no_tree(tmp_path):
    save_file(dict(x=torch.ones(1)), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="AllowedSequences.save"): AllowedSequences.load(tmp_path / "x.safetensors")


def test_arrays_lists_and_tensors_give_one_tree():
    trees = [AllowedSequences.from_ids(x) for x in (CATALOGUE, CATALOGUE.numpy().astype(np.uint16), CATALOGUE.tolist(),
                                                    [tuple(x) for x in CATALOGUE.tolist()], list(CATALOGUE), CATALOGUE.T.contiguous().T)]
    for tree in trees: assert torch.equal(tree.edges, trees[0].edges) and torch.equal(tree.ends, trees[0].ends)


def test_texts_and_a_tokenizer():
    tokenizer = load_tokenizer("single")
    texts = ["+ a P 2", "a", "a a", "+ a P 2"]
    tree = AllowedSequences.from_texts(texts, tokenizer)
    assert tree.end == tokenizer.eos_token_id and len(tree) == 3
    for text in texts: assert tree.path(int(tree.find([tokenizer(text).input_ids])[0])) == tokenizer(text).input_ids
    with pytest.raises(ValueError, match="in brackets"): AllowedSequences.from_texts("a", tokenizer)
    with pytest.raises(ValueError, match="there is no sequence"): AllowedSequences.from_texts([], tokenizer)


# Log-probabilities for training

@pytest.mark.parametrize("renormalize", [False, True])
def test_training_sees_the_scores_of_the_search(renormalize):
    model = family("llama")
    rows = sorted(set(map(tuple, RAGGED)))
    keep = torch.ones(2, ragged().nodes, dtype=torch.bool)
    keep[0, ragged().find(rows[:4])] = False
    for constraint in (ragged(renormalize), ragged(renormalize).restricted(keep)):
        found = beam_search(model, PROMPTS, MASK, num_beams=6, max_new_tokens=5, eos_token_id=1, constraint=constraint,
                            **PAD)
        ids, lengths = found.sequences.flatten(0, 1), found.lengths.flatten()
        N, C = ids.shape
        mask = torch.arange(C) < lengths[:, None]
        whole = torch.cat([PROMPTS.repeat_interleave(N // 2, 0), ids], 1)
        seen = torch.cat([MASK.repeat_interleave(N // 2, 0), mask.long()], 1)
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        logits = model(whole, attention_mask=seen, position_ids=positions).logits[:, -C - 1:-1].float()
        logps = constraint.token_logps(logits, ids, mask.long())
        torch.testing.assert_close(logps.sum(1).view(2, -1), found.scores, atol=1e-4, rtol=0)
        assert torch.isfinite(logps).all() and not logps[~mask].any()
        order = torch.randperm(N, generator=torch.Generator().manual_seed(0)) # rows that were shuffled
        start = constraint.start(2)[order // (N // 2)]
        torch.testing.assert_close(constraint.token_logps(logits[order], ids[order], mask[order], start), logps[order])
        gradient, = torch.autograd.grad(logps.sum(), model.model.embed_tokens.weight)
        assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0


def test_training_refuses_what_the_set_does_not_hold():
    logits, ids = torch.zeros(2, 3, V), torch.stack([CATALOGUE[0], torch.tensor([0, 0, 0])])
    with pytest.raises(ValueError, match=r"does not allow token 0 of completion\(s\) \[1\]"):
        catalogue(True).token_logps(logits, ids)
    policy = catalogue(False).token_logps(logits, ids)
    torch.testing.assert_close(policy, torch.full((2, 3), -np.log(V), dtype=torch.float32))
    catalogue(True).token_logps(logits, ids, torch.tensor([[1, 1, 1], [0, 0, 0]]))


def test_after_a_search_the_tensors_can_train():
    constraint = AllowedSequences.from_ids(CATALOGUE, renormalize=True)
    with torch.inference_mode(): constraint.to("cpu").start(2)
    logits = torch.zeros(40, 3, V, requires_grad=True)
    constraint.token_logps(logits, CATALOGUE).sum().backward()
    assert logits.grad.abs().sum() > 0


# The protocol and the grammar

class NoRepeats(Constraint):
    "A constraint of a user: no token twice, counted in bits; ends with token 1"
    end = 1
    def start(self, rows): return torch.zeros(rows, dtype=torch.long)
    def allowed(self, state, V):
        bits = 2 ** torch.arange(V)
        return (state[..., None] & bits == 0) & (torch.arange(V) > 0)
    def advance(self, state, tokens): return state | 2 ** tokens


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_a_constraint_that_is_two_functions(static, renormalize):
    constraint = NoRepeats()
    constraint.renormalize = renormalize
    found = beam_search(family("gpt2"), PROMPTS, MASK, num_beams=3000, max_new_tokens=3, eos_token_id=1, static=static,
                        constraint=constraint, **PAD)
    words = [x for n in (1, 2, 3) for x in product(range(1, V), repeat=n) if len(set(x)) == n]
    whole = [x for x in words if 1 not in x[:-1] and (len(x) == 3 or x[-1] == 1)]
    for b in range(2):
        assert sorted(tuple(x) for x, _ in as_lists(found, b)) == sorted(whole)
    if renormalize: torch.testing.assert_close(found.scores.exp().sum(1), torch.ones(2))
    with pytest.raises(ValueError, match="ends completions"):
        beam_search(family("gpt2"), PROMPTS, num_beams=2, max_new_tokens=3, eos_token_id=None, constraint=constraint, **PAD)


@pytest.mark.parametrize("static", [False, True])
def test_the_grammar_as_constraint_and_as_processor(static):
    tokenizer = load_tokenizer("single")
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(T.LlamaConfig(**dict(GROUPED, vocab_size=len(tokenizer)))).eval()
    model.generation_config.eos_token_id = None
    how = dict(num_beams=8, max_new_tokens=14, eos_token_id=tokenizer.eos_token_id, static=static, **PAD)
    grammar = PrefixGrammar(tokenizer)
    carried = beam_search(model, PROMPTS, MASK, constraint=grammar, **how)
    recounted = beam_search(model, PROMPTS, MASK, logits_processor=grammar.after(6), **how)
    assert torch.equal(carried.sequences, recounted.sequences)
    torch.testing.assert_close(carried.scores, recounted.scores)
    assert (carried.lengths < 14).any()


@pytest.mark.parametrize("static", [False, True])
def test_the_grammar_of_a_model_with_more_ids_than_its_tokenizer(static):
    "More beams than choices: the empty ones may hold any id"
    tokenizer, size = load_tokenizer("single"), 64
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(T.LlamaConfig(**dict(GROUPED, vocab_size=size))).eval()
    found = beam_search(model, PROMPTS, MASK, num_beams=60, max_new_tokens=4, eos_token_id=tokenizer.eos_token_id,
                        pad_token_id=63, static=static, constraint=PrefixGrammar(tokenizer))
    for b in range(2): assert max(i for tokens, _ in as_lists(found, b) for i in tokens) < len(tokenizer)
