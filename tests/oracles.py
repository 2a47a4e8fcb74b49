"Slow and obvious forms that share no code with the package; tests compare its fast ones with them."
import random
import re
from fractions import Fraction

NUMBER = re.compile(r"([PN])((?: \d)+)(?: / P((?: \d)+))?")


def value(text, point):
    "Recursive evaluation of prefix notation at `point`, variable -> number"
    def plain(m): return (m[1].replace("P", "").replace("N", "-") + m[2] + "/" + (m[3] or "1")).replace(" ", "")
    words = iter(NUMBER.sub(plain, text).split())
    def read():
        word = next(words)
        if word in ("+", "*", "^"):
            a, b = read(), read()
            return a + b if word == "+" else a * b if word == "*" else a ** int(b)
        return point[word] if word in point else Fraction(word)
    result = read()
    assert next(words, None) is None
    return result


def names(text): return sorted(set(re.findall(r"[a-z]\d*", text)))


def agrees(f, outer, inners, rng=random.Random(0)):
    "Whether f = outer(inner0, inner1, ...) at three random points; different polynomials differ at nearly every point"
    for _ in range(3):
        point = {v: rng.randrange(10**6, 10**9) for text in (f, *inners) for v in names(text)}
        values = [value(h, point) for h in inners]
        slots = {f"b{i}": v for i, v in enumerate(values)} | {"b": values[0]}
        if value(f, point) != value(outer, slots): return False
    return True


def compose(g, h):
    "Coefficients of g(h), schoolbook; ascending, like all coefficients here"
    out = [g[-1]]
    for c in reversed(g[:-1]):
        product = [0] * (len(out) + len(h) - 1)
        for i, a in enumerate(out):
            for j, b in enumerate(h): product[i + j] += a * b
        product[0] += c
        out = product
    return out


def draw(rng, degree, bound):
    "Random coefficients, the leading one not 0"
    lower = [rng.randint(-bound, bound) for _ in range(degree)]
    return [*lower, rng.choice([-1, 1]) * rng.randint(1, bound)]
