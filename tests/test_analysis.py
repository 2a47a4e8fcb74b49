"Finished runs of any source in one table; which differences are found in it, and the page that shows them."
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

from bgrpo_nb.cli import main
from bgrpo_nb.study.analysis import read_runs, simulate
from bgrpo_nb.study.permutation_tests import block_test, correct, smallest_block_p
from bgrpo_nb.study.run_readers import METRIC, read_record
from bgrpo_nb.study.run_table import tidy

# planned, attempt, rollout, learning rate, seed, last value, state
SIX = [(0, 0, "beam", 1e-5, 0, 0.41, "finished"),
       (1, 0, "sample", 1e-5, 0, 0.39, "finished"),
       (2, 0, "beam", 1e-4, 0, None, "failed"),
       (2, 1, "beam", 1e-4, 0, 0.50, "finished"),
       (3, 0, "sample", 1e-4, 0, 0.2, "pruned"),
       (4, 0, "beam", 1e-5, 1, float("inf"), "finished")]
FILE = """method: grid
metric: {name: eval_beam_rank_score, goal: maximize}
parameters:
  rollout: {values: [beam, sample]}
  learning_rate: {values: [1e-5, 1e-4]}
"""
COMMIT, DATE = "0123456789ab", "2026-01-31"
ENDINGS = {"finished": "result.json", "failed": "failure.json", "pruned": "pruned.json"}


def name_of(planned, attempt): return f"{planned:04d}" + (f"-retry{attempt}" if attempt else "")


def rows_of(value):
    if value is None: return []
    first, last = ({METRIC: v, "eval_beam_accuracy": accuracy} for v, accuracy in ((0.1, 0.3), (value, 0.7)))
    return [{"step": 0, **first}, {"step": 5, "loss": 0.0}, {"step": 8, **last}]


def write_trial(folder, planned, attempt, rollout, rate, seed, value, state):
    "A trial's folder as its launcher leaves it, with a last line that was written in part"
    where = folder / "trials" / name_of(planned, attempt)
    where.mkdir(parents=True)
    config = dict(planned=planned, attempt=attempt, parameters=dict(rollout=rollout, learning_rate=rate), seed=seed,
                  fixed=dict(max_steps=8))
    (where / "config.json").write_text(json.dumps(config))
    lines = "".join(json.dumps(row) + "\n" for row in rows_of(value))
    (where / "metrics.jsonl").write_text(lines + '{"step": 9, "eval_beam')
    ending = {"finished": dict(step=8, seconds=60.5, commit=COMMIT, date=DATE, seed=seed),
              "failed": dict(reason="exit status 1: out of memory"), "pruned": dict(iterations=2)}[state]
    (where / ENDINGS[state]).write_text(json.dumps(ending))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    "The six runs as a sweep's launcher leaves them, in runs/sweeps/small"
    folder = tmp_path_factory.mktemp("six") / "runs/sweeps/small"
    for run in SIX: write_trial(folder, *run)
    (folder / "sweep.yaml").write_text(FILE)
    return folder


def record_of(sweep, i, planned, attempt, rollout, rate, seed, value, state):
    "A run as W&B returns it; NaN and infinity come back as text"
    done = state == "finished"
    summary = {}
    if value is not None:
        score = "Infinity" if np.isinf(value) else value
        summary = {"eval/beam_rank_score": score, "eval/beam_accuracy": 0.7, "_step": 8, "train/loss": i / 10}
    if done: summary["_runtime"] = 60.5
    name = name_of(planned, attempt)
    config = dict(rollout=rollout, learning_rate=rate, seed=seed, max_steps=8, eval_steps=8, planned=planned,
                  attempt=attempt, output_dir=str(sweep / "trials" / name))
    history = [{"eval/beam_rank_score": row[METRIC], "eval/beam_accuracy": row["eval_beam_accuracy"],
                "train/global_step": row["step"]} for row in rows_of(value) if METRIC in row]
    return dict(name=name, state={"failed": "crashed", "pruned": "stopped"}.get(state, state),
                created_at=f"{DATE}T10:00:0{i}Z" if done else None, commit=COMMIT + "0" * 28 if done else None,
                summary=summary, config=config, history=history)


def records(sweep): return [record_of(sweep, i, *run) for i, run in enumerate(SIX)]


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
    spaces = dict(rollout=CategoricalDistribution(["beam", "sample"]),
                  learning_rate=CategoricalDistribution([1e-5, 1e-4]))
    states = {"finished": TrialState.COMPLETE, "failed": TrialState.FAIL, "pruned": TrialState.PRUNED}
    for planned, attempt, rollout, rate, seed, value, state in SIX:
        noted = dict(planned=planned, attempt=attempt, seed=seed, folder=f"trials/{name_of(planned, attempt)}",
                     host="here", pid=1)
        study.add_trial(create_trial(
            state=states[state], params=dict(rollout=rollout, learning_rate=rate), distributions=spaces,
            value=value if state == "finished" else None, user_attrs=noted,
            intermediate_values={8: value} if state == "pruned" else {}))
    waiting = dict(planned=9, attempt=0)
    study.enqueue_trial(dict(rollout="beam", learning_rate=1e-5), user_attrs=waiting)   # in the queue: no run yet
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
    runs = []
    for r in records(sweep):
        def history(samples, pandas, rows=r.pop("history")): return rows
        runs.append(SimpleNamespace(**r, history=history))
    found = SimpleNamespace(runs=[runs[i] for i in (3, 1, 5, 0, 4, 2)],          # in no order
                            config={"method": "grid", "parameters": {}})
    api = SimpleNamespace(sweep=lambda path: found if path == "me/bgrpo/abc12345" else None)
    return ["https://wandb.ai/me/bgrpo/sweeps/abc12345?workspace=user"], dict(api=api)


def as_flat_csv(sweep, tmp_path):
    "The page of a project: settings and last values in one row, and no word on which is which"
    page = []
    for i, r in enumerate(records(sweep)):
        own = {"Name": r["name"], "State": r["state"], "Notes": "-", "User": f"u{i}", "Tags": "",
               "Created": r["created_at"], "Runtime": r["summary"].get("_runtime"), "Sweep": "abc",
               "commit": r["commit"]}
        page.append(own | {k: v for k, v in (r["config"] | r["summary"]).items() if not k.startswith("_")})
    return [write_csv(tmp_path / "page.csv", page)]


def as_documented_csv(sweep, tmp_path):
    "As W&B's guide exports: dictionaries as Python writes them"
    rows = []
    for r in records(sweep):
        del r["history"]
        rows.append(r | dict(summary=str(r["summary"]).replace("'Infinity'", "inf"), config=str(r["config"])))
    return [write_csv(tmp_path / "guide.csv", rows)]


def as_json(sweep, tmp_path):
    "As the server's answer: every setting wrapped, both parts as text"
    wrapped = []
    for r in records(sweep):
        config = json.dumps({k: {"value": v, "desc": None} for k, v in r["config"].items()})
        wrapped.append(dict(name=r["name"], state=r["state"], createdAt=r["created_at"], commit=r["commit"],
                            config=config, summaryMetrics=json.dumps(r["summary"]), history=r["history"]))
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
        loss = "grpo" if r["config"]["rollout"] == "beam" else "bnpo"
        (where / "config.yaml").write_text(yaml.safe_dump(r["config"] | dict(loss_type=loss)))
    return [tmp_path / "trials"]


def as_folder(sweep, tmp_path): return [sweep]
def as_runs_folder(sweep, tmp_path): return [sweep / "trials"]
def as_run_folders(sweep, tmp_path): return sorted((sweep / "trials").iterdir(), reverse=True)


FORMS = dict(
    folder=as_folder, runs_folder=as_runs_folder, run_folders=as_run_folders, journal=as_journal,
    storage_url=as_storage_url, api=as_api, flat_csv=as_flat_csv, documented_csv=as_documented_csv, json=as_json,
    json_lines=as_json_lines, plain_runs=as_plain_runs)


def assert_same(found, expected, by, **how):
    "The same rows, in whatever order"
    ordered = (t.sort_values(by, ignore_index=True) for t in (found, expected))
    pd.testing.assert_frame_equal(*ordered, **how)


def read_as(form, sweep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = FORMS[form](sweep, tmp_path)
    sources, extra = made if isinstance(made, tuple) else (made, {})
    return read_runs(*sources, **extra)


@pytest.mark.parametrize("form", FORMS)
def test_six_runs_give_the_same_table_from_every_source(form, sweep, tmp_path, monkeypatch):
    expected, found = read_runs(sweep), read_as(form, sweep, tmp_path, monkeypatch)
    assert list(expected.table) == [
        "run", "state", "attempt", "planned", "seed", "rollout", "learning_rate", "eval_beam_accuracy", METRIC,
        "seconds", "commit", "date", "folder"]
    assert list(expected.table.state) == [state for *_, state in SIX] and np.isinf(expected.table[METRIC].iloc[-1])
    differs = ["planned", "attempt", "folder"] if form == "plain_runs" else []  # numbered by appearance; a copy
    assert_same(found.table.drop(columns=differs), expected.table.drop(columns=differs), "run")
    assert found.parameters == expected.parameters == ["rollout", "learning_rate"]
    assert found.fixed.get("max_steps", 8) == 8
    assert set(found.reasons) == {"0002", "0003"}
    if form in ("flat_csv", "documented_csv"): return                           # they hold no history
    assert_same(found.history, expected.history, ["run", "step"], check_dtype=False)


def test_wandbs_own_client_reads_the_same_table(sweep, monkeypatch):
    "wandb.Api against a server on the loopback"
    fake = pytest.importorskip("fake_wandb", reason="tests/fake_wandb.py is not there")
    with fake.FakeWandb() as server:
        for name, value in server.env.items(): monkeypatch.setenv(name, value)
        server.sweeps["s1"], server.queues["s1"] = dict(id="s1", config=FILE, project="bgrpo"), []
        for r in records(sweep):
            server.runs[r["name"]] = dict(
                id=r["name"], sweep="s1", state=r["state"], config={k: {"value": v} for k, v in r["config"].items()},
                summary=r["summary"], history=[row | {"_step": i} for i, row in enumerate(r["history"])])
        found, expected = read_runs("wandb:us/bgrpo/s1"), read_runs(sweep)
        with pytest.raises(ValueError, match="W&B does not give .*s9.*export the runs as CSV"):
            read_runs("https://wandb.ai/us/bgrpo/sweeps/s9")
    assert found.sweep_file["method"] == "grid"
    assert "RunFullHistory" in server.asked         # scan_history would ask for files that a short run does not have
    known = expected.table.drop(columns=["commit", "date"])                     # the server's are the same for all
    pd.testing.assert_frame_equal(found.table[list(known)], known)
    assert_same(found.history, expected.history, ["run", "step"], check_dtype=False)


def test_the_table_reads_back(sweep, tmp_path):
    runs = read_runs(sweep)
    again = read_runs(runs.to_csv(tmp_path / "tidy.csv"))
    pd.testing.assert_frame_equal(again.table, runs.table)
    assert again.reasons["0002"] == "exit status 1: out of memory"


def test_a_journal_without_its_folders_keeps_the_values_optuna_was_given(sweep, tmp_path):
    if not (sweep / "journal.log").is_file(): as_journal(sweep, tmp_path)
    shutil.copy(sweep / "journal.log", tmp_path / "moved.log")
    found = read_runs(tmp_path / "moved.log").table
    assert list(found.run) == [name_of(*run[:2]) for run in SIX]
    assert list(found.state) == [state for *_, state in SIX]
    assert found[METRIC].iloc[:2].tolist() == [0.41, 0.39] and found[METRIC].iloc[4] == 0.2
    assert "eval_beam_accuracy" not in found


@pytest.mark.parametrize("content", ["not a journal\n", "", '{"op_code": 99}\n', "[1]\n[2]\n"])
def test_a_file_that_is_no_journal(content, tmp_path):
    (tmp_path / "x.log").write_text(content)
    with pytest.raises(ValueError, match="no Optuna (study|storage).*give a journal"):
        read_runs(tmp_path / "x.log")


def test_a_missing_sqlite_file_is_not_made(tmp_path):
    with pytest.raises(ValueError, match="there is no file"): read_runs(f"sqlite:///{tmp_path}/none.db")
    assert not list(tmp_path.iterdir())


def test_nobody_is_asked_for_a_key(tmp_path):
    "A mistyped folder looks like entity/project"
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    env |= dict(HOME=str(tmp_path), PYTHONPATH=str(Path(__file__).parent.parent))
    code = "from bgrpo_nb.study.run_readers import collect; collect(['no_such/folder'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True)
    assert done.returncode == 1 and "ValueError: no_such/folder is no file or folder here" in done.stderr


def test_an_export_with_nothing_in_it(tmp_path):
    (tmp_path / "a.csv").write_text("Name,State\n")
    (tmp_path / "b.json").write_text("[1, 2]")
    (tmp_path / "c.json").write_text("{")
    for name, says in (("a.csv", "holds no run"), ("b.json", "holds no run"), ("c.json", "cannot be read")):
        with pytest.raises(ValueError, match=says): read_runs(tmp_path / name)


def record(name, **config):
    return read_record(dict(name=name, state="finished", config=config, summary={"eval/beam_rank_score": 0.5}))


def test_flags_of_the_original_scripts_get_our_names():
    found = tidy([record(f"r{i}", use_beam=beam, beam_width=16, seed=0) for i, beam in enumerate([True, False])])
    assert list(found.table.rollout) == ["beam", "sample"] and found.fixed == {"num_generations": 16}


def test_settings_that_follow_from_another_are_no_parameters():
    "An objective brings its loss; a group's size brings the batch's"
    loss = {"paper": "grpo", "original": "bnpo"}
    def run(i, objective, size):
        return record(f"r{i}", objective=objective, loss_type=loss[objective], num_generations=size,
                      per_device_train_batch_size=48 * size, seed=0)
    four = [run(0, "paper", 8), run(1, "original", 8), run(2, "paper", 16), run(3, "original", 16)]
    assert tidy(four).parameters == ["num_generations", "objective"]
    asked = ["per_device_train_batch_size"]
    assert tidy([run(0, "paper", 8), run(1, "paper", 16)], parameters=asked).parameters == asked


def test_cells_without_a_finished_run_are_named(sweep, tmp_path):
    def cells(runs): return set(map(tuple, runs.missing().to_numpy().tolist()))
    gaps = {("beam", 1e-4, 1), ("sample", 1e-5, 1), ("sample", 1e-4, 0), ("sample", 1e-4, 1)}
    assert cells(read_runs(sweep)) == gaps
    never = tmp_path / "stopped"                                                # before the other arm began
    shutil.copytree(sweep, never)
    for planned, attempt, rollout, *_ in SIX:
        if rollout == "sample": shutil.rmtree(never / "trials" / name_of(planned, attempt))
    assert cells(read_runs(never)) == gaps | {("sample", 1e-5, 0)}
    assert replace(read_runs(sweep), sweep_file=dict(method="random")).missing().empty


def of_limit(limit, rollout, seed=0): # None: the setting is left out
    config = dict(rollout=rollout) | ({} if limit is None else dict(eval_limit=limit))
    return read_record(dict(name=f"{rollout}-{limit}-{seed}", config=config | dict(seed=seed), summary={METRIC: 0.5}))


@pytest.mark.parametrize("limit", [50, 0.5, "half"])
def test_a_setting_that_some_runs_leave_out(limit):
    "It is a value like any other: of a cell, and of a run that is done"
    two = tidy([of_limit(limit, "beam"), of_limit(None, "sample")])
    assert "eval_limit" in two.parameters
    assert {(r.rollout, None if pd.isna(r.eval_limit) else r.eval_limit) for r in two.missing().itertuples()} == {("beam", None), ("sample", limit)}
    assert f"eval_limit changes with rollout (beam: {limit}, sample: none)" in " ".join(two.notes())
    with pytest.raises(ValueError, match=f"has eval_limit={limit} or no value of it"): two.arms("eval_limit")
    specs = dict(rollout=dict(values=["beam", "sample"]), eval_limit=dict(values=[limit, None]), seed=dict(values=[0]))
    full = tidy([of_limit(v, rollout) for v in (limit, None) for rollout in ("beam", "sample")], dict(method="grid", parameters=specs))
    assert full.missing().empty and len(replace(full, table=full.table[:3]).missing()) == 1


def test_many_settings_without_a_file_are_no_grid():
    "The product of all their values would not fit into memory"
    runs = tidy([record(f"r{i}", seed=i, **{f"s{k}": i for k in range(20)}) for i in range(10)])
    assert len(runs.parameters) == 20 and runs.missing().empty


# How often a difference is found. A share of n tries may exceed 5 % by chance, up to a binomial's 99.9th percentile.
N = 100


@pytest.fixture
def without_intervals(monkeypatch):
    "Where only p matters, the bootstrap is left out: it takes most of the time"
    monkeypatch.setattr("bgrpo_nb.study.analysis.bootstrap_interval", lambda samples, seed: (np.nan, np.nan))


def at_most(p, n=N): return stats.binom.ppf(0.999, n, p) / n


def share_found(unit="pairs", **truth):
    sweeps = (simulate(seed=1000 + s, steps=(8,), **truth) for s in range(N))
    return np.mean([sweep.difference(unit=unit).found for sweep in sweeps])


def test_a_planted_effect_is_found_and_its_size_is_right():
    found = [simulate(effect=0.02, seed=s, steps=(8,)).difference() for s in range(N)]
    assert np.mean([c.found for c in found]) > 0.95
    assert abs(np.mean([c.mean for c in found]) - 0.02) < 0.001
    assert np.mean([c.low <= 0.02 <= c.high for c in found]) > 0.85


def test_no_effect_is_not_flagged(without_intervals):
    assert 0 < share_found(effect=0) <= at_most(0.05)
    assert share_found("runs", effect=0, seeds=4) <= at_most(0.05)


def test_what_a_seed_adds_to_one_arm_misleads_pairs_and_not_seeds(without_intervals):
    truth = dict(effect=0, of_seed_and_arm=0.02, learning_rates=(1e-5, 2e-5, 3e-5))
    assert share_found(**truth) > at_most(0.05) and share_found("seeds", **truth) <= at_most(0.05)


def test_few_pairs_are_called_undecided():
    few = simulate(effect=0.5, seeds=5, learning_rates=(1e-5,)).difference()
    assert few.p_value == few.smallest == 2 / 2**5 and not few.found
    assert str(few).endswith("undecided, since 5 pairs can at best give p = 0.062; use 6 pairs")
    assert simulate(effect=0.5, seeds=6, learning_rates=(1e-5,)).difference().found
    none = simulate(effect=0, seeds=6, learning_rates=(1e-5,)).difference()
    assert str(none).endswith("n = 6 pairs: difference not found") and none.smallest == 2 / 2**6


def of_arms(seeds=6, seed=0, learning_rates=(1e-5,), **effects):
    "Simulated sweep of sample and other arms, with one run an arm and seed"
    return simulate(effect=effects, seeds=seeds, learning_rates=learning_rates, seed=seed, steps=(8,))


@pytest.mark.parametrize("effects", [dict(beam=10.0, mixed=0.0), dict(beam=10.0, mixed=0.0, greedy=0.0)])
def test_a_large_effect_among_several_arms_is_found_with_six_seeds(effects):
    runs = of_arms(**effects)
    found = {c.treatment: c for c in runs.differences() if c.unit == "pairs"}
    assert runs.joint().found and found.pop("beam").p_value == 2 / 2**6
    assert all(not c.found and c.smallest == 2 / 2**6 and c.comparisons == len(effects) for c in found.values())
    first, *said = runs.conclusion()
    assert f"joint test of {len(effects) + 1} arms" in first and first.endswith("the arms differ")
    assert re.search(r"beam − sample.*comparisons, smallest possible 0.031.*difference found", said[0])
    assert said[1].endswith("difference not found")


def test_several_arms_and_few_seeds_are_undecided():
    runs = of_arms(seeds=4, beam=10.0, mixed=0.0)
    assert runs.joint().found and runs.joint().smallest == pytest.approx(6**-3)
    said = runs.conclusion()
    assert all("4 pairs can at best give p = 0.12; use 6 pairs" in line for line in said[1:3])
    assert said[3] == "The arms differ, but 4 pairs cannot decide which of them."
    two = of_arms(seeds=2, beam=10.0, mixed=0.0)
    assert str(two.joint()).endswith("undecided, since 2 blocks can at best give p = 0.17; use 3 blocks")


def test_many_arms_are_corrected_by_holms_method(without_intervals):
    effects = {f"a{i}": 0.0 for i in range(8)} | {"b": 10.0}
    def found(seeds): return next(c for c in of_arms(seeds=seeds, **effects).differences() if c.treatment == "b")
    assert found(9).p_value == pytest.approx(8 * 2 / 2**9) and found(9).found
    assert "8 pairs can at best give p = 0.062; use 9 pairs" in str(found(8))


def test_arms_that_share_no_block_are_corrected_by_bonferronis_rule():
    runs = of_arms(seeds=14, beam=10.0, mixed=0.0)
    late_beam = (runs.table.rollout == "beam") & (runs.table.seed >= 7)
    early_mixed = (runs.table.rollout == "mixed") & (runs.table.seed < 7)
    apart = replace(runs, table=runs.table[~(late_beam | early_mixed)].reset_index(drop=True))
    found = {c.treatment: c for c in apart.differences() if c.unit == "pairs"}
    assert found["beam"].p_value == found["beam"].smallest == pytest.approx(2 * 2 / 2**7) and found["beam"].found


def test_unpaired_arms_are_tested_together_too():
    runs = of_arms(seeds=6, beam=10.0, mixed=0.0)
    apart = replace(runs, table=runs.table.assign(seed=np.arange(len(runs))))
    found = {c.treatment: c for c in apart.differences()}
    assert found["beam"].found and not found["mixed"].found and {c.unit for c in found.values()} == {"runs"}
    assert any(line.endswith("Unpaired:") for line in apart.conclusion())


def false_alarm(rng, effects, n=6):
    "One study of n seeds: is an arm without an effect found to differ?"
    data = rng.normal(0, 1, (n, len(effects) + 1)) + [0, *effects]
    def p_of(members): return block_test(data[:, [0, *(i + 1 for i in members)]])
    return any(p <= 0.05 for p, effect in zip(correct(p_of, len(effects)), effects) if effect == 0)


@pytest.mark.parametrize("effects", [(0, 0), (10, 0), (0, 0, 0), (10, 0, 0), (1, 10, 0)])
def test_false_alarms_of_several_comparisons_stay_below_five_percent(effects):
    rng = np.random.default_rng(7)
    assert np.mean([false_alarm(rng, effects) for _ in range(200)]) <= at_most(0.05, 200)


def test_false_alarms_of_a_whole_analysis_stay_below_five_percent(without_intervals):
    sweeps = (of_arms(seed=2000 + s, beam=0.0, mixed=0.0) for s in range(40))
    alarms = [any(c.found for c in sweep.differences() if c.unit == "pairs") for sweep in sweeps]
    assert np.mean(alarms) <= at_most(0.05, 40)


@pytest.mark.parametrize("n,k", [(2, 2), (6, 2), (3, 3), (5, 3), (3, 4)])
def test_the_smallest_p_is_that_of_arms_in_the_same_order_everywhere(n, k):
    data = np.arange(k) * 10 + np.random.default_rng(0).normal(size=(n, k))
    assert block_test(data) == pytest.approx(smallest_block_p(n, k))


def test_one_comparison_of_several_is_less_strict_than_all():
    runs = simulate(learning_rates=(1e-5, 2e-5, 3e-5))
    rates = [c for c in runs.differences(arm="learning_rate", baseline="1e-5") if c.unit == "pairs"]
    alone = [runs.difference(arm="learning_rate", baseline=1e-5, treatment=c.treatment) for c in rates]
    assert [c.treatment for c in rates] == [2e-5, 3e-5]
    assert all(c.p_value >= one.p_value for c, one in zip(rates, alone))


def test_the_recorded_study_and_its_chapter_agree():
    recorded = Path(__file__).parent.parent / "nbs/experiments/study/tidy.csv"
    runs = replace(read_runs(recorded, parameters=["sweep", "rollout"]).filter(sweep="rollout"), parameters=["rollout"])
    assert [line.rsplit(": ", 1)[1] for line in runs.conclusion()] == ["the arms differ", *["difference found"] * 2]


def test_notes_say_what_must_be_known():
    runs = simulate()
    warmup = np.where(runs.table.rollout == "beam", 8, 0)
    bound = replace(runs, table=runs.table.assign(warmup=warmup), parameters=[*runs.parameters, "warmup"])
    assert "warmup changes with rollout" in bound.difference().notes[0]
    assert bound.difference().mean == pytest.approx(runs.difference().mean)
    states = np.where(runs.table.index == 3, "pruned", "finished")
    notes = " ".join(replace(runs, table=runs.table.assign(state=states)).difference().notes)
    assert "stopped early" in notes and "1 finished runs have no partner" in notes
    rates = np.linspace(1e-5, 1e-4, len(runs))                                  # drawn at random: compared unpaired
    apart = replace(runs, table=runs.table.assign(learning_rate=rates))
    with pytest.raises(ValueError, match="no two runs agree in learning_rate, seed.*unit='runs'"): apart.pairs()
    assert "do not pair" in apart.conclusion()[0] and "n = 24 runs" in apart.conclusion()[1]


def bgrpo(*words, cwd):
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    code = "import sys; from bgrpo_nb.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=cwd, capture_output=True, text=True,
                          env=os.environ | dict(PYTHONPATH=path))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    "What `bgrpo analyze` leaves for a table with an effect and a gap"
    folder = tmp_path_factory.mktemp("written")
    runs = simulate(effect=0.03, seeds=6, seed=5)
    states = ["failed", *["finished"] * (len(runs) - 1)]
    runs = replace(runs, table=runs.table.assign(state=states), reasons={"0000": "<b>out</b> of memory"})
    runs.to_csv(folder / "runs.csv")
    done = bgrpo("analyze", "runs.csv", "--out", "seen", "--metric", "beam_rank_score", cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


def test_at_a_terminal(written, sweep, capsys):
    folder, said = written
    assert "23 finished, 1 failed" in said and "1 cells of the grid" in said
    assert re.search(r"rollout beam − sample.*n = 11 pairs: difference found", said)
    runs = read_runs(folder / "runs.csv")
    table = pd.read_csv(folder / "seen/data/differences.csv")
    assert table["mean"].iloc[0] == pytest.approx(runs.difference().mean)
    assert list(table.unit) == ["pairs", "seeds", "runs"]
    assert pd.read_csv(folder / "seen/data/pairs.csv").difference.mean() == pytest.approx(runs.difference().mean)
    assert pd.read_csv(folder / "seen/data/configurations.csv").n.sum() == 23
    assert main(["analyze", str(sweep)]) == 0                                   # too few runs for most questions
    assert "undecided, since 1 pairs" in capsys.readouterr().out and (sweep / "analysis/report.html").is_file()


@pytest.mark.parametrize("flags,says", [
    ("--metric loss", "choose a metric among eval_beam_accuracy_2∘2"),
    ("--arm reward", "choose another --arm among rollout, learning_rate"),
    ("--baseline greedy", "among beam, sample"),
    ("--parameters speed", "no run has the setting speed"),
    ("--arms rollout", "did you mean --arm")])
def test_what_cannot_be_done_is_one_line(flags, says, written, capsys):
    status = main(["analyze", str(written[0] / "runs.csv"), *flags.split()])
    said = capsys.readouterr()
    assert status == 2 and not said.out and len(said.err.splitlines()) == 1 and says in said.err


def test_without_a_finished_run_the_reason_is_printed(sweep, capsys):
    assert main(["analyze", str(sweep / "trials/0003")]) == 2
    said = capsys.readouterr().err
    assert "no run is finished (1 pruned)" in said and "0003: stopped early" in said


def test_the_report_loads_nothing(written):
    page = (written[0] / "seen/report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(?!["']?#)|url\((?!#)|@import|fetch\(|XMLHttpRequest|<link""", page)
    assert "&lt;b&gt;out&lt;/b&gt; of memory" in page and "<b>out</b>" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert page.count("<svg") >= 5 and len(page) < 500_000
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)


def look_at(browser, file, scheme):
    "The page's colour, after every check of it in this colour scheme"
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme, offline=True)
    page, asked, faults = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    text = page.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
    assert text == page.evaluate("getComputedStyle(document.body).color")       # as legible as the page's own words
    section = page.locator("section", has=page.get_by_role("heading", name="Best runs"))
    head = section.get_by_role("button", name=METRIC)
    cells = head.locator("xpath=ancestor::table").locator("tbody tr td:last-child")
    def column(): return [float(x) for x in cells.all_inner_texts()]
    before = column()
    assert before == sorted(before, reverse=True) and len(before) == 5
    head.click()
    assert column() == sorted(before)
    head.click()
    assert column() == before
    assert not faults and len(asked) == 1, (faults, asked)
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_the_report_in_a_browser(written):
    "Offline, on a phone, light and dark; a click sorts"
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not chromium: pytest.skip("no Chromium: install it (Debian: chromium), or name its executable in $CHROMIUM")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-quic"])
        papers = {scheme: look_at(browser, written[0] / "seen/report.html", scheme) for scheme in ("light", "dark")}
        browser.close()
    assert papers["light"] == "rgb(255, 255, 255)" and papers["dark"] != papers["light"]


HOSTILE = {
    "unhashable_name.json": b'[{"[]": 1}]',
    "cells_that_are_no_values.json": b'[{"x": [1], "state": "finished", "seed": {}, "rollout": {"a": []}}]',
    "deep.json": b"[" * 100_000, "deeper.json": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "rows_that_are_lists.json": b"[[1, 2], [3]]", "text.json": b'"abc"', "number.json": b'{"a": NaN}',
    "surplus_cells.csv": b"a,b\n1\n1,2,3,4\n,,,\n", "binary.csv": b"\x00\x01\xff", "empty.csv": b"", "torn.json": b'[{"Name": "a"',
    "config.csv": b'run,config\nx,"{[]: 1}"\n', "config_that_is_a_list.json": b'[{"name": "a", "config": [1], "summary": 5}]',
    "code.csv": b"run,config\nx,\"__import__('os').mkdir('broken')\"\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_export_is_one_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(HOSTILE[name])
    assert main(["analyze", name, "--out", "out"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("bgrpo: ") and "\n" not in said and "should not happen" not in said, said
    assert not (tmp_path / "broken").exists()


@pytest.mark.parametrize("file, content", [("config.yaml", "- 1\n- 2\n"), ("config.json", "[1]"), ("result.json", '"done"'),
                                           ("failure.json", "[2]"), ("config.yaml", "a: [" * 5_000)])
def test_a_damaged_run_folder_is_one_line(file, content, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "eval_beam_rank_score": 0.5}\n[1, 2]\n{torn')
    (run / file).write_text(content)
    assert main(["analyze", str(run), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert file in said and "\n" not in said and "should not happen" not in said, said
