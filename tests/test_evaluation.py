"Many policies on test sets, results that survive a kill, files that agree with each other, and `decompose`."
import csv
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import sympy
import torch
from scipy import stats

from bgrpo_nb.solve.beam_filter import search_problems
from bgrpo_nb.cli import main
from bgrpo_nb.algebra.problems import generate_problems, read_problems, write_problems
from bgrpo_nb.solve.decomposition import Decomposition, decompose
from bgrpo_nb.solve.evaluation import METRICS, Report, ProblemResult, bootstrap, compare, evaluate, wilson
from bgrpo_nb.solve.result_store import ResultStore, policy_fingerprint
from bgrpo_nb.policy.model import load_model, load_tokenizer, save_model
from bgrpo_nb.algebra.polynomial import verify
from bgrpo_nb.solve.test_sets import PUBLISHED, evaluate_files, policy_names, published_degrees, published_figures, short_names

HAS_GIT = (Path(__file__).parent.parent / ".git").exists()
SMALL = dict(num_beams=4, wide_beams=6, num_samples=3, curve_beams=10)
FLAGS = [word for name, k in SMALL.items() for word in (f"--{name}", str(k))]


def evaluate_in_a_process(*words, cwd):
    command = [sys.executable, "-m", "bgrpo_nb", "evaluate", *map(str, words)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def files(folder):
    "Relative path -> content"
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def undated(found):
    "The same files without dates"
    return {name: re.sub(rb"\d{4}-\d\d-\d\d", b"", content) for name, content in found.items()}


def tiny_on(problems, **settings):
    return evaluate(load_model("tiny", device="cpu"), load_tokenizer("tiny"), problems, **settings)


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    "The bundled policy, and one whose output layer is disturbed"
    folder, other = tmp_path_factory.mktemp("policies"), load_model("tiny", device="cpu")
    weight = other.lm_head.weight
    with torch.no_grad(): weight += 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    save_model(other, load_tokenizer("tiny"), folder / "disturbed")
    return {"tiny": "tiny", "disturbed": str(folder / "disturbed")}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    write_problems(folder / "2_2.txt", generate_problems(12, 2, 2, seed=61))
    write_problems(folder / "mixed.txt", generate_problems(5, 3, 2, seed=62) + generate_problems(5, 2, 3, seed=62))
    return folder


@pytest.fixture(scope="module")
def results(policies, sets, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return evaluate_files(list(policies.values()), [sets], out, **SMALL), out


def test_every_policy_meets_every_test_set(policies, sets, results):
    found, out = results
    tokenizer = load_tokenizer("tiny")
    assert list(found.reports) == [(m, f) for m in ("tiny", "disturbed") for f in ("2_2", "mixed")]
    for (model, file), report in found.reports.items():
        problems, policy = read_problems(sets / f"{file}.txt"), load_model(policies[model], device="cpu")
        assert [r.expanded for r in report.rows] == [p.expanded for p in problems]
        if (model, file) == ("disturbed", "2_2"):
            assert evaluate(policy, tokenizer, problems, **SMALL).rows == report.rows
        assert Report.from_json(out / f"reports/{model}/{file}.json").rows == report.rows
        wide = search_problems(policy, tokenizer, problems, 10)
        assert [r.curve_place for r in report.rows] == [s.first_valid or 0 for s in wide]
        narrow = search_problems(policy, tokenizer, problems, 4)
        assert [r.beam_reasons for r in report.rows] == [" ".join(v.reason for v in s.verdicts) for s in narrow]
    before, after = (found.reports[m, "2_2"] for m in ("tiny", "disturbed"))
    assert before.rows != after.rows, "the two policies differ, so their reports must"
    differences = {(d["file"], d["metric"]): d for d in found.differences()}
    assert set(differences) == {(f, m) for f in ("2_2", "mixed") for m in METRICS}
    scored = differences["2_2", "beam_rank_score"]
    assert (scored["difference"], scored["low"]) == compare(before, after)[:2]


def test_the_summary_names_what_was_measured(results):
    _, out = results
    summary = json.loads((out / "results.json").read_text())
    about = summary["about"]
    assert about["seed"] == 0 and about["versions"]["torch"] == version("torch") and bool(about["commit"]) == HAS_GIT
    assert {r["data"]["n"] for r in summary["reports"]} == {12, 10}
    for report in summary["reports"]: assert len(report["data"]["sha256"]) == len(report["fingerprint"]) == 64


def test_table_and_csv_agree_with_the_reports(results):
    found, out = results
    table = json.loads((out / "results.json").read_text())["table"]
    with (out / "results.csv").open() as file: lines = list(csv.DictReader(file))
    assert len(lines) == len(table) == 2 * 2 * len(METRICS) + 2
    for line, row in zip(lines, table, strict=True):
        assert {k: str(v) for k, v in row.items()} == line
        if row["source"] == "measured":
            report, metric = found.reports[row["model"], row["file"]], row["metric"]
            assert (row["value"], row["low"], row["high"]) == (report.metrics[metric], *report.interval(metric))
            assert row["low"] <= row["value"] <= row["high"]
        else:
            n = len(found.reports["tiny", row["file"]])
            assert (row["model"], row["value"], row["n"]) == ("exact algorithm", 1.0, n)


def test_the_page_has_every_value(results):
    _, out = results
    text = (out / "results.md").read_text()
    for row in json.loads((out / "results.json").read_text())["table"]:
        form = ".3f" if "score" in row["metric"] else ".1%"
        shown = f"{row['value']:{form}} [{row['low']:{form}}, {row['high']:{form}}]"
        assert f"| {row['model']} | {row['n']} |" in text and shown in text
    for title in ("# Evaluation", "## 2_2", "## mixed", "## Differences from tiny", "## Why beams fail",
                  "k best of one wide search are not a search of width k"):
        assert title in text
    table = [line for line in text.split("## 2_2")[1].split("## mixed")[0].splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1, "every line has the same number of cells"
    for name in ("degrees", "widths", "places", "reasons"):
        image = (out / f"plots/{name}.png").read_bytes()
        assert image[:4] == b"\x89PNG" and len(image) > 5000


def test_figures_need_no_torch(results, tmp_path):
    _, out = results
    code = ("import json, pathlib, sys; from bgrpo_nb.solve.evaluation_report import draw; "
            "draw(json.loads(pathlib.Path(sys.argv[1]).read_text()), sys.argv[2]); assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code, out / "results.json", tmp_path / "plots"], check=True)
    assert files(tmp_path / "plots") == files(out / "plots")


def test_plot_redraws_from_the_files_alone(results, tmp_path, capsys):
    _, out = results
    (tmp_path / "results.json").write_bytes((out / "results.json").read_bytes())
    assert main(["plot", str(tmp_path)]) == 0 and "plots/widths.png" in capsys.readouterr().out
    assert files(tmp_path / "plots") == files(out / "plots")
    for words in ([], ["--out", str(tmp_path / "plots")]): # a folder without a mark, and one that is named
        (tmp_path / "plots/widths.png").write_text("mine")
        assert main(["plot", str(tmp_path), *words]) == 2 and "replace it with --overwrite" in capsys.readouterr().err
        assert (tmp_path / "plots/widths.png").read_text() == "mine"
        assert main(["plot", str(tmp_path), *words, "--overwrite"]) == 0 and files(tmp_path / "plots") == files(out / "plots")
    assert main(["plot", str(out)]) == 0, "its own figures are drawn again"
    capsys.readouterr()
    for torn in ('{"reports": 3}', '{"repor'):
        (tmp_path / "results.json").write_text(torn)
        assert main(["plot", str(tmp_path)]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and "run that again" in said[0]


def test_a_killed_evaluation_continues(sets, tmp_path):
    "After kill -9, with an incomplete line: every complete line is used, and the files equal those of a whole run"
    def whole_run(name): return evaluate_files(["tiny"], [sets / "mixed.txt"], tmp_path / name, batch_size=1, **SMALL)
    def lines(name): return sum(p.read_bytes().count(b"\n") for p in (tmp_path / name / "store").glob("*.jsonl"))
    words = ["--problems", sets / "mixed.txt", *FLAGS, "--batch_size", 1, "--out", "killed"]
    process, deadline = evaluate_in_a_process(*words, cwd=tmp_path), time.monotonic() + 900
    while lines("killed") < 14 and process.poll() is None and time.monotonic() < deadline: time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=900) == -signal.SIGKILL and not (tmp_path / "killed/results.json").exists()
    found = {p: p.read_bytes() for p in (tmp_path / "killed/store").glob("*.jsonl")}
    first = next(p for p in found if p.name.startswith("beams-1-"))
    with first.open("ab") as file: file.write(b'{"problem": 3, "reasons": "ok')
    there = lines("killed")
    whole_run("whole")
    assert 14 <= there < lines("whole")
    whole_run("killed")
    for path, before in found.items():
        complete = before.rpartition(b"\n")[0]
        assert path.read_bytes().startswith(complete), "nothing that was found is computed again"
    assert undated(files(tmp_path / "killed")) == undated(files(tmp_path / "whole"))


def test_a_second_run_computes_nothing(policies, sets, results, monkeypatch):
    found, out = results
    before = files(out)
    import bgrpo_nb.solve.evaluation as module
    def never(*args, **kwargs): raise AssertionError("searched again")
    for name in ("beam_search", "sample"): monkeypatch.setattr(module, name, never)
    again = evaluate_files(list(policies.values()), [sets], out, **SMALL)
    assert again.table() == found.table() and undated(files(out)) == undated(before)
    for changed in (dict(domain="ZZ"), dict(allow_trivial=True), dict(seed=1), dict(temperature=0.5),
                    dict(num_beams=5), dict(num_samples=4)):
        with pytest.raises(AssertionError, match="searched again"):
            evaluate_files(["tiny"], [sets / "2_2.txt"], out, **SMALL | changed)


def test_only_what_is_missing_is_computed(policies, sets, tmp_path, monkeypatch):
    import bgrpo_nb.solve.evaluation as module
    asked, search = [], module.beam_search # asked: (prompts, beams) of each search

    def counted(model, ids, *args, **kwargs):
        asked.append((len(ids), kwargs["num_beams"]))
        return search(model, ids, *args, **kwargs)

    monkeypatch.setattr(module, "beam_search", counted)
    few = dict(SMALL, max_new_tokens=20)
    evaluate_files(["tiny"], [sets / "2_2.txt"], tmp_path, limit=5, **few)
    assert asked == [(5, 1), (5, 4), (5, 6), (5, 10)]
    asked.clear()
    wider = few | dict(wide_beams=8)
    grown = evaluate_files(["tiny"], [sets / "2_2.txt"], tmp_path, **wider) # seven more problems, and another width
    assert asked == [(7, 1), (7, 4), (12, 8), (7, 10)]
    assert grown.reports["tiny", "2_2"].rows == tiny_on(read_problems(sets / "2_2.txt"), **wider).rows
    asked.clear()
    (tmp_path / "renamed.txt").write_bytes((sets / "2_2.txt").read_bytes())
    evaluate_files(["tiny"], [tmp_path / "renamed.txt"], tmp_path, **few)
    assert asked == [(12, 6)] or asked == [(7, 6)], "a file is known by its content"
    evaluate_files([policies["disturbed"]], [tmp_path / "renamed.txt"], tmp_path, curve_problems=3, **few)
    assert asked[1:] == [(12, 1), (12, 4), (12, 6), (3, 10)], "another policy is measured"


def test_a_report_is_replaced_by_the_same_evaluation_alone(policies, sets, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    def status(problems="2_2", limit="2", flags=FLAGS, more=()):
        return main(["evaluate", "--problems", str(sets / f"{problems}.txt"), "--limit", limit, *flags, "--out", "r.json", *more])
    assert status() == 0
    report = Path("r.json").read_bytes()
    assert status() == 0 and json.loads(Path("r.json").read_bytes())["rows"] == json.loads(report)["rows"], "it continues"
    report = Path("r.json").read_bytes()
    for other in (dict(problems="mixed"), dict(limit="3"), dict(flags=FLAGS[:-2]), dict(flags=[*FLAGS[:-1], "0"]), dict(more=["--seed", "1"]),
                  dict(more=["--model", policies["disturbed"]]), dict(more=["--domain", "ZZ"]), dict(more=["--allow_trivial"])):
        assert status(**other) == 2 and "r.json exists; choose another name" in capsys.readouterr().err, other
        assert Path("r.json").read_bytes() == report
    for mine in ("mine", "[]", '{"rows": [], "settings": {}, "model": {}}'):
        Path("r.json").write_text(mine)
        assert status() == 2 and Path("r.json").read_text() == mine, "beside the folder of an evaluation"
    assert status(more=["--overwrite"]) == 0 and Path("r.json").stat().st_size > 100


def test_two_evaluations_do_not_write_one_file(tmp_path):
    store = ResultStore(tmp_path, model="m", data="d")
    with store.open("beams-3", width=3) as lines:
        lines.add({4: {"reasons": "ok"}})
        with pytest.raises(OSError, match="another evaluation writes to .*choose another --out"):
            with store.open("beams-3", width=3): pass
        with store.open("beams-3", width=3, domain="ZZ") as others: assert others.found == {}
    with store.open("beams-3", width=3) as lines: assert lines.found == {4: {"reasons": "ok"}}
    lines.path.write_text("no JSON\n")
    with store.open("beams-3", width=3) as lines: assert lines.found == {}


def test_a_fingerprint_depends_on_weights_and_vocabulary_not_on_the_folder(policies, tmp_path):
    tokenizer, tiny = load_tokenizer("tiny"), load_model("tiny", device="cpu")
    save_model(tiny, tokenizer, tmp_path / "copy")
    copy, disturbed = (load_model(path, device="cpu") for path in (tmp_path / "copy", policies["disturbed"]))
    expected = policy_fingerprint(tiny, tokenizer)
    assert policy_fingerprint(copy, load_tokenizer(tmp_path / "copy")) == expected
    assert policy_fingerprint(disturbed, tokenizer) != expected
    assert policy_fingerprint(tiny, load_tokenizer("multi")) != expected


@pytest.mark.parametrize("words,says", [
    (["--problems", "nowhere.txt"], "no file nowhere.txt; `bgrpo generate` makes one"),
    (["--problems", "empty"], "holds no .txt file of problems; `bgrpo generate empty/2_2.txt` makes one"),
    (["--problems", "bare.txt"], "bare.txt holds no answers"),
    (["--problems", "good.txt", "--model", "tiny", "broken"], "is the folder complete?"),
    (["--problems", "good.txt", "bare.txt", "--out", "r.json"], "name a folder for --out"),
    (["--problems", "good.txt", "--out", "good.txt/x"], "choose another --out"),
    (["--problems", "good.txt", "--num_beams", "0"], "no whole number"),
    (["--problems", "good.txt", "--curve_beams", "-3"], "no whole number")])
def test_bad_input_is_one_line(words, says, tmp_path, capsys, monkeypatch):
    write_problems(tmp_path / "good.txt", generate_problems(3, 2, 2, seed=5))
    (tmp_path / "bare.txt").write_text("+ P 1 ^ a P 4 ⁇\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *words]) == 2
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if line.startswith("bgrpo")]
    assert not out and len(said) == 1 and says in said[0], err


def test_files_without_answers_on_request(tmp_path):
    out = tmp_path / "out"
    (tmp_path / "bare.txt").write_text("".join(p.expanded + " ⁇\n" for p in generate_problems(4, 2, 2, seed=5)))
    found = evaluate_files(["tiny"], [tmp_path / "bare.txt"], out, without_answers=True, **SMALL)
    assert list(found.reports["tiny", "bare"].by_degree()) == ["4"]
    assert (out / "plots/reasons.png").exists() and not (out / "plots/degrees.png").exists()


def test_the_curve_is_the_k_best_of_one_search():
    def within(place, k): return place if place and place <= k else None
    places, own = [1, 3, None, 2, 9], [True, False, False, True, False]
    rows = [ProblemResult("^ a P 4", 4, 2, greedy, within(place, 4), within(place, 6), 0, "ok", place or 0, "ok")
            for place, greedy in zip(places, own)]
    report = Report(rows, dict(SMALL))
    curve = report.by_width()
    assert [k for k, *_ in curve] == list(range(1, 11))
    expected = [sum(within(place, k) is not None for place in places) / 5 for k in range(1, 11)]
    assert [share for _, share, *_ in curve] == expected
    assert curve[2][2:] == wilson(3, 5)
    first, four, six = report.own_widths()
    assert (first["k"], first["own"], first["top_k"], first["differ"]) == (1, 0.4, 0.2, 1)
    assert first["difference"] == pytest.approx(0.2)
    assert (four["differ"], six["differ"], six["own"], six["n"]) == (0, 0, 0.6, 5)


def test_the_curve_counts_the_problems_of_the_widest_search_only():
    rows = [ProblemResult("^ a P 4", 4, 2, place == 1, place, place, 0, "ok", place, "ok") for place in (1, 3, 2)]
    part = Report([*rows[:2], replace(rows[2], curve_place=None)], dict(SMALL)) # it searched two problems of three
    assert part.by_width()[0][1] == 0.5 and {(w["n"], w["differ"]) for w in part.own_widths()} == {(2, 0)}
    assert part.metrics == Report(rows, dict(SMALL)).metrics
    without = Report(rows, dict(SMALL, curve_beams=None, wide_beams=6))
    assert [w["k"] for w in without.own_widths()] == [1, 4], "without a curve search, the wide search is the widest"


def test_a_wide_search_is_not_a_narrow_one():
    "On real searches the k best beams of a wide search are often, but not always, those of a search of width k"
    tokenizer, model = load_tokenizer("tiny"), load_model("tiny", device="cpu")
    problems = generate_problems(40, 2, 2, seed=63)
    narrow, wide = (search_problems(model, tokenizer, problems, k) for k in (2, 12))
    differ = [a.texts != b.texts[:2] for a, b in zip(narrow, wide)]
    assert 0 < sum(differ) < 40
    assert all(b.scores[0] >= a.scores[0] - 1e-4 for a, b, d in zip(narrow, wide, differ) if not d)


@pytest.mark.parametrize("degrees", ["2_2", "2_3", "3_3", "4_4"])
def test_the_authors_sets_are_known_by_content(shared, degrees):
    problems = read_problems(shared / f"published/test_dataset_{degrees}.txt", 300)
    outer, inner = map(int, degrees.split("_"))
    rows = [ProblemResult(p.expanded, outer * inner, inner, i % 2 == 0, 1, 1, 1, "ok", None, "ok")
            for i, p in enumerate(problems)]
    report = Report(rows, dict(num_beams=10, domain="ZZ"))
    assert published_degrees(report) == degrees and published_degrees(Report(rows[1:], report.settings)) is None
    found = published_figures(report)
    shown = [(f["metric"], round(f["published"] * f["n"]), f["n"]) for f in found]
    assert shown == [(metric, solved, n) for metric, solved, n, _ in PUBLISHED[degrees]]
    assert [f["value"] for f in found] == [0.5 if f["metric"] == "greedy_accuracy" else 1.0 for f in found]
    assert published_figures(Report(rows[:99], report.settings)) == [] and report.exact_solves() == 300
    of_120 = published_figures(Report(rows[:120], report.settings))
    assert [f["n"] for f in of_120] == ([100] * 4 if degrees == "4_4" else [])


def test_names_tell_paths_apart():
    assert list(short_names(["runs/a/policy", "runs/b/policy", "tiny"])) == ["a/policy", "b/policy", "tiny"]
    with pytest.warns(UserWarning, match="x/2_2.txt is named again"):
        assert list(short_names(["x/2_2.txt", "y/2_2.txt", "x/2_2.txt"])) == ["x/2_2", "y/2_2"]
    assert list(short_names(["2_2", "2_2.txt"])) == ["2_2", "2_2.txt"] and list(short_names(["/2_2.txt", "a/policy"])) == ["2_2", "a/policy"]
    assert list(policy_names(["tiny", "./tiny"])) == ["assets/tiny", f"{Path.cwd().name}/tiny"] and short_names([]) == {}


def test_what_two_paths_lead_to_is_measured_once_and_nothing_is_written_outside(policies, sets, tmp_path, monkeypatch, capsys):
    "A link beside its file, a file named twice, a file without `.txt`, a link to a policy; and the user's own files"
    (tmp_path / "data").mkdir()
    for name in ("data/q.txt", "qq", "qq.txt"): (tmp_path / name).write_bytes((sets / "2_2.txt").read_bytes())
    (tmp_path / "data/latest.txt").symlink_to("q.txt")
    (tmp_path / "policy_link").symlink_to(policies["disturbed"])
    for name in ("data/q.json", "qq.json"): (tmp_path / name).write_text("mine")
    monkeypatch.chdir(tmp_path)
    before, of_policy = files(tmp_path), files(Path(policies["disturbed"]))
    words = ["--problems", "data", "qq", "qq.txt", "--model", policies["disturbed"], "policy_link", "--limit", "2", *FLAGS]
    with pytest.warns(UserWarning, match="it is measured once") as said: assert main(["evaluate", *words, "--out", "ev"]) == 0
    assert {str(w.message) for w in said} >= {"data/latest.txt is named again as data/q.txt; it is measured once",
                                             f"{policies['disturbed']} is named again as policy_link; it is measured once"}
    assert sorted(p.name for p in (tmp_path / "ev/reports/disturbed").iterdir()) == ["q.txt.json", "qq.json", "qq.txt.json"]
    assert {name: content for name, content in files(tmp_path).items() if not name.startswith("ev/")} == before
    assert files(Path(policies["disturbed"])) == of_policy
    with pytest.warns(UserWarning): assert main(["evaluate", "--problems", "data", "--limit", "2", *FLAGS, "--out", "r.json"]) == 0


x, y = sympy.symbols("x y")


@pytest.mark.parametrize("f,variable", [
    (x**6 + 2*x**3 + 5, x), ("y**6 + 2*y**3 + 5", y), ("+ P 5 + * P 2 ^ y P 3 ^ y P 6", y),
    (sympy.Poly(x**6 + 2*x**3 + 5, x), x)])
def test_an_answer_shows_itself_in_the_variable_that_was_typed(f, variable):
    found = decompose(f, num_beams=3)
    g, (h,) = found[0].to_sympy()
    assert h == variable**3 and sympy.expand(g.subs(sympy.Symbol("b"), h)) == variable**6 + 2*variable**3 + 5
    assert repr(found[0]).startswith(f"Decomposition(g(b) = b**2 + 2*b + 5, h({variable}) = {variable}**3; by the exact algorithm")
    latex = rf"g(b) = b^{{2}} + 2 b + 5,\quad h({variable}) = {variable}^{{3}}"
    assert found[0]._repr_latex_() == f"${latex}$" and latex in found[0]._repr_html_()
    assert latex in found._repr_html_() and latex in found._repr_latex_()
    assert isinstance(found, list) and found == list(found) and found[0].inner == "* P 1 ^ a P 3"


def test_answers_of_every_form_are_shown():
    many = Decomposition("+ P 1 / P 2 + * N 3 ^ b0 P 2 * b0 b1", "a0 & + P 1 ^ a1 P 2", False, 2, -1.25)
    assert repr(many) == ("Decomposition(g(b0, b1) = -3*b0**2 + b0*b1 + 1/2, h0(a0) = a0, h1(a1) = a1**2 + 1; "
                          "by beam 2 (-1.25 nats))")
    assert r"g(b_{0}, b_{1})" in many._repr_latex_() and r"\frac{1}{2}" in many._repr_latex_()
    assert many.to_sympy()[1] == (sympy.Symbol("a0"), sympy.Symbol("a1")**2 + 1)
    for d in decompose("2*x**4 + 2*x**2 + 3", num_beams=10) + decompose("x**12", num_beams=2):
        assert verify("+ P 3 + * P 2 ^ a P 2 * P 2 ^ a P 4", d.inner) or d.outer.startswith("* P 1 ^ b")
    assert decompose("x**3 + x", num_beams=2)._repr_html_() == "<p>no decomposition</p>"


def test_reports_read_well(results):
    report = results[0].reports["tiny", "2_2"]
    assert repr(report).startswith("Report of 12 problems, domain QQ\n  greedy") and len(repr(report)) < 600
    assert report._repr_html_().count("<tr>") == 1 + len(METRICS) and "tiny, mixed: 10 problems" in str(results[0])
    assert results[0]._repr_markdown_().startswith("# Evaluation")


def test_a_generated_set_is_not_taken_for_the_authors():
    problems = generate_problems(100, 3, 2, seed=1)
    rows = [ProblemResult(p.expanded, 6, 2, False, None, None, 0, "trivial") for p in problems]
    for name, found in (("3_2.txt", None), ("test_dataset_3_2.txt", "3_2"), ("test_dataset_2_2.txt", None)):
        assert published_degrees(Report(rows, {}, {"data": {"name": name}})) == found


def test_intervals_of_many_problems_are_computed_in_parts(monkeypatch):
    "All resamples at once took 13 GB at 27,000 problems"
    sizes, stock = [], np.random.default_rng(0).random(5000) < 0.8
    inner = stats.bootstrap

    def measured(data, statistic, **settings):
        def counted(sample, axis):
            sizes.append(sample.size)
            return statistic(sample, axis=axis)
        return inner(data, counted, **settings)

    whole = inner((stock.astype(float),), np.mean, n_resamples=4000, method="BCa", rng=np.random.default_rng(0))
    monkeypatch.setattr(stats, "bootstrap", measured)
    low, high = bootstrap(stock)
    assert max(sizes) <= 2**24 < 5000 * 5000
    assert (low, high) == pytest.approx(tuple(whole.confidence_interval), abs=2e-4)
