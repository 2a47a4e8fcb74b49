"Finished runs of any source in one table; what is found in it, what is not, and the page that shows it."
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from bgrpo_nb.study.analysis import METRIC, read_runs, simulate
from bgrpo_nb.cli import main
from bgrpo_nb.study.run_readers import read_record

# planned, attempt, rollout, learning rate, seed, last value, state
SIX = [(0, 0, "beam", 1e-5, 0, 0.41, "finished"), (1, 0, "sample", 1e-5, 0, 0.39, "finished"), (2, 0, "beam", 1e-4, 0, None, "failed"),
       (2, 1, "beam", 1e-4, 0, 0.50, "finished"), (3, 0, "sample", 1e-4, 0, 0.2, "pruned"), (4, 0, "beam", 1e-5, 1, float("inf"), "finished")]
FILE = "method: grid\nmetric: {name: eval_beam_rank_score, goal: maximize}\nparameters:\n  rollout: {values: [beam, sample]}\n  learning_rate: {values: [1e-5, 1e-4]}\n"
COMMIT, DATE = "0123456789ab", "2026-01-31"


def name_of(planned, attempt): return f"{planned:04d}" + (f"-retry{attempt}" if attempt else "")


def rows_of(value): return [] if value is None else [{"step": 0, METRIC: 0.1, "eval_beam_accuracy": 0.3}, {"step": 5, "loss": 0.0}, {"step": 8, METRIC: value, "eval_beam_accuracy": 0.7}]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    "The six runs as a sweep's launcher leaves them, in runs/sweeps/small"
    folder = tmp_path_factory.mktemp("six") / "runs/sweeps/small"
    for planned, attempt, rollout, rate, seed, value, state in SIX:
        where = folder / "trials" / name_of(planned, attempt)
        where.mkdir(parents=True)
        (where / "config.json").write_text(json.dumps(dict(planned=planned, attempt=attempt, parameters=dict(rollout=rollout, learning_rate=rate), seed=seed, fixed=dict(max_steps=8))))
        (where / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows_of(value)) + '{"step": 9, "eval_beam')       # a torn line
        ending = {"finished": ("result.json", dict(step=8, seconds=60.5, commit=COMMIT, date=DATE, seed=seed)), "failed": ("failure.json", dict(reason="exit status 1: out of memory")),
                  "pruned": ("pruned.json", dict(iterations=2))}[state]
        (where / ending[0]).write_text(json.dumps(ending[1]))
    (folder / "sweep.yaml").write_text(FILE)
    return folder


def records(sweep):
    "The six as W&B tells them; NaN and infinity come back as text"
    out = []
    for i, (planned, attempt, rollout, rate, seed, value, state) in enumerate(SIX):
        done = state == "finished"
        summary = {} if value is None else {"eval/beam_rank_score": "Infinity" if np.isinf(value) else value, "eval/beam_accuracy": 0.7, "_step": 8, "train/loss": i / 10}
        out.append(dict(name=name_of(planned, attempt), state={"failed": "crashed", "pruned": "stopped"}.get(state, state), created_at=f"{DATE}T10:00:0{i}Z" if done else None,
                        commit=COMMIT + "0" * 28 if done else None, summary=summary | ({"_runtime": 60.5} if done else {}),
                        config=dict(rollout=rollout, learning_rate=rate, seed=seed, max_steps=8, eval_steps=8, planned=planned, attempt=attempt, output_dir=str(sweep / "trials" / name_of(planned, attempt))),
                        history=[{"eval/beam_rank_score": r[METRIC], "eval/beam_accuracy": r["eval_beam_accuracy"], "train/global_step": r["step"]} for r in rows_of(value) if METRIC in r]))
    return out


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(k for r in rows for k in r)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def make_study(sweep, storage):
    import optuna
    from optuna.distributions import CategoricalDistribution
    from optuna.trial import TrialState, create_trial
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(study_name="small", storage=storage, direction="maximize")
    spaces = dict(rollout=CategoricalDistribution(["beam", "sample"]), learning_rate=CategoricalDistribution([1e-5, 1e-4]))
    for planned, attempt, rollout, rate, seed, value, state in SIX:
        told = {"finished": TrialState.COMPLETE, "failed": TrialState.FAIL, "pruned": TrialState.PRUNED}[state]
        study.add_trial(create_trial(state=told, params=dict(rollout=rollout, learning_rate=rate), distributions=spaces, value=value if state == "finished" else None,
                                     intermediate_values={8: value} if state == "pruned" else {},
                                     user_attrs=dict(planned=planned, attempt=attempt, seed=seed, folder=f"trials/{name_of(planned, attempt)}", host="here", pid=1)))
    study.enqueue_trial(dict(rollout="beam", learning_rate=1e-5), user_attrs=dict(planned=9, attempt=0))      # still in the queue: no run yet
    return storage


def as_journal(sweep, tmp_path):
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    make_study(sweep, JournalStorage(JournalFileBackend(str(sweep / "journal.log"))))
    return [sweep / "journal.log"]


def as_storage_url(sweep, tmp_path):
    os.chdir(sweep.parents[2])
    return [make_study(sweep, f"sqlite:///{tmp_path / 'study.db'}")]


def as_api(sweep, tmp_path):
    runs = [SimpleNamespace(**{k: v for k, v in r.items() if k != "history"}, history=lambda samples, pandas, rows=r["history"]: rows) for r in records(sweep)]
    runs = [runs[i] for i in (3, 1, 5, 0, 4, 2)]                               # a server's order is not to be trusted
    api = SimpleNamespace(sweep=lambda path: SimpleNamespace(runs=runs, config={"method": "grid", "parameters": {}}) if path == "me/bgrpo/abc12345" else None)
    return ["https://wandb.ai/me/bgrpo/sweeps/abc12345?workspace=user"], dict(api=api)


def as_flat_csv(sweep, tmp_path):
    "The runs' page: settings and last values in one row, without a word which is which"
    page = [{"Name": r["name"], "State": r["state"], "Notes": "-", "User": f"u{i}", "Tags": "", "Created": r["created_at"], "Runtime": r["summary"].get("_runtime"), "Sweep": "abc", "commit": r["commit"],
             **{k: v for k, v in (r["config"] | r["summary"]).items() if not k.startswith("_")}} for i, r in enumerate(records(sweep))]
    return [write_csv(tmp_path / "page.csv", page)]


def as_documented_csv(sweep, tmp_path):
    "As W&B's guide exports: dictionaries as Python writes them"
    rows = [r | dict(summary=str(r["summary"]).replace("'Infinity'", "inf"), config=str(r["config"])) for r in records(sweep)]
    return [write_csv(tmp_path / "guide.csv", [{k: v for k, v in r.items() if k != "history"} for r in rows])]


def as_json(sweep, tmp_path):
    "As the server's answer: every setting wrapped, both parts as text"
    wrapped = [dict(name=r["name"], state=r["state"], createdAt=r["created_at"], commit=r["commit"], config=json.dumps({k: {"value": v, "desc": None} for k, v in r["config"].items()}),
                    summaryMetrics=json.dumps(r["summary"]), history=r["history"]) for r in records(sweep)]
    (tmp_path / "runs.json").write_text(json.dumps(dict(runs=wrapped)))
    return [tmp_path / "runs.json"]


def as_json_lines(sweep, tmp_path):
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records(sweep)))
    return [tmp_path / "runs.jsonl"]


def as_plain_runs(sweep, tmp_path):
    "Runs of no sweep: nothing but config.yaml says what was tried"
    import yaml
    for r in records(sweep):
        where = tmp_path / "trials" / r["name"]
        shutil.copytree(sweep / "trials" / r["name"], where)
        (where / "config.json").unlink()
        (where / "config.yaml").write_text(yaml.safe_dump(r["config"] | dict(loss_type="grpo" if r["config"]["rollout"] == "beam" else "bnpo")))
    return [tmp_path / "trials"]


FORMS = dict(folder=lambda s, t: [s], runs_folder=lambda s, t: [s / "trials"], run_folders=lambda s, t: sorted((s / "trials").iterdir(), reverse=True), journal=as_journal, storage_url=as_storage_url,
             api=as_api, flat_csv=as_flat_csv, documented_csv=as_documented_csv, json=as_json, json_lines=as_json_lines, plain_runs=as_plain_runs)


def read_as(form, sweep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = FORMS[form](sweep, tmp_path)
    sources, extra = made if isinstance(made, tuple) else (made, {})
    return read_runs(*sources, **extra)


@pytest.mark.parametrize("form", FORMS)
def test_six_runs_give_the_same_table_from_every_source(form, sweep, tmp_path, monkeypatch):
    expected, found = read_runs(sweep), read_as(form, sweep, tmp_path, monkeypatch)
    assert list(expected.table) == ["run", "state", "attempt", "planned", "seed", "rollout", "learning_rate", "eval_beam_accuracy", METRIC, "seconds", "commit", "date", "folder"]
    assert list(expected.table.state) == [state for *_, state in SIX] and np.isinf(expected.table[METRIC].iloc[-1])
    differs = ["planned", "attempt", "folder"] if form == "plain_runs" else []     # numbered by order of appearance; copied elsewhere
    pd.testing.assert_frame_equal(found.table.drop(columns=differs).sort_values("run", ignore_index=True), expected.table.drop(columns=differs).sort_values("run", ignore_index=True))
    assert found.parameters == expected.parameters == ["rollout", "learning_rate"] and found.fixed.get("max_steps", 8) == 8
    assert set(found.reasons) == {"0002", "0003"}
    if form not in ("flat_csv", "documented_csv"):
        key = ["run", "step"]
        pd.testing.assert_frame_equal(found.history.sort_values(key, ignore_index=True), expected.history.sort_values(key, ignore_index=True), check_dtype=False)


def test_wandbs_own_client_reads_the_same_table(sweep, monkeypatch):
    "wandb.Api against a server on the loopback"
    fake = pytest.importorskip("fake_wandb", reason="tests/fake_wandb.py is not there")
    with fake.FakeWandb() as server:
        for name, value in server.env.items(): monkeypatch.setenv(name, value)
        server.sweeps["s1"], server.queues["s1"] = dict(id="s1", config=FILE, project="bgrpo"), []
        for r in records(sweep):
            server.runs[r["name"]] = dict(id=r["name"], sweep="s1", state=r["state"], config={k: {"value": v} for k, v in r["config"].items()}, summary=r["summary"],
                                          history=[row | {"_step": i} for i, row in enumerate(r["history"])])
        found, expected = read_runs("wandb:us/bgrpo/s1"), read_runs(sweep)
        with pytest.raises(ValueError, match="W&B does not give .*s9.*export the runs as CSV"): read_runs("https://wandb.ai/us/bgrpo/sweeps/s9")
    assert found.account["method"] == "grid" and "RunFullHistory" in server.asked    # scan_history would ask for files that a short run has not
    kept = expected.table.drop(columns=["commit", "date"])                      # the server gives every run the same
    pd.testing.assert_frame_equal(found.table[list(kept)], kept)
    pd.testing.assert_frame_equal(found.history.sort_values(["run", "step"], ignore_index=True), expected.history.sort_values(["run", "step"], ignore_index=True), check_dtype=False)


def test_the_table_reads_back(sweep, tmp_path):
    runs = read_runs(sweep)
    again = read_runs(runs.to_csv(tmp_path / "tidy.csv"))
    pd.testing.assert_frame_equal(again.table, runs.table)
    assert again.reasons["0002"] == "exit status 1: out of memory"


def test_a_journal_without_its_folders_keeps_what_optuna_was_told(sweep, tmp_path):
    if not (sweep / "journal.log").is_file(): as_journal(sweep, tmp_path)
    shutil.copy(sweep / "journal.log", tmp_path / "moved.log")
    found = read_runs(tmp_path / "moved.log").table
    assert list(found.run) == [name_of(*run[:2]) for run in SIX] and list(found.state) == [state for *_, state in SIX]
    assert found[METRIC].iloc[:2].tolist() == [0.41, 0.39] and found[METRIC].iloc[4] == 0.2 and "eval_beam_accuracy" not in found


@pytest.mark.parametrize("content", ["not a journal\n", "", '{"op_code": 99}\n', "[1]\n[2]\n"])
def test_a_file_that_is_no_journal(content, tmp_path):
    (tmp_path / "x.log").write_text(content)
    with pytest.raises(ValueError, match="no Optuna (study|storage).*give a journal"): read_runs(tmp_path / "x.log")


def test_a_missing_sqlite_file_is_not_made(tmp_path):
    with pytest.raises(ValueError, match="there is no file"): read_runs(f"sqlite:///{tmp_path}/none.db")
    assert not list(tmp_path.iterdir())


def test_nobody_is_asked_for_a_key(tmp_path):
    "A mistyped folder looks like entity/project"
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | dict(HOME=str(tmp_path), PYTHONPATH=str(Path(__file__).parent.parent))
    done = subprocess.run([sys.executable, "-c", "from bgrpo_nb.study.run_readers import collect; collect(['no_such/folder'])"], cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 1 and "ValueError: no_such/folder is no file or folder here" in done.stderr


def test_an_export_with_nothing_in_it(tmp_path):
    (tmp_path / "a.csv").write_text("Name,State\n")
    (tmp_path / "b.json").write_text("[1, 2]")
    (tmp_path / "c.json").write_text("{")
    for name, says in (("a.csv", "holds no run"), ("b.json", "holds no run"), ("c.json", "cannot be read")):
        with pytest.raises(ValueError, match=says): read_runs(tmp_path / name)


def test_the_authors_names_are_ours():
    runs = [read_record(dict(name=f"r{i}", state="finished", config=dict(use_beam=beam, beam_width=16, seed=0), summary={"eval/beam_rank_score": 0.5})) for i, beam in enumerate([True, False])]
    from bgrpo_nb.study.analysis import tidy
    table = tidy(runs)
    assert list(table.table.rollout) == ["beam", "sample"] and table.fixed == {"num_generations": 16}


def test_settings_that_follow_from_another_are_no_parameters():
    "An objective brings its loss; a group's size brings the batch's"
    from bgrpo_nb.study.analysis import tidy
    def record(i, objective, size): return read_record(dict(name=f"r{i}", state="finished", summary={"eval/beam_rank_score": 0.5},
        config=dict(objective=objective, loss_type={"paper": "grpo", "original": "bnpo"}[objective], num_generations=size, per_device_train_batch_size=48 * size, seed=0)))
    assert tidy([record(i, o, n) for i, (o, n) in enumerate([("paper", 8), ("original", 8), ("paper", 16), ("original", 16)])]).parameters == ["num_generations", "objective"]
    assert tidy([record(0, "paper", 8), record(1, "paper", 16)], parameters=["per_device_train_batch_size"]).parameters == ["per_device_train_batch_size"]


def test_cells_without_a_finished_run_are_named(sweep, tmp_path):
    gaps = read_runs(sweep).missing()
    assert set(map(tuple, gaps.to_numpy().tolist())) == {("beam", 1e-4, 1), ("sample", 1e-5, 1), ("sample", 1e-4, 0), ("sample", 1e-4, 1)}
    never = tmp_path / "stopped"                                                # before the other arm began
    shutil.copytree(sweep, never)
    for planned, attempt, rollout, *_ in SIX:
        if rollout == "sample": shutil.rmtree(never / "trials" / name_of(planned, attempt))
    assert {tuple(c) for c in read_runs(never).missing().to_numpy().tolist()} == set(map(tuple, gaps.to_numpy().tolist())) | {("sample", 1e-5, 0)}
    drawn = replace(read_runs(sweep), account=dict(method="random"))
    assert drawn.missing().empty


# What the tests find. A share of n tries may lie above the nominal 5 % by luck: the bound is the 99.9th percentile of a binomial.
N = 100
def by_luck(p): return stats.binom.ppf(0.999, N, p) / N
def share_found(unit="pairs", **truth): return np.mean([simulate(seed=1000 + s, steps=(8,), **truth).difference(unit=unit).found for s in range(N)])


def test_a_planted_effect_is_found_and_its_size_is_right():
    found = [simulate(effect=0.02, seed=s, steps=(8,)).difference() for s in range(N)]
    assert np.mean([c.found for c in found]) > 0.95
    assert abs(np.mean([c.mean for c in found]) - 0.02) < 0.001
    assert np.mean([c.low <= 0.02 <= c.high for c in found]) > 0.85


def test_no_effect_is_not_flagged():
    assert 0 < share_found(effect=0) <= by_luck(0.05)
    assert share_found("runs", effect=0, seeds=4) <= by_luck(0.05)


def test_luck_shared_within_a_seed_deceives_pairs_and_not_seeds():
    truth = dict(effect=0, of_seed_and_arm=0.02, learning_rates=(1e-5, 2e-5, 3e-5))
    assert share_found(**truth) > by_luck(0.05) and share_found("seeds", **truth) <= by_luck(0.05)


def test_few_pairs_are_called_undecided_and_more_arms_pay_for_looking():
    few = simulate(effect=0.5, seeds=5, learning_rates=(1e-5,)).difference()
    assert few.p_value == 2 / 2**5 and not few.found and "6 can" in str(few)
    assert simulate(effect=0.5, seeds=6, learning_rates=(1e-5,)).difference().found
    rates = simulate(learning_rates=(1e-5, 2e-5, 3e-5)).differences(arm="learning_rate", baseline="1e-5")
    one = simulate(learning_rates=(1e-5, 2e-5, 3e-5)).difference(arm="learning_rate", baseline=1e-5, treatment=2e-5)
    assert [c.treatment for c in rates if c.unit == "pairs"] == [2e-5, 3e-5] and rates[0].p_value == pytest.approx(min(1, 2 * one.p_value))


def test_what_must_be_known_is_said():
    runs = simulate()
    bound = replace(runs, table=runs.table.assign(warmup=np.where(runs.table.rollout == "beam", 8, 0)), parameters=[*runs.parameters, "warmup"])
    assert "warmup goes with rollout" in bound.difference().notes[0] and bound.difference().mean == pytest.approx(runs.difference().mean)
    pruned = replace(runs, table=runs.table.assign(state=np.where(runs.table.index == 3, "pruned", "finished")))
    said = " ".join(pruned.difference().notes)
    assert "stopped early" in said and "1 finished runs have no partner" in said
    apart = replace(runs, table=runs.table.assign(learning_rate=np.linspace(1e-5, 1e-4, len(runs))))
    with pytest.raises(ValueError, match="no two runs agree in learning_rate, seed.*unit='runs'"): apart.pairs()
    assert "do not pair" in apart.conclusion()[0] and "n = 24 runs" in apart.conclusion()[1]     # drawn at random: compared as two heaps


def bgrpo(*words, cwd):
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, "-c", "import sys; from bgrpo_nb.cli import main; sys.exit(main())", *map(str, words)], cwd=cwd, capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=path))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    "What `bgrpo analyze` leaves for a table with an effect and a gap"
    folder = tmp_path_factory.mktemp("written")
    runs = simulate(effect=0.03, seeds=6, seed=5)
    runs = replace(runs, table=runs.table.assign(state=["failed", *["finished"] * (len(runs) - 1)]), reasons={"0000": "<b>out</b> of memory"})
    runs.to_csv(folder / "runs.csv")
    done = bgrpo("analyze", "runs.csv", "--out", "seen", "--metric", "beam_rank_score", cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


def test_at_a_terminal(written, sweep, capsys):
    folder, said = written
    assert "23 finished, 1 failed" in said and re.search(r"rollout beam − sample.*n = 11 pairs: a difference", said) and "1 cells of the grid" in said
    runs = read_runs(folder / "runs.csv")
    table = pd.read_csv(folder / "seen/data/differences.csv")
    assert table["mean"].iloc[0] == pytest.approx(runs.difference().mean) and list(table.unit) == ["pairs", "seeds", "runs"]
    assert pd.read_csv(folder / "seen/data/pairs.csv").difference.mean() == pytest.approx(runs.difference().mean)
    assert pd.read_csv(folder / "seen/data/configurations.csv").n.sum() == 23
    assert main(["analyze", str(sweep)]) == 0                                   # too few for most things, and told so
    assert "undecided: 1 pairs" in capsys.readouterr().out and (sweep / "analysis/report.html").is_file()


@pytest.mark.parametrize("flags,says", [("--metric loss", "there are: eval_beam_accuracy_2∘2"), ("--arm reward", "choose another --arm among rollout, learning_rate"), ("--baseline greedy", "among beam, sample"),
                                        ("--parameters speed", "no run has the setting speed"), ("--arms rollout", "did you mean --arm")])
def test_what_cannot_be_done_is_one_line(flags, says, written, capsys):
    status = main(["analyze", str(written[0] / "runs.csv"), *flags.split()])
    said = capsys.readouterr()
    assert status == 2 and not said.out and len(said.err.splitlines()) == 1 and says in said.err


def test_no_finished_run_is_said_with_the_reason(sweep, capsys):
    assert main(["analyze", str(sweep / "trials/0003")]) == 2
    assert "no run is finished (1 pruned)" in (said := capsys.readouterr().err) and "0003: lagged behind" in said


def test_the_report_asks_nobody_for_anything(written):
    page = (written[0] / "seen/report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(?!["']?#)|url\((?!#)|@import|fetch\(|XMLHttpRequest|<link""", page)
    assert "&lt;b&gt;out&lt;/b&gt; of memory" in page and "<b>out</b>" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert page.count("<svg") >= 5 and len(page) < 500_000 and set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)


def test_the_report_in_a_browser(written):
    "Offline, on a phone, light and dark; a click sorts"
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not chromium: pytest.skip("no Chromium: install it (Debian: chromium), or name its executable in $CHROMIUM")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-quic"])
        papers = {}
        for scheme in ("light", "dark"):
            context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme, offline=True)
            page, asked, faults = context.new_page(), [], []
            page.on("request", lambda r: asked.append(r.url))
            page.on("pageerror", lambda e: faults.append(str(e)))
            page.goto((written[0] / "seen/report.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            papers[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
            text = page.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
            assert text == page.evaluate("getComputedStyle(document.body).color")                     # a figure's words are as legible as the page's
            head = page.locator("section", has=page.get_by_role("heading", name="Best runs")).get_by_role("button", name=METRIC)
            column = lambda: [float(x) for x in head.locator("xpath=ancestor::table").locator("tbody tr td:last-child").all_inner_texts()]
            before = column()
            assert before == sorted(before, reverse=True) and len(before) == 5
            head.click()
            assert column() == sorted(before)
            head.click()
            assert column() == before
            assert not faults and len(asked) == 1, (faults, asked)
        browser.close()
    assert papers["light"] == "rgb(255, 255, 255)" and papers["dark"] != papers["light"]
