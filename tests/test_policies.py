"The bundled policies do what their recordings say"
import json
from pathlib import Path

import pytest

from bgrpo_nb import decompose
from bgrpo_nb.algebra.problems import generate_multivariate, generate_problems
from bgrpo_nb.solve.evaluation import evaluate, wilson
from bgrpo_nb.base.assets import ASSETS
from bgrpo_nb.policy.model import load_model, load_tokenizer
from bgrpo_nb.algebra.notation import to_sympy
from bgrpo_nb.algebra.polynomial import verify

RECORD = json.loads((Path(__file__).parents[1] / "nbs/experiments/policies/record.json").read_text())
NAMES = ("tiny", "small", "multivariate")


def matches(found, metric, recorded):
    "The sample's 95 % interval meets the recording's"
    low, high = wilson(round(found.metrics[metric] * len(found)), len(found))
    _, recorded_low, recorded_high = recorded[metric]
    said = f"{metric}: {found.metrics[metric]:.3f} of {len(found)}, recorded {recorded[metric]}"
    assert low <= recorded_high and recorded_low <= high, said


def measure(name, problems, **settings):
    "An evaluation of a bundled policy"
    return evaluate(load_model(name, device="cpu"), load_tokenizer(name), problems, num_samples=1, **settings)


@pytest.mark.parametrize("degrees", ["2_2", "2_4", "3_3", "4_2", "4_4"])
def test_small_does_what_its_recording_says(degrees):
    "Other problems than the recording's, by the same rule"
    problems = generate_problems(60, *map(int, degrees.split("_")), seed=70_000)
    found = measure("small", problems, domain="ZZ", wide_beams=11)
    for metric in ("greedy_accuracy", "beam_accuracy"): matches(found, metric, RECORD["figures"][degrees])


def test_several_variables_as_recorded():
    problems = generate_multivariate(60, 3, 2, 2, seed=70_000, canonical=True)
    found = measure("multivariate", problems, domain="ZZ", wide_beams=11)
    recorded = RECORD["several_variables"]["generated"]
    for metric in ("greedy_accuracy", "beam_accuracy"): matches(found, metric, recorded)


def test_a_recording_that_is_wrong_is_noticed():
    problems = generate_problems(60, 2, 2, seed=70_000)
    found = measure("tiny", problems, num_beams=2, wide_beams=3)
    matches(found, "greedy_accuracy", {"greedy_accuracy": [1.0, 0.98, 1.0]})
    wrong = {"greedy_accuracy": [0.5, 0.45, 0.55]}
    with pytest.raises(AssertionError, match="recorded"): matches(found, "greedy_accuracy", wrong)


@pytest.mark.parametrize("name", NAMES)
def test_a_bundle_is_small_and_says_how_it_was_made(name):
    assert (ASSETS / name / "model.safetensors").stat().st_size < 12e6
    assert sum(p.numel() for p in load_model(name, device="cpu").parameters()) <= 5e6
    parts = json.loads((ASSETS / name / "training.json").read_text())["parts"]
    for part in parts:
        assert part["command"].startswith(("bgrpo ", "python nbs/experiments/")) and part["result"]["machine"]["cpu"]


def test_decompose_asks_the_policy_for_as_many_variables_as_there_are():
    one = generate_problems(1, 3, 3, seed=70_001)[0].expanded
    assert decompose(one)[0].exact
    solved = 0
    for p in generate_multivariate(5, 3, 2, 2, seed=70_001, canonical=True):
        for found in decompose(to_sympy(p.expanded)):
            assert not found.exact and len(found.to_sympy()[1]) == 3
            assert verify(p.expanded, f"{found.outer} & {found.inner}")
            solved += 1
    assert solved
