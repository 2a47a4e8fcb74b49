"""The library's front door: a polynomial as people write it in, its verified decompositions out."""
import re
from pathlib import Path
from typing import NamedTuple

from bgrpo_nb.solve.beam_filter import search_problems
from bgrpo_nb.algebra.problems import Problem
from bgrpo_nb.policy.model import VOCABULARIES, load_model, load_tokenizer, words_of
from bgrpo_nb.algebra.notation import from_sympy, from_text, to_sympy
from bgrpo_nb.algebra.exact_decomposition import decompose_exact
from bgrpo_nb.algebra.polynomial import PrefixError, TooLargeError, canonical_inner, find_variables


class Decomposition(NamedTuple):
    "f = outer(inner), verified"
    outer: str             # prefix notation in b; a rational coefficient reads `P 1 / P 2`
    inner: str             # prefix notation; several inner polynomials apart by &
    exact: bool            # found by the exact algorithm
    beam_place: int | None # first place in which the policy's beams have it, 1 = best; None where they do not
    score: float | None    # nats, of that beam
    variable: str = "a"    # what f was written in; prefix notation of one variable always has `a`

    def to_sympy(self): # (g, (h, ...)): SymPy expressions, h in the variable of f
        "The outer polynomial, and the inner ones"
        names, inners = find_variables(self.inner.split()), [to_sympy(part) for part in self.inner.split(" & ")]
        if len(names) == 1 and "&" not in self.inner: inners = [inners[0].subs(names[0], self.variable)]
        return to_sympy(self.outer), tuple(inners)

    def formulas(self, write=str) -> list[tuple[str, str]]: # (left side, right side), written by `write`
        "g and every h"
        g, inners = self.to_sympy()
        known = sorted(map(str, g.free_symbols), key=lambda v: int(v[1:] or 0)) or ["b"]
        slots = known if len(inners) == 1 else [f"b{i}" for i in range(len(inners))]
        return [(f"g({', '.join(slots)})", write(g)), *((f"h{i if len(inners) > 1 else ''}", write(h)) for i, h in enumerate(inners))]

    @property
    def found_by(self) -> str:
        beam = f"beam {self.beam_place} ({self.score:.2f} nats)" if self.beam_place else ""
        return " and ".join(filter(None, ["the exact algorithm" if self.exact else "", beam]))

    def __repr__(self): return f"Decomposition({', '.join(f'{left} = {right}' for left, right in self.formulas())}; by {self.found_by})"

    def _repr_latex_(self):
        from sympy import latex
        sides = [(re.sub(r"([bh])(\d+)", r"\1_{\2}", left), right) for left, right in self.formulas(latex)]
        return "$" + r",\quad ".join(f"{left} = {right}" for left, right in sides) + "$"

    def _repr_html_(self): return "<span class='math'>\\(" + self._repr_latex_()[1:-1] + f"\\)</span> <small>by {self.found_by}</small>"


class Decompositions(list):
    "A list of `Decomposition`, that shows itself"
    def __repr__(self): return "[" + ",\n ".join(map(repr, self)) + "]"

    def _repr_latex_(self): return r"$\begin{array}{l}" + r" \\ ".join(d._repr_latex_()[1:-1] for d in self) + r"\end{array}$" if self else "no decomposition"

    def _repr_html_(self): return "".join(f"<p>{d._repr_html_()}</p>" for d in self) or "<p>no decomposition</p>"


def read_polynomial(f): # (prefix notation in the policy's variables, the variable that f was written in)
    "SymPy expression, ordinary notation or prefix notation -> prefix notation; ValueError says what was expected"
    if not isinstance(f, str): return _rename(from_sympy(f))
    try: return _rename(from_text(f.strip().rstrip("⁇")))
    except TooLargeError: raise
    except PrefixError as e: raise ValueError(f"{f[:60]!r} is neither prefix notation nor an expression such as x**4 + 2*x**2 + 1: {e}") from None


def _rename(text): # one variable is always `a`
    names = find_variables(text.split())
    return " ".join("a" if len(names) == 1 and t == names[0] else t for t in text.split()), names[0] if len(names) == 1 else "a"


def decompose(f,          # SymPy expression, text such as "x**4 + 2*x**2 + 1", or prefix notation
              model=None, # a policy, its name or folder; default: the bundled one for as many variables as f has
              num_beams: int = 25) -> list[Decomposition]: # up to equivalence of the inner polynomial; empty where there is none
    "Decompose a polynomial: exact where that is possible (one variable), by the policy's beams; every answer verified"
    problem, variable = read_polynomial(f)
    univariate = len(find_variables(problem.split())) == 1
    found = {}
    if univariate:
        for outer, inner in decompose_exact(problem): found[canonical_inner(inner)] = Decomposition(outer, inner, True, None, None, variable)
    if model is None: model = "small" if univariate else "multivariate"
    named = isinstance(model, (str, Path))
    policy, tokenizer = load_model(model) if named else model, load_tokenizer(model if named else _words_of(model))
    try: searched = search_problems(policy, tokenizer, [Problem(problem, "")], num_beams, max_new_tokens=min(64, max(16, len(problem.split()))))[0]
    except ValueError:  # words or a length that the policy does not know
        if not univariate: raise
        return Decompositions(found.values())
    for place, (text, score, verdict) in enumerate(zip(searched.texts, searched.scores, searched.verdicts), 1):
        if not verdict: continue
        inner = text.split(" & ", 1)[-1]  # several inner polynomials stand after the outer one
        key = " & ".join(map(canonical_inner, inner.split(" & ")))
        if key not in found: found[key] = Decomposition(verdict.outer, inner, False, place, score, variable)
        elif found[key].beam_place is None: found[key] = found[key]._replace(beam_place=place, score=score)
    return Decompositions(found.values())


def _words_of(model): # the vocabulary whose size the model has
    return next((name for name in VOCABULARIES if len(words_of(name)) == model.config.vocab_size), "multi")
