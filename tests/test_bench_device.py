"The benchmark of a GPU at a trivial size: each case gives what its rival gives, and a case that fails is a line."
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import bench_device as bench  # noqa: E402


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(bench, "CUDA", False)
    monkeypatch.setattr(bench, "DEVICE", torch.device("cpu"))


def run(tmp_path, only="", seconds=300):
    written = []
    results, _ = bench.measure(seconds, True, lambda r: written.append(json.loads(json.dumps(r))), only)
    return results, written


@pytest.mark.parametrize("only,fields", [
    ("search 6x512 float32 K=2 B=2 P=12", ("times", "over_products", "tokens")),
    ("search qwen2.5-0.5b float32 K=3 B=2", ("times", "over_products", "tokens")),
    ("groups=4", ("times_rows", "times_rows_together", "times_packed", "tokens")),
    ("groups=1 P=12 C=6", ("times_rows", "trie_segments_seconds", "trie_dense_seconds")),
    ("step 6x512", ("times_trl_samples", "times_trl_beams", "times_trl_beams_together", "bgrpo_tokens"))])
def test_a_case_gives_what_its_rival_gives(tmp_path, only, fields):
    results, _ = run(tmp_path, only)
    rows = results["cases"].values()
    assert rows and not results["left_out"]
    for row in rows: assert row.get("agrees") is True and all(row[name] > 0 for name in fields), row


@pytest.mark.parametrize("whole,first,products,first_products,expected", [
    (0.9, 0.3, 0.6, 0.2, dict(step_seconds=0.2, step_over_products=1.5)),
    (0.9, 0.9, 0.6, 0.2, dict(step_seconds=None, step_over_products=None, over_bandwidth=None)),
    (0.9, 0.3, 0.6, 0.7, dict(step_seconds=0.2, step_over_products=None))])
def test_a_step_that_the_clock_cannot_tell_apart_is_not_measured(
        tmp_path, monkeypatch, whole, first, products, first_products, expected):
    "Its seconds are a difference of two times, each of which the machine may lengthen; one below 0 is no figure"
    other_form, generate = 0.8, 1.8
    times = iter([whole, other_form, first, products, first_products, generate])
    monkeypatch.setattr(bench, "bandwidth", lambda: 1e9)
    monkeypatch.setattr(bench, "products", lambda dtype: 1e9)
    monkeypatch.setattr(bench, "timed", lambda call, repeats: (next(times), call(), None))
    name = "search 6x512 float32 K=2 B=1 P=12 C=4"
    results, _ = run(tmp_path, name)
    row = results["cases"][name]
    assert {key: row[key] for key in expected} == expected
    assert (row["over_products"], row["times"], row["agrees"]) == (1.5, 2.0, True)
    sizes = replace(bench.TRIVIAL)                                       # of a GPU these would be verdicts
    goal = next(row for row in bench.judged(results["cases"], sizes) if "over its matrix products" in row["goal"])
    assert goal["verdict"] == ("not measured" if expected["step_over_products"] is None else "not met")


def test_a_case_that_disagrees_is_named(tmp_path, monkeypatch):
    "The check sees a wrong search: one whose scores are of other beams"
    import bgrpo_nb.search.generation as generation
    right = generation.beam_search
    def wrong(*args, **kwargs):
        found = right(*args, **kwargs)
        found.scores.add_(0.01)
        return found
    monkeypatch.setattr(generation, "beam_search", wrong)
    results, _ = run(tmp_path, "search 6x512 float32 K=2 B=1 P=12 C=4")
    assert [row["agrees"] for row in results["cases"].values()] == [False]
    assert any("disagree with their rival: ['search" in line for line in bench.summary(results, bench.TRIVIAL))


def test_a_failure_is_a_line_and_the_record_is_written_after_each_case(tmp_path, monkeypatch):
    def full(*args): raise torch.OutOfMemoryError("too large")
    def missing(*args): raise ModuleNotFoundError("No module named 'trl'")
    def odd(*args): raise RuntimeError("first line\nsecond line")
    monkeypatch.setattr(bench, "cases", lambda *_: iter([
        bench.Case("a", 1, full), bench.Case("b", 1, missing), bench.Case("c", 1, odd),
        bench.Case("d", 1, lambda b: dict(seconds=0.12345))]))
    results, written = run(tmp_path)
    rows = [{k: v for k, v in row.items() if k != "case_seconds"} for row in results["cases"].values()]
    assert rows == [dict(failed="out of memory"), dict(left_out="a package is missing: No module named 'trl'"),
                    dict(failed="RuntimeError: first line"), dict(seconds=0.123)]
    assert [len(w["cases"]) for w in written] == [1, 2, 3, 4]


def test_what_does_not_fit_is_listed(tmp_path, monkeypatch):
    "By the time that is left and the time that a case is expected to take"
    ran = []
    def case(name, seconds): return bench.Case(name, seconds, lambda b: ran.append(name) or {})
    monkeypatch.setattr(bench, "cases", lambda *_: iter([case("short", 1), case("long", 500), case("last", 2)]))
    monkeypatch.setattr(bench, "Sizes", lambda: bench.TRIVIAL)
    results, _ = bench.measure(60, False, lambda r: None)
    assert ran == ["short", "last"] and results["left_out"] == ["long"]


def test_goals_are_judged():
    sizes = bench.Sizes()
    half = "bfloat16" if bench.CUDA else "float32"
    done = {f"search 6x512 {half} K=16 B=1 P=512 C=64": dict(times=6.5, step_over_products=1.4)}
    verdicts = {row["goal"]: row["verdict"] for row in bench.judged(done, sizes)}
    assert verdicts["search 6x512, B=1: times generate"] == "met"
    assert verdicts["search 6x512, B=1: a step over its matrix products"] == "not met"
    assert verdicts["step 6x512, float32: times TRL with samples"] == "not measured" and len(verdicts) == 24


def test_every_size_has_a_case():
    "Widths, batches, lengths and sizes, and no name twice"
    names = [case.name for case in bench.cases(bench.Sizes(), 1.0)]
    assert len(set(names)) == len(names)
    searches = [name for name in names if name.startswith("search")]
    for size in bench.MODELS:
        for K in (16, 32, 128, 512):
            for B in (1, 8, 32): assert any(f"{size} float32 K={K} B={B} P=512 C=64" in name for name in searches)
        assert any(f"{size} float32 K=16 B=1 P=2048" in name for name in searches)
        assert any(f"{size} float32 K=16 B=1 P=512 C=512" in name for name in searches)
    assert {"vllm", "sglang", "gradients", "step", "supervised"} <= {name.split()[0] for name in names}


@pytest.mark.cuda
def test_packed_rows_by_varlen_are_full_rows(monkeypatch):
    monkeypatch.undo()
    model = bench.small_model(torch.bfloat16, True)
    ids = torch.randint(3, 31, (3, 20), device="cuda")
    with torch.no_grad(): a, b = bench.row_logps(model, ids, 6), bench.packed_logps(model, ids, 6, True)
    torch.testing.assert_close(a, b, atol=0.05, rtol=0)
