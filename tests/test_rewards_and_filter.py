"From verdicts to rewards, from searches to what is kept, from completions to figures: each against its definition, spelled out slowly."
import json
import math

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import agrees

from bgrpo_nb.solve.beam_filter import answer_tokens, filter_by_beams, search_problems
from bgrpo_nb.algebra.problems import Problem, generate_multivariate, generate_on_singlets, generate_problems
from bgrpo_nb.solve.decomposition import decompose
from bgrpo_nb.solve.evaluation import (
    METRICS, Difference, Report, ProblemResult, beam_rank_score, bootstrap, compare, evaluate, wilson)
from bgrpo_nb.search.generation import sample
from bgrpo_nb.policy.model import decode_completions, encode, load_model, load_tokenizer, tokenize
from bgrpo_nb.algebra.notation import to_sympy
from bgrpo_nb.algebra.exact_decomposition import decompose_exact
from bgrpo_nb.algebra.polynomial import Verdict, canonical_inner, degree, verify
from bgrpo_nb.learn.rewards import (
    REWARDS, VerifiedReward, advantages_of, balance_rewards, first_of_each, leave_one_out, rewards_of)
from bgrpo_nb.solve.decomposition_reward import decomposition_reward, answer_key

steady = settings(derandomize=True, deadline=None, database=None)


@pytest.mark.parametrize("reward,valid,beam_rank,expected", [
    ("rank", True, 0, 1.0), ("rank", True, 1, 0.9692332344763441), ("rank", True, 24, 0.4723665527410147),
    ("rank", False, 0, -0.1), ("rank", False, 24, -0.1),
    ("simple", True, 0, 1.0), ("simple", True, 24, 1.0), ("simple", False, 7, -0.1),
    ("reverse_rank", True, 0, 1.0), ("reverse_rank", True, 24, 2.117000016612675), ("reverse_rank", False, 0, -0.1),
    ("reverse_rank", False, 24, -0.04723665527410147),
    ("hit", True, 7, 1.0), ("hit", False, 0, 0.0), ("ndcg", True, 0, 1.0), ("ndcg", True, 2, 0.5), ("ndcg", True, 6, 1 / 3), ("ndcg", False, 0, 0.0)])
def test_the_table_of_rewards(reward, valid, beam_rank, expected):
    assert rewards_of([valid], [beam_rank], reward) == pytest.approx([expected], abs=1e-12)
    assert rewards_of([Verdict(valid, "ok" if valid else "trivial")], [beam_rank], reward) == rewards_of([valid], [beam_rank], reward)
    assert set(REWARDS) == {"rank", "simple", "reverse_rank", "hit", "ndcg"}


@pytest.mark.parametrize("right", [None, 0, 2, 3])
def test_penalties_by_rank_are_those_of_rere(right):
    "Worked out for four beams: weights 1, 0.6309, 0.5, 0.4307 with the sum 2.5616; nothing where no beam is right"
    shares = [-0.39038, -0.24630, -0.19519, -0.16813]
    wanted = [0.0] * 4 if right is None else [1.0 if k == right else share for k, share in enumerate(shares)]
    assert rewards_of([k == right for k in range(4)], range(4), "rank_penalty") == pytest.approx(wanted, abs=1e-5)


groups = st.lists(st.booleans(), min_size=1, max_size=30)


@settings(steady, max_examples=200)
@given(groups, st.sampled_from(sorted(REWARDS)), st.randoms(use_true_random=False))
def test_balanced_groups_sum_to_zero_and_keep_their_order(valid, reward, random):
    ranks = list(range(len(valid)))
    random.shuffle(ranks)
    before = rewards_of(valid, ranks, reward)
    after = balance_rewards(before)
    pays_wrong_ones = min(before) < 0                       # `hit` and `ndcg` do not
    if any(valid) and pays_wrong_ones: assert sum(after) == pytest.approx(0, abs=1e-9)
    else: assert after == before
    assert all(b == a for a, b, v in zip(before, after, valid) if v)
    assert pays_wrong_ones == (not all(valid) and reward not in ("hit", "ndcg"))
    if not pays_wrong_ones: return
    wrong = [(a, b) for a, b, v in zip(before, after, valid) if not v]
    assert all(b < 0 for _, b in wrong) and len({round(b / a, 9) for a, b in wrong}) <= 1


@settings(steady, max_examples=100)
@given(st.integers(1, 8), st.integers(1, 5), st.randoms(use_true_random=False))
def test_advantages_are_rewards_minus_the_mean_of_their_group(size, n, random):
    rewards = [random.uniform(-1, 2) for _ in range(size * n)]
    found = advantages_of(rewards, size)
    for i, (advantage, reward) in enumerate(zip(found, rewards, strict=True)):
        group = [rewards[j] for j in range(len(rewards)) if j // size == i // size]
        assert advantage == pytest.approx(reward - sum(group) / size, abs=1e-12)
    if size > 1:
        with pytest.raises(ValueError, match="whole number of groups"): advantages_of(rewards[1:], size)


@settings(steady, max_examples=100)
@given(st.lists(st.floats(-1, 2), min_size=2, max_size=25))
def test_leave_one_out_compares_with_the_others(rewards):
    found = leave_one_out(rewards)
    for i, advantage in enumerate(found): assert advantage == pytest.approx(rewards[i] - np.mean(rewards[:i] + rewards[i + 1:]), abs=1e-9)
    assert found == pytest.approx([a * len(rewards) / (len(rewards) - 1) for a in advantages_of(rewards, len(rewards))], abs=1e-9)
    assert advantages_of(rewards * 3, len(rewards), "leave_one_out") == found * 3


@settings(steady, max_examples=200)
@given(st.lists(st.tuples(st.sampled_from("fg"), st.sampled_from([None, "x", "y", "z"])), max_size=20))
def test_the_first_of_each_is_new_in_its_run_of_one_prompt(rows):
    prompts, keys = [p for p, _ in rows], [k for _, k in rows]
    for i, first in enumerate(first_of_each(prompts, keys)):
        start = next((j + 1 for j in range(i - 1, -1, -1) if prompts[j] != prompts[i]), 0)
        assert first == (keys[i] is not None and keys[i] not in keys[start:i])


def test_equivalent_completions_have_one_key():
    for p in generate_problems(20, 2, 3, seed=8):
        again = f"+ P 9 + * N 3 {p.answer}" if p.answer.startswith("^") else p.answer
        assert answer_key(p.answer) == answer_key(canonical_inner(p.answer)) == answer_key(f"* P 2 ^ b P 2 & {p.answer}") and verify(p.expanded, again)
    for p in generate_on_singlets(5, seed=3): assert answer_key(p.answer) == canonical_inner(p.answer)
    for p in generate_multivariate(20, seed=3): assert answer_key(p.answer).count("&") + 1 == p.answer.count("&")
    assert answer_key("+ a ^ a P 2") != answer_key("+ * P 2 a ^ a P 2")


def test_the_reward_function_judges_once_and_tells_why():
    texts = {0: "^ a P 2", 1: "a", 2: None, 3: "* P 2 ^ a P 2", 4: "+ a ^ a P 2"}
    calls = []
    def decode(rows):
        calls.append(rows)
        return [texts[row[0]] for row in rows]
    f, seen = "+ P 1 * P 2 ^ a P 4 ⁇", {}
    log = dict(log_metric=lambda k, v: seen.update({k: v}), log_extra=lambda k, v: seen.update({k: v}))
    pay = decomposition_reward(decode, "rank")
    assert pay([f] * 5, [[i] for i in range(5)], beam_rank=[4, 0, 1, 2, 3], **log) == pytest.approx(
        [math.exp(-4 / 32), -0.1, -0.1, math.exp(-2 / 32), -0.1])
    assert seen == {"valid": 0.4, "reason": ["ok", "trivial", "not_prefix_notation", "ok", "not_a_decomposition"],
                    "answer_key": ["* P 1 ^ a P 2", "", "", "* P 1 ^ a P 2", ""]}
    assert calls == [[[i] for i in range(5)], [[0], [3]]]      # all once, and right ones for their keys
    rows = [[0], [1], [3]]
    assert decomposition_reward(decode, "simple", allow_trivial=True)([f] * 3, rows) == [1, 1, 1]
    assert decomposition_reward(decode, "simple", domain="ZZ")(["+ P 1 ^ a P 4 ⁇"] * 3, rows) == pytest.approx([1, -0.1, -0.1])
    assert pay.__name__ == "rank_reward"
    with pytest.raises(ValueError, match="rank, simple, reverse_rank"): decomposition_reward(decode, "best")


@pytest.fixture(scope="module")
def tiny():
    "The bundled policy, on one thread"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model("tiny", device="cpu"), load_tokenizer("tiny")
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def problems():
    learned = generate_problems(12, 2, 2, seed=41, canonical=True)
    return learned + generate_problems(36, 3, 2, seed=42, canonical=True)


@pytest.fixture(scope="module")
def searched(tiny, problems): return search_problems(*tiny, problems, num_beams=10)


def first(flags): return next((k for k, flag in enumerate(flags, 1) if flag), None)


def test_a_search_reports_beams_best_first_with_their_verdicts(problems, searched):
    assert [s.problem for s in searched] == problems
    for s in searched:
        assert len(s.texts) == len(s.scores) == len(s.verdicts) == 10 and s.scores == sorted(s.scores, reverse=True)
        assert s.verdicts == [verify(s.problem.expanded, text) for text in s.texts]
        for text, v in zip(s.texts, s.verdicts):
            if v: assert agrees(s.problem.expanded, v.outer, [text])
        assert s.first_valid == first([v.valid for v in s.verdicts])


def test_scores_are_log_probabilities(tiny, searched):
    model, tokenizer = tiny
    for s in searched[:4]:
        for text, score in list(zip(s.texts, s.scores))[:3]:
            if text is None: continue
            prompt, answer = tokenize(tokenizer, [s.problem.prompt, text + " ⁇"])
            with torch.no_grad(): logp = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            expected = sum(logp[len(prompt) - 1 + i, t].item() for i, t in enumerate(answer))
            assert score == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("lowest,highest", [(1, None), (2, None), (1, 1), (2, 4), (10, 10)])
def test_the_filter_keeps_the_places_asked_for(tiny, problems, searched, lowest, highest):
    result = filter_by_beams(*tiny, problems, num_beams=10, lowest=lowest, highest=highest)
    places = [first(bool(verify(s.problem.expanded, t)) for t in s.texts) for s in searched]
    assert result.kept == [p for p, k in zip(problems, places) if k and lowest <= k <= (highest or 10)]
    assert result.rank_distribution == {k: places.count(k) for k in {*places}}
    assert list(result.rank_distribution)[-1] is None
    assert None in places and 1 in places and any(k and k > 1 for k in places), "the pool has problems of every kind"
    counts = [places.count(1), sum(k is not None and k > 1 for k in places), places.count(None)]
    said = [int(word) for word in str(result).replace(",", " ").replace(";", " ").split() if word.isdigit()]
    assert said[:2] == [len(result.kept), len(problems)] and said[-3:] == counts


def test_settings_of_the_filter(tiny, problems):
    for wrong in (dict(lowest=0), dict(lowest=3, highest=2), dict(highest=11)):
        with pytest.raises(ValueError, match="from 1 to num_beams=10"):
            filter_by_beams(*tiny, problems, num_beams=10, **wrong)
    assert filter_by_beams(*tiny, [], num_beams=10).kept == [] and search_problems(*tiny, []) == []


def test_the_rule_reaches_the_verdict(tiny):
    f = "+ P 1 + * P 2 ^ a P 2 * P 1 ^ a P 4"
    strict, loose = (search_problems(*tiny, [Problem(f, "^ a P 2")], 10, allow_trivial=t)[0] for t in (False, True))
    assert strict.texts == loose.texts and loose.verdicts == [verify(f, t, allow_trivial=True) for t in loose.texts]
    integer = search_problems(*tiny, [Problem(f, "^ a P 2")], 10, domain="ZZ")[0]
    assert integer.verdicts == [verify(f, t, domain="ZZ") for t in integer.texts]


def test_answer_tokens():
    assert answer_tokens([Problem("^ a P 4", "^ a P 2"), Problem("^ a P 6", "+ a ^ a P 3")]) == 6 + 1 + 3
    assert answer_tokens([Problem("+ P 1 ^ a P 4", ""), Problem("^ a P 6", "")]) == 7


@pytest.fixture(scope="module")
def report(tiny, problems): return evaluate(*tiny, problems, num_beams=10, wide_beams=16, num_samples=6, seed=3)


def test_an_evaluation_is_what_each_problem_gives_alone(tiny, problems, report):
    model, tokenizer = tiny
    limit = answer_tokens(problems)
    def place(p, k):
        searched, = search_problems(model, tokenizer, [p], k, max_new_tokens=limit)
        return first(map(bool, searched.verdicts))
    for p, row in zip(problems, report.rows, strict=True):
        assert (row.expanded, row.degree, row.inner_degree) == (p.expanded, degree(p.expanded), 2)
        assert (row.greedy, row.beam_place, row.wide_place) == (place(p, 1) == 1, place(p, 10), place(p, 16))
        assert (row.reason == "ok") == row.greedy
    assert 0 < report.metrics["greedy_accuracy"] < report.metrics["beam_accuracy"] < 1
    # the same draws again: long prompts first, one batch
    order = sorted(range(len(problems)), key=lambda i: -len(problems[i].expanded))
    enc = encode(tokenizer, [problems[i].prompt for i in order])
    drawn = sample(model, enc.input_ids, enc.attention_mask, num_return_sequences=6, max_new_tokens=limit,
                   temperature=0.7, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
                   generator=torch.Generator().manual_seed(3)).sequences
    texts = [decode_completions(tokenizer, rows) for rows in drawn]
    assert [report.rows[i].valid_samples for i in order] == [
        sum(bool(verify(problems[i].expanded, t)) for t in found) for i, found in zip(order, texts)]
    assert 0 < sum(row.valid_samples for row in report.rows) < 6 * len(problems)


place = st.one_of(st.none(), st.integers(1, 25))
row = st.builds(ProblemResult, st.just("^ a P 4"), st.just(4), st.just(2), st.booleans(),
                st.one_of(st.none(), st.integers(1, 12)), place, st.integers(0, 3), st.just("ok"))


@settings(steady, max_examples=100)
@given(st.lists(row, min_size=1, max_size=12))
def test_metrics_obey_their_definitions(rows):
    n, found = len(rows), Report(rows).metrics
    places = [r.beam_place for r in rows]
    assert found.pop("rank_distribution") == {str(k or "none"): places.count(k) for k in places}
    solved = [[r.greedy, r.beam_place is not None, r.wide_place is not None, r.valid_samples != 0] for r in rows]
    names = ["greedy_accuracy", "beam_accuracy", "wide_beam_accuracy", "sample_accuracy"]
    expected = {name: sum(flags[i] for flags in solved) / n for i, name in enumerate(names)}
    expected |= {"oracle_accuracy": sum(map(any, solved)) / n,
                 "beam_rank_score": sum(math.exp((1 - k) / 10) for k in places if k and k <= 10) / n}
    assert found == pytest.approx(expected) and set(found) == set(METRICS)


def test_a_seed_gives_the_same_report(tiny, problems, report, tmp_path):
    assert evaluate(*tiny, problems, num_beams=10, wide_beams=16, num_samples=6, seed=3).rows == report.rows
    read = Report.from_json(report.to_json(tmp_path / "a/report.json"))
    assert (read.rows, read.settings, read.metrics) == (report.rows, report.settings, report.metrics)
    assert json.loads((tmp_path / "a/report.json").read_text())["metrics"] == report.metrics


def test_by_degree(report):
    parts = report.by_degree()
    assert {k: len(v) for k, v in parts.items()} == {"2∘2": 12, "3∘2": 36}
    sizes = list(map(len, parts.values()))
    for m in METRICS:
        means = [part.metrics[m] for part in parts.values()]
        assert np.average(means, weights=sizes) == pytest.approx(report.metrics[m])


@pytest.mark.parametrize("place,score", [(None, 0), (1, 1), (2, math.exp(-0.1)), (10, math.exp(-0.9)), (11, 0),
                                         (25, 0)])
def test_beam_rank_score(place, score): assert beam_rank_score(place) == pytest.approx(score, abs=1e-12)


def test_intervals():
    for solved, n in ((0, 10), (3, 10), (10, 10), (147, 300)):  # Wilson's formula, written out
        z, p = 1.959963984540054, solved / n
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        assert wilson(solved, n) == pytest.approx((middle - half, middle + half), abs=1e-9)
    values = np.random.default_rng(0).normal(0.3, 1, 400)
    low, high = bootstrap(values)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert bootstrap(values) == (low, high)
    assert bootstrap([0.5] * 9) == (0.5, 0.5)


def rows(places): return [ProblemResult(f"^ a P {i}", 4, 2, k == 1, k, k, 0, "ok") for i, k in enumerate(places)]


def test_compare_pairs_problem_by_problem():
    rng = np.random.default_rng(0)
    before = [int(k) if k else None for k in rng.integers(0, 11, 200)]
    after = [max(1, k - 1) if k else None for k in before]  # every solved problem one place up: small beside the spread
    a, b = Report(rows(before)), Report(rows(after))
    found = compare(a, b)
    assert found.mean == pytest.approx(b.metrics["beam_rank_score"] - a.metrics["beam_rank_score"])
    assert 0 < found.low < found.mean < found.high
    spread = [np.std([r.value("beam_rank_score") for r in report.rows]) / math.sqrt(200) for report in (a, b)]
    unpaired = math.hypot(*spread)
    assert found.mean < 2.8 * unpaired, "without pairing, the gain is smaller than the noise"
    assert found.high - found.low < unpaired
    assert compare(b, a).mean == -found.mean and compare(a, a) == Difference(0, 0, 0)
    greedy = compare(a, b, "greedy_accuracy").mean
    assert greedy == pytest.approx(np.mean([k == 1 for k in after]) - np.mean([k == 1 for k in before]))
    for other in (Report(b.rows[::-1]), Report(b.rows[:-1])):
        with pytest.raises(ValueError, match="not on the same problems"): compare(a, other)


x = sympy.Symbol("x")


@pytest.mark.parametrize("f", [x**4 + 2*x**2 + 1, "x**4 + 2*x**2 + 1", "x^4 + 2*x^2 + 1", "(x**2 + 1)**2",
                               "+ P 1 + * P 2 ^ x P 2 ^ x P 4",
                               "+ P 1 + * P 2 ^ a P 2 ^ a P 4 ⁇", sympy.Poly(x**4 + 2*x**2 + 1, x)])
def test_decompose_takes_what_people_have(tiny, f):
    found = decompose(f, num_beams=5)
    assert [(d.outer, d.inner, d.exact) for d in found] == [("+ P 1 + * P 2 b * P 1 ^ b P 2", "* P 1 ^ a P 2", True)]


def test_decompose_unites_algebra_and_beams(tiny, problems, searched):
    for s in searched[8:18]:
        found = decompose(s.problem.expanded, tiny[0], num_beams=10)
        exact = {inner for _, inner in decompose_exact(s.problem.expanded)}
        assert exact and {d.inner for d in found if d.exact} == exact
        assert len({canonical_inner(d.inner) for d in found}) == len(found)
        for d in found: assert agrees(s.problem.expanded, d.outer, [d.inner]) and verify(s.problem.expanded, d.inner)
        known = next(d for d in found if d.inner == s.problem.answer)
        assert (known.beam_place is None) == (s.first_valid is None) == (known.score is None)


def test_decompose_many_ways():
    assert [d.inner for d in decompose(x**6, num_beams=3)][:2] == ["* P 1 ^ a P 2", "* P 1 ^ a P 3"]
    assert decompose(x**5 + x, num_beams=3) == [] and decompose("x", num_beams=2) == []
    for p in generate_problems(3, 4, 4, seed=2):
        assert canonical_inner(p.answer) in [d.inner for d in decompose(to_sympy(p.expanded), num_beams=2)]


@pytest.mark.parametrize("wrong,fault", [
    ("not a polynomial (", "neither prefix notation"), ("", "neither prefix notation"),
    (sympy.sin(x), "not a polynomial"), (x / 2 + x**4, "not integers"),
    (1 / x, "not a polynomial"), ("x**4 + alpha*x", "neither prefix notation"),
    (sympy.Symbol("alpha")**4, "a letter and digits"),
    ("__import__('os').getcwd()", "neither prefix notation"), ("exec(a)", "neither prefix notation"),
    ("(lambda: 1)()", "neither prefix notation"), ("1" * 90 + "!", "neither prefix"), ("x x", "neither prefix")])
def test_decompose_refuses_in_one_line(wrong, fault):
    with pytest.raises(ValueError, match=fault) as error: decompose(wrong)
    assert "\n" not in str(error.value)


def test_a_check_gets_the_columns_that_it_names():
    prompts, ids, columns = ["a", "b"], [[1, 0], [2, 0]], dict(answer=[1, 3], level=[7, 7])
    def named(prompts, completion_ids, answer): return [c[0] == a for c, a in zip(completion_ids, answer)]
    def all_of_them(prompts, completion_ids, **given): return [sorted(given) == ["answer", "level"]] * 2
    def none(prompts, completion_ids): return [True, True]
    assert VerifiedReward(named, reward="hit")(prompts, ids, [0, 1], **columns) == [1.0, 0.0]
    for check in (all_of_them, none): assert VerifiedReward(check, reward="hit")(prompts, ids, [0, 1], **columns) == [1.0, 1.0]
    with pytest.raises(TypeError, match="answer"): VerifiedReward(named, reward="hit")(prompts, ids, [0, 1])
