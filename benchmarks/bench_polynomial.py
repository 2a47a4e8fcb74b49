"""`verify` in microseconds per completion on one core, against the SymPy reference on the same completions.

Problems of degree 16 (4∘4, coefficients in [-20, 20]); every figure is the best of alternating passes over the
completions of one kind. Targets: 60 µs for an answer of possible degree, 20 µs for a malformed answer or one of a
wrong degree."""
import random
import time

from _record import record

from bgrpo_nb.algebra.problems import generate_problems
from bgrpo_nb.algebra.notation import verify_with_sympy
from bgrpo_nb.algebra.polynomial import PrefixError, canonical_inner, coefficients, format_prefix, verify

FITTING, OTHER = 60, 20


def operators_first(h, rng):
    "The same polynomial written as + + + t t t t instead of + t + t + t t"
    return "+ " * h.count("+") + h.replace("+ ", "")


def changed(h, rng):
    "One coefficient off by one"
    p = coefficients(h)
    p[rng.randrange(1, 4)] += rng.choice([-1, 1])
    return format_prefix(p)


def without(h, kind, rng):
    "The answer without one token of a kind"
    words = h.split()
    at = rng.choice([i for i, w in enumerate(words) if kind(w)])
    return " ".join(words[:at] + words[at + 1:])


def with_word(h, word, rng):
    "The answer with one token replaced"
    words = h.split()
    words[rng.randrange(len(words))] = word
    return " ".join(words)


KINDS = {  # name -> target, reason or reasons, completion from a right answer
    "right": (FITTING, "ok", lambda h, rng: h),
    "right, canonical": (FITTING, "ok", lambda h, rng: canonical_inner(h)),
    "right, operators first": (FITTING, "ok", operators_first),
    "off by one": (FITTING, "not_a_decomposition", changed),
    "degree 3": (OTHER, "degree_mismatch", lambda h, rng: format_prefix(coefficients(h)[:3] + [rng.randint(1, 20)])),
    "degree 5": (OTHER, "degree_mismatch", lambda h, rng: format_prefix(coefficients(h) + [rng.randint(1, 20)])),
    "cut off": (OTHER, "not_prefix_notation", lambda h, rng: h.rsplit(" ", rng.randint(6, 12))[0] + " *"),
    "operator missing": (OTHER, "not_prefix_notation", lambda h, rng: without(h, "+*^".__contains__, rng)),
    "sign missing": (OTHER, "not_prefix_notation", lambda h, rng: without(h, "PN".__contains__, rng)),
    "operator too many": (OTHER, "not_prefix_notation", lambda h, rng: "+ " + h),
    "operand too many": (OTHER, "not_prefix_notation", lambda h, rng: h + " P 1"),
    "digits missing": (OTHER, "not_prefix_notation", lambda h, rng: h + " P"),
    "strange word": (OTHER, "not_prefix_notation", lambda h, rng: with_word(h, "□", rng)),
    "never ended": (OTHER, "not_prefix_notation", lambda h, rng: None),
}


def microseconds(passes, *work):
    "Best microseconds a pair for each (function, pairs), in turns, after one unmeasured pass"
    best = [float("inf")] * len(work)
    for turn in range(passes + 1):
        for i, (f, pairs) in enumerate(work):
            start = time.perf_counter()
            for problem, completion in pairs: f(problem, completion)
            if turn: best[i] = min(best[i], (time.perf_counter() - start) / len(pairs) * 1e6)
    return best


def by_reference(problem, completion):
    "What SymPy says; text that cannot be read is wrong"
    if completion is None: return False
    try: return verify_with_sympy(problem, completion)
    except PrefixError: return False


def main():
    problems, rng, results = generate_problems(400, 4, 4, seed=1), random.Random(0), {}
    for name, (target, reason, make) in KINDS.items():
        pairs = [(p.expanded, make(p.answer, rng)) for p in problems]
        for pair in pairs: assert verify(*pair).reason == reason, (name, pair, verify(*pair))
        few = pairs[:12]
        assert [by_reference(*pair) for pair in few] == [verify(*pair).valid for pair in few]
        ours, theirs = microseconds(7, (verify, pairs))[0], microseconds(2, (by_reference, few))[0]
        results[name] = dict(microseconds=round(ours, 1), target=target,
                             sympy_microseconds=round(theirs), speedup=round(theirs / ours))
        print(f"{name:<24}{ours:7.1f} µs (target {target}), SymPy {theirs:9.0f} µs", flush=True)
    unseen = generate_problems(3000, 4, 4, seed=2)  # more than the cache holds, so each problem is read again
    ours, = microseconds(3, (verify, [(p.expanded, p.answer) for p in unseen]))
    results["right, problem read anew"] = dict(microseconds=round(ours, 1))
    print(f"{'right, problem read anew':<24}{ours:7.1f} µs")
    record("polynomial", results)


if __name__ == "__main__": main()
