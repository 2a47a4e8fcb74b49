"""Problem lines a second on one core at degrees 2∘2 and 4∘4, against a plain SymPy generator in the same run.

Targets: 100,000 and 40,000 lines a second. The reference composes the same polynomials and writes the same lines."""
import time

import sympy
from _record import record

from bgrpo_nb.algebra.problems import generate_problems
from bgrpo_nb.algebra.polynomial import coefficients

A = sympy.Symbol("a")


def number(c): return ("P " if c >= 0 else "N ") + " ".join(str(abs(c)))


def term(c, d):
    if d == 0: return number(c)
    if d == 1: return f"* {number(c)} a"
    return f"* {number(c)} ^ a {number(d)}"


def prefix(expression):
    "Prefix notation of a SymPy polynomial, terms ascending"
    terms = [term(int(c), d) for (d,), c in reversed(sympy.Poly(expression, A).terms())]
    return "".join(f"+ {t} " for t in terms[:-1]) + terms[-1]


def slow_line(g, h):
    "One problem line: substitute, expand, write"
    inner = sum(c * A**k for k, c in enumerate(h))
    expanded = sympy.expand(sum(c * inner**k for k, c in enumerate(g)))
    return f"{prefix(expanded)} ⁇ {prefix(inner)}"


def fast_lines(n, outer, inner, seed):
    "Problem lines as one text"
    return "".join(p.line + "\n" for p in generate_problems(n, outer, inner, seed=seed))


def main():
    results = {}
    for outer, inner, n, few, target in ((2, 2, 100_000, 150, 100_000), (4, 4, 50_000, 40, 40_000)):
        drawn = generate_problems(few, outer, inner, seed=1, answer="both")
        parts = [[coefficients(part) for part in p.answer.split(" & ")] for p in drawn]
        ours, theirs = [], []
        for seed in range(1, 6):
            start = time.perf_counter()
            lines = fast_lines(n, outer, inner, seed)
            ours.append(n / (time.perf_counter() - start))
            assert lines.count("\n") == n
            start = time.perf_counter()
            slow = [slow_line(g, h) for g, h in parts]
            theirs.append(few / (time.perf_counter() - start))
            assert slow == fast_lines(few, outer, inner, 1).splitlines(), "the two write different lines"
        a, b = max(ours), max(theirs)
        results[f"{outer}∘{inner}"] = dict(lines_per_second=round(a), target=target,
                                           sympy_lines_per_second=round(b), speedup=round(a / b))
        print(f"{outer}∘{inner}: {a:,.0f} lines/s (target {target:,}), SymPy {b:,.0f}", flush=True)
    record("data", results)


if __name__ == "__main__": main()
