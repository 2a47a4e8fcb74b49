"How each family of Transformers is searched: what the page of the beam tree says is what is found, and it is right."
import json
import logging
import warnings

import pytest
import torch

from families import RECORD, examine, families

RECORDED = json.loads(RECORD.read_text())["families"]
FEW = ("bart", "bloom", "gemma3_text", "gpt2", "gpt_oss", "llava", "mamba", "minimax", "mixtral", "phi3", "roberta",
       "qwen3")


def agrees(family):
    logging.disable(logging.WARNING)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = examine(family)
    finally:
        logging.disable(logging.NOTSET)
        torch.set_num_threads(threads)
    return found == RECORDED[family] and found.get("right", True)


@pytest.mark.parametrize("family", FEW)
def test_a_few_families(family): assert RECORDED[family]["found"] in ("tree", "rows", "whole texts") and agrees(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_every_family(family): assert agrees(family)


def test_every_family_that_is_searched_finds_what_a_loop_without_a_cache_finds():
    searched = {name: x for name, x in RECORDED.items() if x["found"] in ("tree", "rows", "whole texts")}
    assert set(RECORDED) == set(families()) and len(searched) > 150
    assert all(x["right"] for x in searched.values())
    assert {x["found"] for x in RECORDED.values()} == {"tree", "rows", "whole texts", "not built"}
