"Problems: reproducible, distinct, in the authors' distribution, never in two splits; errors of files name the line."
import os
import random
import subprocess
import sys
from collections import Counter
from itertools import islice, product
from pathlib import Path

import numpy as np
import pytest
from flint import Ordering, fmpz_mpoly_ctx
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import agrees, compose, names
from scipy.stats import ks_2samp

from bgrpo_nb.algebra.problems import (
    Problem, canonical_rows, compose_rows, filter_by_degree, format_rows, generate_multivariate,
    generate_on_singlets, generate_problems, mix, polynomial_key, read_problems, split, write_problems)
from bgrpo_nb.algebra.polynomial import (
    PrefixError, canonical_inner, coefficients, degree, format_prefix, is_decomposition_of_degrees, parse, to_prefix,
    verify, verify_batch)

steady = settings(derandomize=True, deadline=None, database=None)
GENERATORS = {
    "2∘2": lambda n, **k: generate_problems(n, 2, 2, **k),
    "4∘4": lambda n, **k: generate_problems(n, 4, 4, **k),
    "canonical": lambda n, **k: generate_problems(n, 3, 2, canonical=True, **k),
    "both": lambda n, **k: generate_problems(n, 2, 3, answer="both", **k),
    "multivariate": generate_multivariate,
    "singlets": generate_on_singlets,
}
every_generator = pytest.mark.parametrize("kind", GENERATORS)


def keys(problems): return [polynomial_key(p.expanded) for p in problems]


def rewritten(p):
    "The same problem written differently: terms in reverse, a zero added"
    f, terms = parse(p.expanded), p.expanded
    if len(names(p.expanded)) == 1:
        written = [format_prefix([0] * d + [int(c)], names(p.expanded)[0]) for d, c in enumerate(f.coeffs()) if c][::-1]
        terms = "+ " * (len(written) - 1) + " ".join(written)
    return Problem(f"+ {terms} P 0", p.answer)


@every_generator
def test_a_seed_gives_the_same_problems(kind):
    make = GENERATORS[kind]
    assert make(60, seed=3) == make(60, seed=3) and make(60, seed=3)[:20] == make(20, seed=3)
    assert len(set(make(60, seed=3)) & set(make(60, seed=4))) < 3


def test_a_seed_gives_the_same_problems_in_another_process():
    code = ("import sys; sys.path.insert(0, 'tests'); from test_data import *\n"
            "made = {k: make(12, seed=5) for k, make in GENERATORS.items()}\n"
            "made['mix'], made['split'] = mix(made['4∘4'], made['2∘2'], 0.3, 1), split(made['2∘2'], (0.5, 0.5), 1)\n"
            "import hashlib; text = repr({k: [*map(tuple, v)] for k, v in made.items()})\n"
            "print(hashlib.sha256(text.encode()).hexdigest())")
    found = set()
    for seed in ("1", "2"):
        done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1],
                              env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True)
        found.add(done.stdout)
    assert len(found) == 1


@every_generator
def test_problems_are_distinct_polynomials(kind):
    made = GENERATORS[kind](400, seed=1, **({} if kind == "4∘4" else {"coefficient_bound": 5}))
    assert len(set(keys(made))) == len(made) == 400


def test_every_problem_of_a_small_space_is_found_once():
    quadratics = list(product((-1, 0, 1), (-1, 0, 1), (-1, 1)))
    found = {tuple(compose(g, h)) for g, h in product(quadratics, quadratics)}
    made = generate_problems(len(found), 2, 2, coefficient_bound=1)
    assert {tuple(coefficients(p.expanded)) for p in made} == found
    with pytest.raises(ValueError, match=f"only {len(found)} distinct problems"):
        generate_problems(len(found) + 1, 2, 2, coefficient_bound=1)


@every_generator
def test_every_answer_is_right_and_none_trivial(kind):
    for p in GENERATORS[kind](150, seed=2):
        verdict = verify(p.expanded, p.answer)
        assert verdict
        outer, *inners = p.answer.split(" & ") if "&" in p.answer else (verdict.outer, p.answer)
        assert agrees(p.expanded, outer, inners)
        whole = degree(p.expanded)
        assert 2 <= max(map(degree, inners)) < whole and 2 <= degree(outer)
        assert len(inners) > 1 or degree(outer) * degree(inners[0]) == whole


@pytest.mark.parametrize("degrees", [(2, 2), (3, 4), (7, 2), (2, 9), (6, 6), (12, 10)])
def test_any_degrees(degrees):
    made = generate_problems(40, *degrees, seed=1, answer="both", canonical=True)
    for p in made:
        outer, inner = p.answer.split(" & ")
        assert (degree(outer), degree(inner)) == degrees and inner == canonical_inner(inner)
        assert tuple(coefficients(p.expanded)) == tuple(compose(coefficients(outer), coefficients(inner)))


def test_large_coefficients_stay_exact():
    for p in generate_problems(20, 5, 4, coefficient_bound=10**6, answer="both"):
        outer, inner = map(coefficients, p.answer.split(" & "))
        assert coefficients(p.expanded) == compose(outer, inner)
    assert max(map(abs, coefficients(p.expanded))) > 2**63


numbers = st.one_of(st.integers(-20, 20), st.integers(-10**24, 10**24))
rows = st.integers(0, 4).flatmap(lambda d: st.lists(st.lists(numbers, min_size=d + 1, max_size=d + 1),
                                                    min_size=1, max_size=4))


@settings(steady, max_examples=150)
@given(rows, rows)
def test_batches_equal_the_obvious_form(g, h):
    n = min(len(g), len(h))
    g, h = g[:n], h[:n]
    def array(rows): return np.array(rows, object if max(abs(v) for row in rows for v in row) > 2**62 else np.int64)
    found = compose_rows(array(g), array(h))
    assert found.tolist() == [compose(a, b) for a, b in zip(g, h)]
    assert format_rows(found) == [format_prefix(row) for row in found.tolist()]


small = st.integers(-20, 20)


@settings(steady, max_examples=100)
@given(st.lists(st.tuples(small, small, small.filter(bool)), min_size=1, max_size=8))
def test_canonical_rows_equal_canonical_inner(h):
    assert format_rows(canonical_rows(np.array(h))) == [canonical_inner(format_prefix(row)) for row in h]


def parts(problems, outer_degree, inner_degree):
    "Prompt lengths, answer lengths, and every coefficient of h and g by its degree"
    def padded(p, d): return p + [0] * (d + 1 - len(p))
    hs = [padded(coefficients(p.answer), inner_degree) for p in problems]
    gs = [padded(coefficients(verify(p.expanded, p.answer, domain="ZZ").outer), outer_degree) for p in problems]
    return {"prompt": [len(p.expanded.split()) for p in problems],
            "answer": [len(p.answer.split()) for p in problems],
            **{f"h{d}": c for d, c in enumerate(zip(*hs))}, **{f"g{d}": c for d, c in enumerate(zip(*gs))}}


@pytest.mark.parametrize("degrees", ["2_2", "2_3", "3_3", "4_4"])
def test_the_authors_distribution(shared, degrees):
    outer, inner = map(int, degrees.split("_"))
    theirs = parts(read_problems(shared / f"published/test_dataset_{degrees}.txt"), outer, inner)
    made = generate_problems(1000, outer, inner, seed=7)
    assert Counter(degree(p.expanded) for p in made) == {outer * inner: 1000}
    ours = parts(made, outer, inner)
    narrower = parts(generate_problems(1000, outer, inner, coefficient_bound=17, seed=7), outer, inner)
    def limits(numbers): return min(numbers), max(numbers)
    for name in theirs:
        assert ks_2samp(theirs[name], ours[name]).pvalue > 1e-3, name
        if name[0] in "gh": assert limits(ours[name]) == limits(theirs[name]) == (-20, 20), name
        else: assert abs(np.mean(ours[name]) / np.mean(theirs[name]) - 1) < 0.015, name
    smaller = ks_2samp(theirs["prompt"], narrower["prompt"]).pvalue
    assert smaller < 1e-3, "the comparison would not notice smaller coefficients"


def largest(p):
    "The largest coefficient of an answer's parts"
    return max(abs(int(c)) for part in p.answer.split(" & ") for c in parse(part).coeffs())


def shape(p):
    "What the published several-variable problems have in common"
    outer, *inners = p.answer.split(" & ")
    return (set(names(p.expanded)) <= {"a0", "a1", "a2"}, set(names(outer)) <= {"b0", "b1", "b2"},
            len(inners), degree(outer) <= 2,
            all(names(h) in ([], [f"a{i}"]) and degree(h) <= 2 for i, h in enumerate(inners)),
            largest(p) <= 20)


def test_the_authors_form_in_several_variables(shared):
    theirs, ours = read_problems(shared / "published/multi_variable_test.txt"), generate_multivariate(300, seed=3)
    assert {shape(p) for p in theirs} == {shape(p) for p in ours} == {(True, True, 3, True, True, True)}
    assert max(map(largest, theirs)) == max(map(largest, ours)) == 20


def test_the_authors_form_of_singlets(shared):
    for made in (read_problems(shared / "published/ON_data_test.txt"), generate_on_singlets(200, seed=3)):
        for p in made:  # each product of first components has its twin of second components
            h = parse(p.answer)
            numbers = [int(v[1:]) for v in h.context().names()]
            terms = {}
            for exponents, c in h.to_dict().items():
                factors = [[number] * int(e) for number, e in zip(numbers, exponents)]
                terms[tuple(sum(factors, []))] = c
            firsts = {pair: c for pair, c in terms.items() if pair[0] % 2}
            assert terms == firsts | {(u + 1, v + 1): c for (u, v), c in firsts.items()}, p.answer


@pytest.mark.parametrize("kind,vocabulary", [("2∘2", "single"), ("4∘4", "single"), ("canonical", "single"),
                                             ("multivariate", "multi"), ("singlets", "multi")])
def test_every_word_is_in_the_vocabulary(kind, vocabulary):
    from bgrpo_nb.policy.model import vocabularies
    assert {w for p in GENERATORS[kind](300, seed=4) for w in p.line.split()} <= set(vocabularies()[vocabulary])


@every_generator
def test_no_training_problem_is_held_out(kind):
    small = {} if kind == "4∘4" else {"coefficient_bound": 4}
    held_out = GENERATORS[kind](100, seed=9, **small)
    unaware = GENERATORS[kind](100, seed=9, **small)
    train = GENERATORS[kind](100, seed=9, exclude=map(rewritten, held_out), **small)
    assert set(keys(unaware)) & set(keys(held_out)), "without `exclude` there is an overlap"
    assert not set(keys(train)) & set(keys(held_out))
    assert len(set(keys(train))) == 100


def test_splits_share_no_polynomial():
    problems = generate_problems(300, 2, 2, seed=1)
    doubled = problems + [rewritten(p) for p in problems[:100]] + generate_multivariate(50, seed=1)
    train, validation, test = split(doubled, (0.8, 0.1, 0.1), seed=2)
    assert Counter(train + validation + test) == Counter(doubled)
    assert not any(set(keys(a)) & set(keys(b)) for a, b in ((train, validation), (train, test), (validation, test)))
    assert [len(set(keys(part))) for part in (train, validation, test)] == [280, 35, 35]
    assert split(doubled, (0.8, 0.1, 0.1), seed=2) == [train, validation, test]
    assert split(doubled, (0.8, 0.1, 0.1), seed=3) != [train, validation, test]
    with pytest.raises(ValueError, match="sum to 0.9"): split(problems, (0.5, 0.4))


def test_equal_polynomials_have_equal_keys():
    for p in generate_problems(50, 3, 2, seed=1) + generate_multivariate(30, seed=1):
        assert polynomial_key(p.expanded) == polynomial_key(rewritten(p).expanded)
    assert polynomial_key("^ a P 2") != polynomial_key("^ b P 2")
    assert polynomial_key("* a0 ^ a1 P 2") != polynomial_key("* ^ a0 P 2 a1")


@every_generator
def test_reading_undoes_writing(kind, tmp_path):
    made = GENERATORS[kind](40, seed=1) + [Problem("^ a P 4", "")]
    path = write_problems(tmp_path / "new folder/problems.txt", made)
    assert read_problems(path) == made and read_problems(path, limit=7) == made[:7]
    assert path.read_text(encoding="utf-8").splitlines() == [p.line for p in made] and made[-1].line == "^ a P 4 ⁇"


def test_published_files_are_read(shared):
    paths = [p for p in (shared / "published").glob("*.txt") if not p.name.startswith("predictions")]
    found = {p.name: read_problems(p) for p in paths}
    assert {name: len(problems) for name, problems in found.items()} == {
        "test_dataset_2_2.txt": 1000, "test_dataset_2_3.txt": 1000, "test_dataset_3_3.txt": 1000,
        "test_dataset_4_4.txt": 1000,
        "training_dataset_4_4_beam25_500samples.txt": 500, "multi_variable_test.txt": 500,
        "example_multi_test.txt": 200, "ON_data_test.txt": 200}
    assert all(verify_batch(*zip(*found["training_dataset_4_4_beam25_500samples.txt"]), domain="ZZ"))


GOOD = "+ P 1 * P 2 ^ a P 4 ⁇ ^ a P 2\n"


@pytest.mark.parametrize("line,fault", [
    ("+ P 1 * P 2 ^ a P 4", "one ⁇"), ("^ a P 4 ⁇ ^ a P 2 ⁇", "one ⁇"), ("^ a P 4 ? ^ a P 2 ⁇", "one ⁇"),
    ("+N10+*P9a⁇+N1a", "one ⁇"),
    ("+N10+*P9a ⁇ a", "token 1 ('+N10+*P9a')"), ("^ a P 4 ⁇ ^ aP2", "token 2 ('aP2')"),
    ("+ P 1 ^ a P ⁇ a", "token 6 ('P')"), ("P 7 ⁇ a", "a constant"),
    ("^ a P 4 ⁇ ^ b P 2 & + a", "token 1 ('+')"), ("^ a P 4 ⁇ & a", "token 1 ('&')"), ("⁇ a", "empty"),
    ("^ a P 9 9 9 9 ⁇ a", "exponent of 9999"),
])
def test_a_wrong_line_is_named(tmp_path, line, fault):
    path = tmp_path / "mine.txt"
    path.write_text(GOOD + "\n" + line + "\n" + GOOD, encoding="utf-8")
    with pytest.raises(PrefixError) as error: read_problems(path)
    message = str(error.value)
    assert message.startswith(f"{path}, line 3: ") and fault in message and "\n" not in message
    assert len(read_problems(path, limit=1)) == 1


def test_a_question_mark_separates_too_and_a_byte_order_mark_is_skipped(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("\ufeff" + GOOD.replace("⁇", "?").replace(" ", "  ") + "^ a P 6 ?\r\n", encoding="utf-8")
    assert read_problems(path) == [Problem("+ P 1 * P 2 ^ a P 4", "^ a P 2"), Problem("^ a P 6", "")]


def test_a_file_that_holds_no_problems(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("\n \n")
    with pytest.raises(PrefixError, match="holds no problem"): read_problems(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PrefixError, match="UTF-8"): read_problems(path)
    for nowhere in (tmp_path / "nowhere.txt", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no file"): read_problems(nowhere)


def test_writing_is_atomic(tmp_path, monkeypatch):
    made = generate_problems(20, 2, 2)
    path = write_problems(tmp_path / "problems.txt", made)
    def broken():
        yield from islice(made, 5)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): write_problems(path, broken())
    assert read_problems(path) == made
    def full(*paths): raise OSError("no space")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"): write_problems(path, made[:3])
    assert read_problems(path) == made


def test_filter_by_degree():
    problems = generate_multivariate(20)
    for degrees in ((2, 2), (2, 3), (3, 2), (2, 4)): problems += generate_problems(20, *degrees)
    random.Random(0).shuffle(problems)
    for d in range(2, 10): assert filter_by_degree(problems, d) == [p for p in problems if degree(p.expanded) == d]
    assert len(filter_by_degree(problems, 6)) == 40 and filter_by_degree(problems, 7) == []


@pytest.mark.parametrize("n_hard,n_easy,share,expected", [
    (30, 100, 0.5, (30, 30)), (100, 30, 0.25, (10, 30)), (10, 90, 0.1, (10, 90)), (7, 50, 0.3, (7, 16)),
    (5, 8, 0.0, (0, 8)), (5, 8, 1.0, (5, 0)), (0, 8, 0.5, (0, 0))])
def test_mix(n_hard, n_easy, share, expected):
    hard, easy = generate_problems(n_hard, 4, 4), generate_problems(n_easy, 2, 2)
    mixed = mix(hard, easy, share, seed=1)
    assert (len(filter_by_degree(mixed, 16)), len(filter_by_degree(mixed, 4))) == expected
    assert len(set(mixed)) == len(mixed) == sum(expected)
    assert mixed == mix(hard, easy, share, seed=1)
    if min(expected) > 5:
        assert mixed != mix(hard, easy, share, seed=2) and mixed != sorted(mixed, key=lambda p: -degree(p.expanded))


@pytest.mark.parametrize("call,fault", [
    (lambda: generate_problems(1, 1, 2), "trivial"), (lambda: generate_problems(-1, 2, 2), "negative"),
    (lambda: generate_problems(1, 2, 2, coefficient_bound=0), "coefficient"),
    (lambda: generate_problems(1, 2, 2, answer="outer"), "'inner' or 'both'"),
    (lambda: generate_multivariate(1, inner_degree=1), "trivial"),
    (lambda: generate_on_singlets(1, fields=1), "two fields"), (lambda: mix([], [], 1.5), "not a share"),
])
def test_settings_that_make_no_problems(call, fault):
    with pytest.raises(ValueError, match=fault): call()


def test_degrees_tell_what_verify_accepts():
    "Of random compositions, many of them trivial, degrees refuse exactly those that `verify` refuses"
    rng, found = random.Random(5), Counter()
    outer_ring, inner_ring = (fmpz_mpoly_ctx.get([f"{letter}{i}" for i in range(3)], Ordering.deglex) for letter in "ba")
    def drawn(generators, terms, degree):
        return sum(rng.randint(-3, 3) * rng.choice(generators) ** rng.randint(0, degree) for _ in range(terms))
    for _ in range(1000):
        g = drawn(outer_ring.gens(), 3, 2) + rng.randint(0, 1) * outer_ring.gens()[0] * outer_ring.gens()[1]
        hs = [drawn([a], 2, 2) + 0 * a for a in inner_ring.gens()]
        f = g.compose(*hs, ctx=inner_ring)
        if f.total_degree() < 1: continue
        by_degrees = is_decomposition_of_degrees(f.total_degree(), g.total_degree(), [h.total_degree() for h in hs])
        verdict = verify(to_prefix(f), " & ".join(map(to_prefix, [g, *hs])))
        assert by_degrees == verdict.valid, (g, hs, verdict)
        found[verdict.reason] += 1
    assert found["ok"] > 100 and found["trivial"] > 100
