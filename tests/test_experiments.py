"The plan of the experiment on reinforcement, with runs that are acted out: which rates, which seeds, nothing twice."
import importlib.util
import json
import os
import subprocess

import pytest
import torch
from conftest import REPO

from bgrpo_nb.policy.model import load_model

SCRIPT = REPO / "nbs/experiments/reinforcement/record.py"


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    "The script in an empty folder; its runs train nothing, and a policy solves what its name says"
    spec = importlib.util.spec_from_file_location("record", SCRIPT)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    monkeypatch.setattr(found, "OUT", tmp_path / "runs")
    monkeypatch.setattr(found, "RECORD", tmp_path / "record.json")
    trained = []
    def continue_from(start, task, arm, rate, seed, steps, folder):
        folder.mkdir(parents=True)
        trained.append((start, arm.name, rate, seed, steps))
        return 0.5 * steps
    def greedily(policy, problems, domain): return 50 if "0.0003" in str(policy) else 10 # the rate in the folder's name
    def answers(policy, task): return {kind: {"3_2": [0, 1, 1, 0]} for kind in ("greedy", "ten_beams", "pass_at_10")}
    for double in (continue_from, greedily, answers): monkeypatch.setattr(found, double.__name__, double)
    found.runs = trained
    return found


def arms(experiment, *names): return [experiment.ARMS[name] for name in names]


def test_the_best_rate_is_measured_with_every_seed(experiment):
    experiment.run_part("tiny", [0, 1], arms(experiment, "mean"))
    runs = [run for run in experiment.runs if run[3] != 99]                # 99: steps that are timed
    assert [(rate, seed) for _, _, rate, seed, _ in runs] == [(1e-4, 0), (3e-4, 0), (1e-3, 0), (3e-4, 1)]
    assert {steps for *_, steps in runs} == {2 * experiment.TASKS["tiny"].seconds}
    experiment.collect()
    rows = json.loads(experiment.RECORD.read_text())["rows"]
    assert [(row["rate"], row["seed"]) for row in rows if "greedy" in row] == [(3e-4, 0), (3e-4, 1)]
    assert len(rows) == 4 and not list(experiment.OUT.rglob("*.claim"))


def test_what_is_recorded_is_not_run_again(experiment, tmp_path, monkeypatch):
    experiment.run_part("tiny", [0], arms(experiment, "mean"))
    experiment.collect()
    experiment.runs.clear()
    monkeypatch.setattr(experiment, "OUT", tmp_path / "elsewhere")           # another machine: the record alone
    experiment.run_part("tiny", [0], arms(experiment, "mean"))
    assert not experiment.runs
    experiment.run_part("tiny", [0, 1], arms(experiment, "mean"))
    assert [seed for *_, seed, _ in experiment.runs] == [1]                  # steps are those of the record
    experiment.collect()
    assert len(json.loads(experiment.RECORD.read_text())["rows"]) == 4


def test_a_run_of_another_process_is_left_to_it(experiment):
    arm, = arms(experiment, "mean")
    claim = experiment.folder_of("tiny", "tiny", arm, 3e-4, 0).with_name("tiny-mean-0.0003-0.claim")
    claim.parent.mkdir(parents=True)
    os.close(os.open(claim, os.O_CREAT))
    assert experiment.run_of("tiny", "tiny", arm, 3e-4, 0, measured=False) is None and not experiment.runs
    assert experiment.run_of("tiny", "tiny", arm, 1e-4, 0, measured=False)["rate"] == 1e-4 # each rate has its own


def test_the_map_takes_the_rate_of_the_nearest_start_that_was_tried(experiment):
    chosen = {str(level): {"name": f"step{level}", "greedy": level} for level in experiment.LEVELS}
    (experiment.OUT / "starts").mkdir(parents=True)
    (experiment.OUT / "starts/chosen.json").write_text(json.dumps(chosen))
    experiment.run_part("map", [0], arms(experiment, "supervised"))
    tried = {(start.split("/")[-2], rate) for start, _, rate, seed, _ in experiment.runs if seed == 0}
    at_two = {(f"step{level}", rate) for level in experiment.TUNED for rate in experiment.ARMS["supervised"].rates["map"]}
    assert tried >= at_two
    rates = {level: {rate for start, rate in tried if start == f"step{level}"} for level in experiment.LEVELS}
    assert all(len(rates[level]) == (2 if level in experiment.TUNED else 1) for level in experiment.LEVELS)


def test_paired_shares(experiment):
    found = experiment.compared([0, 0, 1, 1] * 50, [0, 1, 1, 1] * 50)
    assert (found["n"], found["before"], found["after"], found["change"]) == (200, 50, 75, 25)
    assert found["interval"][0] < 25 < found["interval"][1]


def test_a_policy_of_the_past_is_read_from_git_history(experiment):
    _, revision = experiment.EARLIER["small, four parts"]
    if subprocess.run(["git", "-C", REPO, "cat-file", "-e", revision], capture_output=True).returncode:
        pytest.skip("needs a clone with the whole history")
    start, = experiment.starts_of("small")
    assert experiment.name_of(start) == "small, four parts" and experiment.earlier_policy("small, four parts") == start
    assert sum(map(torch.numel, load_model(start).parameters())) == sum(map(torch.numel, load_model("small").parameters()))
    assert any(not torch.equal(*pair) for pair in zip(load_model(start).parameters(), load_model("small").parameters()))
