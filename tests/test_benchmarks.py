"What the benchmarks check before they time anything, and what tests run on."
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import conftest
from _beams import same_beams

SEQUENCES = torch.tensor([[[1, 2], [1, 3], [2, 2], [3, 1], [3, 3]]])
SCORES = torch.tensor([[-1.0, -2.0, -2.0001, -3.0, -3.5]])


@pytest.mark.parametrize("order, same", [
    ([0, 1, 2, 3, 4], True), ([0, 2, 1, 3, 4], True), ([1, 0, 2, 3, 4], False), ([0, 1, 3, 2, 4], False)])
def test_close_beams_may_change_places_and_no_others(order, same):
    assert same_beams(SEQUENCES, SCORES, SEQUENCES[:, order], SCORES) is same


def test_other_scores_and_other_sequences_are_seen():
    nudged = SCORES + torch.tensor([[0, 0, 0, 5e-4, 0]])
    assert same_beams(SEQUENCES, SCORES, SEQUENCES, nudged)
    assert not same_beams(SEQUENCES, SCORES, SEQUENCES, SCORES + 2e-3)
    assert not same_beams(SEQUENCES, SCORES, SEQUENCES + torch.tensor([1, 0]), SCORES)


@pytest.mark.parametrize("asked, seen", [("", ""), ("slow", ""), ("not cuda", ""), ("cuda", "7"), ("slow or cuda", "7")])
def test_only_tests_that_ask_for_a_device_see_one(asked, seen, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    conftest.pytest_configure(SimpleNamespace(getoption={"-m": asked}.get))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
