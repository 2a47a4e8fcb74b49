"Sweeps as processes: workers that are killed, stopped, joined; PostgreSQL; W&B's client against a server of the tests' own."
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import optuna
import psutil
import pytest

from bgrpo_nb.base.ownership import claim_folder
from bgrpo_nb.cli import main
from bgrpo_nb.base.processes import MARK, shares, visible_gpus
from bgrpo_nb.study.analysis import read_runs
from bgrpo_nb.study.run_readers import read_study
from bgrpo_nb.study.sweeps import SweepError, plan, read_sweep
from bgrpo_nb.study.trials import LEASE, TrialState, claim, open_storage, open_study, return_lost, run_trial

REPO = Path(__file__).parent.parent
POSTGRES = Path("/usr/lib/postgresql/15/bin")
TOY = """
import json, sys, time
from pathlib import Path
flags = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
folder, x, y = Path(flags["output_dir"]), int(flags["x"]), float(flags["y"])
if (folder.parents[1] / "broken").exists(): sys.exit("the data is not there")
slow = (folder.parents[1] / "slow").exists() or "retry" in folder.name
with open(folder / "metrics.jsonl", "w", buffering=1) as file:
    for step in range(1, 10):
        print(json.dumps(dict(step=step, score=round(x * step + y + int(flags.get("seed", 0)) / 10, 6))), file=file)
        time.sleep(float(flags.get("pause", 0)) * (15 if slow else 1))
(folder / "result.json").write_text(json.dumps(dict(step=9, seconds=0.1, seed=flags.get("seed"), commit="c", date="2026-01-01")))
"""
GRID = """
program: toy.py
method: grid
metric: {name: score, goal: maximize}
parameters:
  x: {values: [0, 1, 2, 3, 4, 5]}
  y: {values: [0.0, 0.5, 1.0]}
  pause: {value: 0.012}
  seed: {values: [0, 1]}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder with a toy program that takes a tenth of a second, and longer where it is tried again"
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "grid.yaml").write_text(GRID)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launch(*words, wait=True, **env):
    "`bgrpo sweep` in a process of its own, in a session that Ctrl-C of the tests does not reach"
    plain = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"OMP_NUM_THREADS": "1"} | env
    plain["PYTHONPATH"] = f"{REPO}{os.pathsep}{plain.get('PYTHONPATH', '')}"
    process = subprocess.Popen([sys.executable, "-m", "bgrpo_nb", "sweep", *map(str, words)], env=plain, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    if not wait: return process
    said, _ = process.communicate(timeout=900)
    return process.returncode, said


def trials(folder, name="grid", study=None): return (study or optuna.load_study(study_name=name, storage=open_storage(folder))).get_trials(deepcopy=False)
def settled(found): return {t.user_attrs["planned"] for t in found if t.state == TrialState.COMPLETE}
def running(found): return [t for t in found if t.state == TrialState.RUNNING and "pid" in t.user_attrs and "seen" in t.user_attrs]


def orphans(folder):
    "Processes of trials in this folder, by the mark in their environment"
    def mark(p):
        try: return p.environ().get(MARK, "")
        except (psutil.Error, OSError): return ""
    return [p for p in psutil.process_iter() if mark(p).startswith(str(folder)) and p.status() != psutil.STATUS_ZOMBIE]


def kill_one(folder, study=None):
    "Kill a worker while its trial has no result yet; whether there was one"
    for t in running(trials(folder, study=study)):
        os.kill(t.user_attrs["pid"], signal.SIGSTOP)
        if (where := folder / t.user_attrs["folder"]).is_dir() and not (where / "result.json").exists(): return os.kill(t.user_attrs["pid"], signal.SIGKILL) or True
        os.kill(t.user_attrs["pid"], signal.SIGCONT)


def until(condition, seconds=900):
    "The first true value of `condition`"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition(): return found
        time.sleep(0.02)
    raise AssertionError("it never came to that")


def started(folder, name="grid"):
    def try_it():
        try: return trials(folder, name)
        except (KeyError, FileNotFoundError): return None
    return try_it if (folder / "journal.log").exists() else lambda: []


def each_point_once(folder, found, n=36):
    "What must hold however the processes died"
    done = [t for t in found if t.state == TrialState.COMPLETE]
    assert sorted(t.user_attrs["planned"] for t in done) == list(range(n))
    assert sorted(p.parent.name[:4] for p in folder.glob("trials/*/result.json")) == [f"{i:04d}" for i in range(n)]
    for t in found:
        if "folder" not in t.user_attrs or not (where := folder / t.user_attrs["folder"]).is_dir(): continue  # its worker died before it began
        config = json.loads((where / "config.json").read_text())
        assert (config["planned"], config["attempt"], config["seed"]) == tuple(t.user_attrs[k] for k in ("planned", "attempt", "seed"))
        if t.state == TrialState.COMPLETE: assert (where / "result.json").exists() and config["parameters"] == t.params
        else: assert t.state == TrialState.FAIL and json.loads((where / "failure.json").read_text())["reason"] in ("its worker was lost", "the sweep was stopped")
    assert not [t for t in found if t.state in (TrialState.RUNNING, TrialState.WAITING)]
    assert not orphans(folder)


# --- nothing lost -------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("repetition", range(5))
def test_killed_workers_lose_nothing(place, repetition):
    "Three workers, 36 points: one killed mid-trial, the one that runs the last trial too; every other time the launcher besides"
    folder = place / "out"
    process = launch("grid.yaml", "--workers", 3, "--output_dir", folder, wait=False)
    until(lambda: started(folder)())
    study = optuna.load_study(study_name="grid", storage=open_storage(folder))
    def now(): return study.get_trials(deepcopy=False)
    until(lambda: len(settled(now())) >= 4 + repetition)
    until(lambda: kill_one(folder, study))
    if repetition % 2:
        until(lambda: len(settled(now())) >= 12)
        process.kill()
        process.communicate()
        until(lambda: not orphans(folder))
        assert 12 <= len(settled(now())) < 36
        process = launch("grid.yaml", "--workers", 3, "--output_dir", folder, "--resume", wait=False)
    until(lambda: len(settled(found := now())) > 30 and not [t for t in found if t.state == TrialState.WAITING] and kill_one(folder, study))
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    found = trials(folder)
    each_point_once(folder, found)
    assert max(t.user_attrs.get("lost", 0) for t in found if "folder" in t.user_attrs) in (1, 2)


def test_a_point_whose_worker_dies_three_times_is_given_up(place):
    sweep = read_sweep("grid.yaml", run_cap=1)
    study = open_study(sweep, place / "out")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for attempt in range(3):
        trial = claim(study, sweep)
        assert trial.user_attrs["folder"] == "trials/0000" + (f"-retry{attempt}" if attempt else "")
        trial.set_user_attr("pid", gone.pid)
        (place / "out" / trial.user_attrs["folder"]).mkdir(parents=True)
        assert return_lost(study, place / "out") == [0]
    assert claim(study, sweep) is None and "given up" in json.loads((place / "out/trials/0000-retry2/failure.json").read_text())["reason"]


def test_what_had_finished_when_its_worker_died_is_kept(place):
    sweep = read_sweep("grid.yaml", run_cap=1)
    study = open_study(sweep, place / "out")
    trial = claim(study, sweep)
    where = place / "out/trials/0000"
    where.mkdir(parents=True)
    subprocess.run([sys.executable, "toy.py", f"--output_dir={where}", "--x=2", "--y=1.0"], check=True)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    trial.set_user_attr("pid", gone.pid)
    assert return_lost(study, place / "out") == [] and study.trials[0].value == 19.0 and claim(study, sweep) is None


def cut_off(study, sweep, folder):
    "A trial that was claimed and is in the queue again, as after the loss of its worker"
    from bgrpo_nb.study import trials
    cut = claim(study, sweep)
    trials.give_back(study, cut)
    study.tell(cut.number, state=TrialState.FAIL)
    return folder / cut.user_attrs["folder"]


def left_behind(before, state):
    "The checkpoint at step 5 and the files of a run"
    checkpoint = before / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    for name in ("model.json", "optimizer.json"): (checkpoint / name).write_text("{}")
    (checkpoint / "trainer_state.json").write_text(state)
    for name in ("metrics.jsonl", "config.yaml"): (before / name).write_text("")
    return checkpoint


@pytest.mark.parametrize("lost", [1, 2], ids=["once", "and_again_before_it_began"])
def test_a_retry_of_training_continues_from_the_checkpoints_of_the_attempt_that_was_cut_off(place, monkeypatch, lost):
    from bgrpo_nb.study import trials
    sweep = read_sweep("grid.yaml", run_cap=1)
    (place / "toy.py").write_text("import sys; print(sys.argv[1:])\n" + TOY)
    study = open_study(sweep, place / "out")
    before = left_behind(cut_off(study, sweep, place / "out"), '{"global_step": 5}')
    if lost == 2: cut_off(study, sweep, place / "out")
    monkeypatch.setattr(trials, "TRAIN", sweep.command)
    assert run_trial(study, claim(study, sweep), sweep, place / "out") == "finished"
    again = place / f"out/trials/0000-retry{lost}"
    assert "--resume=True" in (again / "log.txt").read_text() and (again / "checkpoint-5/trainer_state.json").exists() and not before.exists()


def test_a_retry_whose_checkpoints_are_all_damaged_starts_anew_and_keeps_them(place, monkeypatch):
    from bgrpo_nb.study import trials
    sweep = read_sweep("grid.yaml", run_cap=1)
    (place / "toy.py").write_text("import sys; print(sys.argv[1:])\n" + TOY)
    study = open_study(sweep, place / "out")
    damaged = left_behind(cut_off(study, sweep, place / "out"), '{"global_')
    monkeypatch.setattr(trials, "TRAIN", sweep.command)
    with pytest.warns(UserWarning, match="trials/0000 holds no whole checkpoint.*0000-retry1 starts anew") as caught:
        assert run_trial(study, claim(study, sweep), sweep, place / "out") == "finished"
    again = place / "out/trials/0000-retry1"
    assert len(caught) == 1 and "--resume" not in (again / "log.txt").read_text() and (damaged / "trainer_state.json").exists()


def test_a_worker_that_dies_before_it_has_read_its_point_changes_no_point(place, monkeypatch):
    "And it does not count as a loss of the point; found by `tests/load.py`"
    from bgrpo_nb.study import trials
    sweep = read_sweep("grid.yaml", run_cap=1)
    study = open_study(sweep, place / "out")
    point = plan(sweep)[0].parameters
    monkeypatch.setattr(trials, "SIGN", -1)
    for _ in range(4):
        study.ask()
        assert return_lost(study, place / "out") == [0]
    trial = claim(study, sweep)
    assert trial.params == point and trial.user_attrs["lost"] == 0


def test_another_machine_is_lost_when_it_is_silent(place):
    sweep = read_sweep("grid.yaml")
    study = open_study(sweep, place / "out")
    quiet, alive = claim(study, sweep), claim(study, sweep)
    for trial, seen in ((quiet, time.time() - LEASE - 1), (alive, time.time() - 30)):
        trial.set_user_attr("host", "elsewhere")
        trial.set_user_attr("seen", seen)
    assert return_lost(study, place / "out") == [0]


def test_a_trial_that_was_taken_for_lost_does_not_count_twice(place, monkeypatch):
    "Its worker was only slow: it ends the program, and the retry stands"
    sweep = read_sweep("grid.yaml", run_cap=1)
    sweep.fixed["pause"] = 0.5
    study = open_study(sweep, place / "out")
    trial = claim(study, sweep)
    study.tell(trial.number, state=TrialState.FAIL)
    assert run_trial(study, trial, sweep, place / "out") == "failed"
    assert "another worker" in json.loads((place / "out/trials/0000/failure.json").read_text())["reason"] and not orphans(place)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_stopped_and_resumed(place, number):
    folder = place / "out"
    claim_folder(folder, "sweep")
    (folder / "slow").touch()
    process = launch("grid.yaml", "--workers", 2, "--output_dir", folder, wait=False)
    until(lambda: (folder / "journal.log").exists() and len(settled(started(folder)() or [])) >= 2 and len(running(trials(folder))) == 2)
    process.send_signal(number)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 130 and "trials are left; continue with" in said, said
    found = trials(folder)
    assert not orphans(folder) and not running(found) and [t.user_attrs["lost"] for t in found if "lost" in t.user_attrs] == [0, 0]
    assert "failed" not in said
    (folder / "slow").unlink()
    status, said = launch("grid.yaml", "--workers", 2, "--output_dir", folder, "--resume")
    assert status == 0 and said.count("36 of 36 done") == 1 and "failed" not in said, said
    each_point_once(folder, trials(folder))
    for source in (folder, folder / "journal.log"): assert read_runs(source).counts() == "36 finished, 2 interrupted"


def test_a_worker_that_was_killed_because_the_sweep_was_stopped_ends_no_point(place, monkeypatch):
    sweep = read_sweep("grid.yaml", run_cap=1)
    study = open_study(sweep, place / "out")
    monkeypatch.setattr("bgrpo_nb.study.trials.is_lost", lambda trial: True)
    for _ in range(5):
        (place / "out" / claim(study, sweep).user_attrs["folder"]).mkdir(parents=True)
        assert return_lost(study, place / "out", stopped=True) == [0]
    assert [r.state for r in read_study(place / "out/journal.log")] == 5 * ["interrupted"]
    assert json.loads((place / "out/trials/0000-retry4/failure.json").read_text())["reason"] == "the sweep was stopped"


def test_all_failed_is_status_1_with_logs_and_reasons_and_can_be_mended(place):
    folder = place / "out"
    claim_folder(folder, "sweep")
    (folder / "broken").touch()
    status, said = launch("grid.yaml", "--run_cap", 4, "--workers", 2, "--output_dir", folder)
    assert status == 1 and "failed: trials/0000: exit status 1: the data is not there" in said, said
    for i in range(4):
        assert json.loads((folder / f"trials/{i:04d}/failure.json").read_text()) == dict(reason="exit status 1: the data is not there", exit_status=1)
        assert "the data is not there" in (folder / f"trials/{i:04d}/log.txt").read_text()
    assert launch("grid.yaml", "--run_cap", 4, "--output_dir", folder, "--resume")[0] == 1   # what failed by itself is not tried again by itself
    (folder / "broken").unlink()
    status, said = launch("grid.yaml", "--run_cap", 4, "--output_dir", folder, "--resume", "--retry_failed")
    assert status == 0 and settled(trials(folder)) == {0, 1, 2, 3}, said


def test_a_program_that_does_not_keep_the_contract_says_so(place):
    sweep = read_sweep("grid.yaml", run_cap=3)
    study = open_study(sweep, place / "out")
    for program, says in (("", "wrote no result.json"), ("import sys; open(sys.argv[-1].split('=')[1] + '/result.json', 'w').write('{}')", "never wrote score"),
                          ("import sys; f = sys.argv[-1].split('=')[1]; open(f + '/result.json', 'w').write('{}'); open(f + '/metrics.jsonl', 'w').write('{\"score\": NaN}\\n')", "score is nan")):
        (place / "toy.py").write_text(program)
        trial = claim(study, sweep)
        assert run_trial(study, trial, sweep, place / "out") == "failed"
        assert says in json.loads((place / "out" / trial.user_attrs["folder"] / "failure.json").read_text())["reason"]


# --- the same results however many work ---------------------------------------------------------------------------------------------------------

def metrics(folder): return {p.parent.name: (json.loads((p.parent / "config.json").read_text())["parameters"], p.read_text()) for p in sorted(Path(folder).glob("trials/*/metrics.jsonl"))}


def write(place, **changes):
    import yaml
    content = yaml.safe_load(GRID) | changes
    (place / "other.yaml").write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    return "other.yaml"


RANDOM = dict(method="random", run_cap=8, parameters=dict(x=dict(min=0, max=9), y=dict(min=0.0, max=1.0), seed=dict(values=[0, 1])))


def test_random_points_do_not_depend_on_the_number_of_workers(place):
    file = write(place, **RANDOM)
    for name, workers in (("one", 1), ("three", 3)): assert launch(file, "--workers", workers, "--output_dir", name, "--seed", 7)[0] == 0
    assert metrics("one") == metrics("three") and len(metrics("one")) == 8
    by_seed = [json.loads((Path("one/trials") / f"{i:04d}/config.json").read_text()) for i in range(8)]
    assert [c["parameters"] for c in by_seed[:4]] == [c["parameters"] for c in by_seed[4:]] and [c["seed"] for c in by_seed] == [0] * 4 + [1] * 4
    assert plan(read_sweep(file), 7) != plan(read_sweep(file), 8)


def test_bayes_plans_exactly_and_gives_each_configuration_its_seeds(place):
    file = write(place, **RANDOM | dict(method="bayes", run_cap=24))
    assert launch(file, "--workers", 3, "--output_dir", "out")[0] == 0
    found = metrics("out")
    assert list(found) == [f"{i:04d}" for i in range(24)]
    for i in range(0, 24, 2): assert found[f"{i:04d}"][0] == found[f"{i + 1:04d}"][0]
    values = [found[f"{i:04d}"][0]["x"] for i in range(0, 24, 2)]
    assert len(set(map(str, (p for p, _ in found.values())))) == 12 and max(values) == 9
    for name in ("one", "two"): assert launch(file, "--run_cap", 12, "--output_dir", name)[0] == 0
    assert metrics("one") == metrics("two")


def test_hyperband_ends_what_lags_behind(place):
    parameters = dict(x=dict(values=[9, 8, 7, 6, 5, 4, 3, 2, 1]), y=dict(value=0.0), pause=dict(value=0.15))
    file = write(place, parameters=parameters, early_terminate=dict(type="hyperband", min_iter=1, max_iter=9, s=2))
    sweep = read_sweep(file)
    study = open_study(sweep, place / "out")
    states = [run_trial(study, claim(study, sweep), sweep, place / "out") for _ in range(9)]
    assert states[0] == "finished" and 2 <= states.count("pruned") <= 8
    i = states.index("pruned")
    assert not (place / f"out/trials/{i:04d}/result.json").exists() and 1 <= json.loads((place / f"out/trials/{i:04d}/pruned.json").read_text())["iterations"] < 9
    assert not orphans(place)


def test_two_sweeps_of_real_training_give_identical_metrics(tmp_path, monkeypatch):
    "BGRPO and GRPO, two steps each, two workers and one; what `bgrpo train` accounts for is in every result"
    monkeypatch.chdir(tmp_path)
    few = dict(num_problems=40, held_out=6, known_problems=0, num_generations=4, prompts_per_step=4, max_steps=2, eval_steps=2, save_steps=2, warmup_steps=0, num_samples=2, num_beams=4, wide_beams=4, use_cpu=True)
    import yaml
    (tmp_path / "real.yaml").write_text(yaml.safe_dump(dict(method="grid", parameters=dict(rollout=dict(values=["beam", "sample"]), **{k: dict(value=v) for k, v in few.items()}))))
    for name, workers in (("one", 1), ("two", 2)):
        status, said = launch("real.yaml", "--workers", workers, "--output_dir", name, "--seeds", "3,")
        assert status == 0, said
    def rows(folder): return [[{k: v for k, v in json.loads(line).items() if not any(w in k for w in ("time", "seconds", "per_second"))}
                               for line in (tmp_path / folder / f"trials/{i:04d}/metrics.jsonl").read_text().splitlines()] for i in range(2)]
    assert rows("one") == rows("two") and rows("one")[0] != rows("one")[1]
    result = json.loads((tmp_path / "two/trials/0001/result.json").read_text())
    assert result["seed"] == 3 and result["versions"]["torch"] and "rollout: sample" in (tmp_path / "two/trials/0001/config.yaml").read_text()


@pytest.mark.parametrize("torn", ['{"op_code":', '{"op_code":5,"worker_id":"x","trial_id":0', '{"op_code":9}'])
def test_a_journal_whose_last_line_is_torn_resumes(place, torn):
    "By one worker, by several, and while others write: nothing is lost, and the torn line is gone"
    folder = place / "torn"
    sweep = read_sweep(write(place, parameters=dict(x=dict(values=[1, 2]), y=dict(value=0.5))))
    study = open_study(sweep, folder)
    assert run_trial(study, claim(study, sweep), sweep, folder) == "finished"
    whole = (folder / "journal.log").read_bytes()
    with open(folder / "journal.log", "a") as file: file.write(torn)
    again = open_study(sweep, folder, resume=True)
    assert run_trial(again, claim(again, sweep), sweep, folder) == "finished"
    assert claim(study, sweep) is None
    assert settled(trials(folder, sweep.name)) == {0, 1}
    journal = (folder / "journal.log").read_bytes()
    assert journal.startswith(whole) and all(json.loads(line) for line in journal.splitlines())


@pytest.mark.parametrize("goal, best", [("maximize", 5), ("minimize", 0)])
def test_analyze_knows_the_metric_of_a_sweep_of_ones_own(place, goal, best, capsys):
    "Its name and its goal, from the sweep's folder, its journal and its trials, and of runs that no sweep made"
    grid = GRID.replace("goal: maximize", f"goal: {goal}").replace("pause: {value: 0.012}", "pause: {value: 0}")
    grid = grid.replace("y: {values: [0.0, 0.5, 1.0]}", "y: {value: 0.5}").replace("[0, 1, 2, 3, 4, 5]", "[0, 5]")
    (place / "grid.yaml").write_text(grid)
    status, said = launch("grid.yaml", "--output_dir", "run", "--workers", 1)
    assert status == 0 and "bgrpo analyze" in said, said
    for source in (["run"], ["run/journal.log"]):
        assert main(["analyze", *source, "--arm", "x", "--out", "out"]) in (0, None)
        said = capsys.readouterr().out
        assert "metrics score" in said and said.splitlines()[3].split()[1] == str(best), said
    runs = read_runs("run")
    assert (runs.metric, runs.minimize) == ("score", goal == "minimize")
    assert runs.best(runs.metric, 1, runs.minimize)["x"].item() == best
    apart = place / "apart"
    for k, path in enumerate(sorted(Path("run/trials").iterdir())):
        (apart / str(k)).mkdir(parents=True)
        for name in ("metrics.jsonl", "result.json"): shutil.copy(path / name, apart / str(k) / name)
    assert read_runs(apart).metrics == [] and read_runs(apart, own="score").metrics == ["score"]
    assert main(["analyze", "apart", "--metric", "score", "--out", "out"]) in (0, None)


# --- the file -----------------------------------------------------------------------------------------------------------------------------------

PARAMETERS = dict(x=dict(values=[1, 2]))
@pytest.mark.parametrize("changes,says", [
    (dict(method="gird"), "did you mean grid"), (dict(method=None), "`method:` is missing"), (dict(metod="grid"), "did you mean method"),
    (dict(method="bayes", metric=None, program=None), "bayes needs a metric"), (dict(metric=None), "metric of your program"), (dict(metric="score"), "needs a name"),
    (dict(metric=dict(name="score")), "would take minimize"), (dict(metric=dict(name="score", goal="best")), "maximize, minimize"),
    (dict(metric=dict(name="score", goal="maximize", target=1)), "target"), (dict(parameters=None), "`parameters:` is missing"),
    (dict(parameters=dict(x=dict(distribution="log_uniform", min=1e-5, max=2e-4))), "exp(1e-05) = 1.00001; use log_uniform_values"),
    (dict(parameters=dict(x=dict(distribution="log_uniform_values", min=-11, max=-8))), "for exponents use log_uniform"),
    (dict(parameters=dict(x=dict(distribution="normal", mu=0, sigma=1))), "`mu` is not known"), (dict(parameters=dict(x=dict(distribution="normal"))), "normal is not known"),
    (dict(parameters=dict(x=dict(distribution="int_uniform", min=1, max=2.5))), "use uniform"), (dict(parameters=dict(x=dict(min=3, max=3))), "must be below"),
    (dict(parameters=dict(x=dict(min=3))), "takes min and max"), (dict(parameters=dict(x=dict(min="low", max="high"))), "is no number"), (dict(parameters=dict(x=5)), "write {value: 5}"),
    (dict(parameters=dict(x=[5, 6])), "write {values: [5, 6]}"), (dict(parameters=dict(x=dict(vales=[1]))), "did you mean value"), (dict(parameters=dict(x=dict(values=[]))), "must be a list"),
    (dict(parameters=dict(x=dict(values=[1, 1.0]))), "is twice"), (dict(parameters=dict(x=dict(value=1, values=[1, 2]))), "not value and values"),
    (dict(parameters=dict(x=dict(parameters=dict(y=dict(value=1))))), "its own name"), (dict(parameters=dict(x=dict(values=[[1], [2]]))), "cannot become a flag"),
    (dict(parameters=dict(x=dict(min=0.0, max=1.0, q=0.3))), "multiple of q"), (dict(parameters=dict(output_dir=dict(value="x"))), "leave it out"),
    (dict(parameters=dict(x=dict(min=0.0, max=1.0))), "a grid cannot hold"), (dict(parameters=PARAMETERS | dict(seed=dict(min=0, max=9))), "name the seeds"),
    (dict(parameters=PARAMETERS | dict(seed=dict(values=[-1, 2]))), "is no seed"), (dict(method="random", parameters=PARAMETERS), "never ends"),
    (dict(method="random", run_cap=3, parameters=dict(x=dict(value=1))), "nothing to choose"), (dict(run_cap="many"), "no number of trials"), (dict(run_cap=True), "no number of trials"),
    (dict(method="random", run_cap=1, parameters=PARAMETERS | dict(seed=dict(values=[0, 1]))), "less than one configuration"),
    (dict(run_cap=10**9, method="random"), "1000000000 trials are more than 100000"),
    (dict(parameters=dict(x=dict(min=0, max=10**9))), "1000000001 trials are more than"), (dict(parameters=dict(x=dict(min=0.0, max=1.0, q=1e-10))), "10000000001 trials"),
    (dict(parameters={name: dict(values=list(range(60))) for name in "xyz"}), "216000 trials"),
    (dict(program="nowhere.py"), "no program nowhere.py"), (dict(command=["python", "toy.py"]), 'no "${args}"'), (dict(command="python toy.py"), "list of words"),
    (dict(command=["${program}", "${args}"], program=None), "`program:` is missing"), (dict(command=["${interpeter}", "${args}"]), "${interpeter} is not known"),
    (dict(command=["${args}"], program=None), "no program before the flags"), (dict(command=["${env}", "${interpreter}", "${args}"], program=None), "no program before the flags"),
    (dict(command=["python", "other.py", "${args}"]), "does not run the program toy.py"),
    (dict(early_terminate=dict(type="envelope")), "only hyperband"), (dict(early_terminate=dict(type="hyperband")), "give min_iter"), (dict(early_terminate=dict(type="hyperband", max_iter=9)), "max_iter with s"),
    (dict(early_terminate=dict(type="hyperband", min_iter=3, eta=1)), "eta must be 2"), (dict(early_terminate=dict(type="hyperband", min_iter=0)), "use 1 or more"),
    (dict(early_terminate=dict(type="hyperband", min_iter=3, strict=True)), "leave it out"), (dict(early_terminate=dict(type="hyperband", min_itr=3)), "did you mean min_iter"),
])
def test_every_trap_of_the_file_is_one_line_that_says_how_to_mend_it(place, changes, says):
    file = write(place, **changes)
    with pytest.raises(SweepError) as e: read_sweep(file)
    assert says in str(e.value) and str(e.value).startswith("other.yaml: ") and "\n" not in str(e.value)


def test_what_can_be_put_right_is_put_right_and_noted(place):
    (place / "lax.yaml").write_text("program: toy.py\nmethod: Random\nrun_cap: 2\nmetric: {name: score, goal: maximise}\nparameters:\n"
                                    "  a: {values: [1e-5, 2e-4]}\n  b: {values: ['1e-5', 2e-4]}\n  c: {min: 0, max: 0.5}\n  d: {values: [3_2, 4_2]}\n  e: {values: [true, null]}\n")
    sweep = read_sweep("lax.yaml")
    assert sweep.swept["a"].choices == sweep.swept["b"].choices == (1e-5, 2e-4) and sweep.swept["d"].choices == ("3_2", "4_2") and sweep.swept["e"].choices == (True, None)
    assert isinstance(sweep.swept["c"], optuna.distributions.FloatDistribution) and (sweep.method, sweep.goal) == ("random", "maximize")
    for part in ("'1e-5' is read", "both are read as fractions", "Random is read", "maximise is read"): assert any(part in n for n in sweep.notes), sweep.notes


@pytest.mark.parametrize("path", sorted((REPO / "configs/sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_sweep_of_the_repository_can_run(path):
    "Each planned trial is one that `bgrpo train` takes"
    from bgrpo_nb.cli import _check_trials
    sweep = read_sweep(path)
    _check_trials(sweep, 0)
    assert sweep.metric.startswith("eval_") and sweep.notes == []
    import yaml
    assert yaml.safe_load(path.read_text())["parameters"].keys() - {"seed"} == sweep.swept.keys() | sweep.fixed.keys()
    for name, d in sweep.swept.items():  # read by W&B's own YAML, numbers are numbers too
        for v in (yaml.safe_load(path.read_text())["parameters"][name].get(k) for k in ("min", "max")): assert not isinstance(v, str)


# --- the command --------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("line,says", [
    ("", "which file"), ("nowhere.yaml", "no sweep file nowhere.yaml"), ("grid.yaml --workers 0", "use 1 or more"), ("grid.yaml --retry_failed", "add --resume"), ("grid.yaml --resume", "leave out --resume"),
    ("grid.yaml --seeds none", "no list of seeds"), ("grid.yaml --storage sqlite:///x.db", "two workers"), ("grid.yaml --engine wandb", "wandb login"), ("grid.yaml --join a/b/c", "ID alone"),
    ("grid.yaml --engine wandb --resume", "--join ID"), ("wrong.yaml", "did you mean --learning_rate"), ("few.yaml", "from 2 to 10000"), ("grid.yaml --worker 2", "did you mean --workers"),
    ("grid.yaml --engine optuna --project p", "--project is W&B's"), ("grid.yaml --entity e", "--entity is W&B's"), ("grid.yaml --storage st.log --project p", "--project is W&B's"),
    ("grid.yaml --dry-run --project p", "--project is W&B's"), ("--join a/b/c --storage st.log", "--storage would change nothing"), ("--join a/b/c --seed 0", "--seed would change"),
    ("--join a/b/c --run_cap 3", "--run_cap would change"), ("--join a/b/c --seeds 3", "--seeds would change"), ("--join a/b/c --name n", "--name would change"),
    ("--join a/b/c --project p", "another --project than p"), ("--join a/b/c --entity e", "another --entity than e"),
])
def test_what_cannot_be_done_is_one_line_and_status_2(place, capsys, monkeypatch, line, says):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (place / "wrong.yaml").write_text("method: grid\nparameters: {lerning_rate: {values: [1.0e-5, 1.0e-4]}}\n")
    (place / "few.yaml").write_text("method: grid\nparameters: {num_generations: {values: [4, 1]}}\n")
    assert main(["sweep", *line.split()]) == 2
    said = capsys.readouterr()
    assert len(said.err.strip().splitlines()) == 1 and says in said.err, said.err


@pytest.mark.parametrize("engine", ["--engine=wandb", "--engine=auto"])
def test_wandb_takes_no_flag_of_optuna(place, capsys, monkeypatch, engine):
    monkeypatch.setattr("bgrpo_nb.base.network.logged_in", lambda: True)
    assert main(["sweep", "grid.yaml", engine, "--seed", "0"]) == 2
    said = capsys.readouterr().err
    assert "--seed is Optuna's" in said and len(said.strip().splitlines()) == 1


def test_a_dry_run_times_one_trial_and_leaves_nothing(place):
    "The program asks whether the folder is its own, as `bgrpo train` does"
    (place / "toy.py").write_text(f"from bgrpo_nb.base.ownership import claim_folder\n{TOY}claim_folder(folder, 'run')\n")
    before = sorted(p.name for p in place.iterdir())
    status, said = launch("grid.yaml", "--dry-run", "--workers", 2)
    assert status == 0 and "36 trials" in said and "is run now to time it" in said and "are deleted" in said and "2 at a time" in said, said
    assert sorted(p.name for p in place.iterdir()) == sorted([*before])


def test_a_changed_file_is_not_resumed(place):
    assert launch("grid.yaml", "--run_cap", 1, "--output_dir", "out")[0] == 0
    for words in (["--resume"], ["--run_cap", 1]): assert launch("grid.yaml", *words, "--output_dir", "out")[0] == 2
    assert launch("grid.yaml", "--run_cap", 1, "--resume", "--output_dir", "out")[0] == 0


def contents(folder): return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def of_an_earlier_version(folder):
    "Neither a record in the folder nor an id in the study"
    (folder / "optuna.json").unlink()
    journal = folder / "journal.log"
    journal.write_text("".join(line for line in journal.read_text().splitlines(True) if '"user_attr": {"id":' not in line))


SAYS = dict(other="another --output_dir", storage="another --output_dir", same="add --resume")
@pytest.mark.parametrize("old", [False, True], ids=["recorded", "earlier_version"])
def test_a_folder_holds_the_trials_of_one_sweep(place, capsys, old):
    "Whatever is asked for, the first sweep stays as it is, and can be resumed"
    folder, other = place / "out", write(place, name="other")
    assert launch("grid.yaml", "--run_cap", 2, "--output_dir", folder)[0] == 0
    if old: of_an_earlier_version(folder)
    before, around = contents(folder), sorted(p.name for p in place.iterdir())
    for words, says in ((f"{other} --run_cap 2", "other"), (f"{other} --run_cap 2 --resume", "other"), ("grid.yaml --run_cap 2 --name renamed", "other"), ("grid.yaml --run_cap 2", "same"),
                        ("grid.yaml --run_cap 2 --storage st.log", "storage"), ("grid.yaml --run_cap 2 --storage st.log --resume", "storage")):
        assert main(["sweep", *words.split(), "--output_dir", str(folder), "--engine", "optuna"]) == 2
        said = capsys.readouterr().err.strip()
        assert SAYS[says] in said and len(said.splitlines()) == 1 and "--name" not in said, said
        assert contents(folder) == before and sorted(p.name for p in place.iterdir()) == around
    assert launch("grid.yaml", "--run_cap", 2, "--output_dir", folder, "--resume")[0] == 0
    assert metrics(folder).keys() == {"0000", "0001"} and contents(folder).items() >= {k: v for k, v in before.items() if "trials" in k.parts}.items()


def test_sweeps_that_share_a_storage_keep_folders_of_their_own(place, capsys):
    file = write(place, name="other", parameters=dict(x=dict(values=[7, 8]), y=dict(values=[0.0])))
    for words in (["grid.yaml", "--run_cap", 2, "--output_dir", "one"], [file, "--output_dir", "two"]): assert launch(*words, "--storage", "one/journal.log")[0] == 0
    assert main(["sweep", "other.yaml", "--storage", "one/journal.log", "--output_dir", "three"]) == 2 and "another --output_dir and --name" in capsys.readouterr().err
    assert [r.folder for r in read_study("one/journal.log", "other")] == [None, None]
    assert [Path(r.folder).parts[-3] for r in read_study("one/journal.log", "grid")] == ["one", "one"]


def test_gpus_go_round_and_threads_are_shared(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert [s["CUDA_VISIBLE_DEVICES"] for s in shares(3, ["2", "5"])] == ["2", "5", "2"]
    assert shares(1, [], threads=3) == [dict(OMP_NUM_THREADS="3", CUDA_VISIBLE_DEVICES="")] and "CUDA_VISIBLE_DEVICES" not in shares(1, None)[0]
    assert [int(s["OMP_NUM_THREADS"]) for s in shares(2, None)] == [max(1, len(os.sched_getaffinity(0)) // 2)] * 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    assert visible_gpus() == ["1", "3"]


# --- PostgreSQL ---------------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def postgres():
    "A server of its own on a socket, as a user who is not root; its address"
    if not (POSTGRES / "initdb").exists(): pytest.skip(f"PostgreSQL is not installed in {POSTGRES}; on Debian: apt-get install postgresql-15")
    pytest.importorskip("psycopg", reason="psycopg is not installed; pip install 'bgrpo_nb[postgres]'")
    place = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
    who = {}
    if os.getuid() == 0:
        user = pwd.getpwnam("nobody")
        who = dict(user=user.pw_uid, group=user.pw_gid, extra_groups=[])
        os.chown(place, user.pw_uid, user.pw_gid)
    def run(*words): subprocess.run([str(w) for w in words], check=True, cwd=place, capture_output=True, timeout=900, **who)
    run(POSTGRES / "initdb", "-D", place / "data", "-U", "sweeper", "-A", "trust", "--no-sync")
    server = subprocess.Popen([POSTGRES / "postgres", "-D", place / "data", "-k", place, "-c", "listen_addresses=", "-c", "fsync=off"], cwd=place, stderr=subprocess.DEVNULL, **who)
    try:
        until(lambda: subprocess.run([POSTGRES / "pg_isready", "-h", place, "-q"]).returncode == 0)
        yield f"postgresql://sweeper@/postgres?host={place}"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(900)
        shutil.rmtree(place, ignore_errors=True)


def test_two_machines_share_a_sweep_through_postgresql(place, postgres):
    "Two launchers with folders of their own, three workers, one killed mid-trial: every point once"
    here, there = place / "here", place / "there"
    for folder in (here, there): claim_folder(folder, "sweep"), (folder / "slow").touch()
    storage = open_storage(here, postgres)
    first = launch("grid.yaml", "--workers", 2, "--output_dir", here, "--storage", postgres, wait=False)
    until(lambda: "grid" in optuna.get_all_study_names(storage))
    study = optuna.load_study(study_name="grid", storage=storage)
    until(lambda: len(settled(study.get_trials(deepcopy=False))) >= 2)
    second = launch("grid.yaml", "--workers", 1, "--output_dir", there, "--storage", postgres, "--resume", wait=False)
    until(lambda: kill_one(here, study))
    for process in (first, second):
        said, _ = process.communicate(timeout=900)
        assert process.returncode == 0, said
    done = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
    assert sorted(t.user_attrs["planned"] for t in done) == list(range(36))
    results = [p.parent.name[:4] for folder in (here, there) for p in folder.glob("trials/*/result.json")]
    assert len(results) == len(set(results)) == 36 and list(there.glob("trials/*/result.json")) and not orphans(place)
    status, said = launch("grid.yaml", "--output_dir", here, "--storage", "postgresql://nobody@127.0.0.1:1/none")
    assert status == 2 and "does not answer" in said and len(said.strip().splitlines()) <= 12, said


# --- W&B ----------------------------------------------------------------------------------------------------------------------------------------

SIX = dict(parameters=dict(x=dict(values=[0, 1, 2]), y=dict(values=[0.0, 0.5]), use_beam=dict(value=False), pause=dict(value=0.2), seed=dict(value=4)), name="six")


def test_wandb_creates_runs_three_agents_and_reads_back(place, monkeypatch):
    from fake_wandb import FakeWandb
    file = write(place, **SIX)
    with FakeWandb() as server:
        status, said = launch(file, "--workers", 3, "--project", "p", "--output_dir", "out", **server.env)
        assert status == 0 and "sweep us/p/s1" in said, f"{said}\n{server.asked}\n" + "".join(p.read_text() for p in Path("out/agents").glob("*.txt"))
        assert sorted((r["summary"]["score"], r["state"]) for r in server.runs.values()) == [(9 * x + y + 0.4, "finished") for x in (0, 1, 2) for y in (0.0, 0.5)]
        assert len([a for a in server.agents.values() if a["runs"]]) >= 2 and len(server.agents) == 3
        for name, value in server.env.items(): monkeypatch.setenv(name, value)
        import wandb
        for run in wandb.Api().sweep("us/p/s1").runs:
            run.load_full_data()
            assert run.config["use_beam"] is False and run.config["seed"] == 4 and run.summary["commit"] == "c"
            assert [row["score"] for row in run.history(pandas=False)] == pytest.approx([run.config["x"] * step + run.config["y"] + 0.4 for step in range(1, 10)])
            where = place / "out/trials" / run.id
            assert json.loads((where / "config.json").read_text())["parameters"] == {k: run.config[k] for k in ("x", "y")} and (where / "result.json").exists()
    assert not orphans(place)


def test_wandb_failures_are_counted_and_a_running_sweep_is_joined(place):
    "An agent ends with 0 even when every run failed; the launcher does not"
    from fake_wandb import FakeWandb
    with FakeWandb() as server:
        claim_folder(place / "out", "sweep")
        (place / "out/broken").touch()
        status, said = launch(write(place, **SIX), "--run_cap", 2, "--output_dir", "out", **server.env)
        assert status == 1 and {r["state"] for r in server.runs.values()} == {"failed"} and len(server.runs) == 2, said
        for run in server.runs.values():
            assert run["summary"]["reason"] == json.loads((place / f"out/trials/{run['id']}/failure.json").read_text())["reason"] == "exit status 1: the data is not there"
        first = launch("other.yaml", "--run_cap", 4, "--output_dir", "here", wait=False, **server.env)
        until(lambda: "s2" in server.sweeps)
        status, said = launch("--join", "us/bgrpo_nb/s2", "--output_dir", "there", **server.env)
        assert status == 0, said
        assert first.wait(120) == 0 and len([a for a in server.agents.values() if a["sweep"] == "s2"]) == 2
        found = [p.parent.name for folder in ("here", "there") for p in (place / folder).glob("trials/*/result.json")]
        assert len(found) == len(set(found)) == 4
        before, made = contents(place / "here"), len(server.sweeps)
        for words in (["other.yaml", "--name", "another"], ["grid.yaml", "--engine", "optuna"], ["--join", "us/bgrpo_nb/s1"]):
            status, said = launch(*words, "--output_dir", "here", **server.env)
            assert status == 2 and "us/bgrpo_nb/s2); choose another --output_dir" in said and contents(place / "here") == before and len(server.sweeps) == made, said
        status, said = launch("--join", "us/bgrpo_nb/s3", **server.env)
        assert status == 2 and "W&B: Could not find sweep" in said and len(said.strip().splitlines()) == 1, said


def test_wandb_gets_what_optuna_gets(place):
    from bgrpo_nb.study.launcher import wandb_config
    made = wandb_config(read_sweep("grid.yaml"))
    assert made["parameters"]["seed"] == {"values": [0, 1]} and made["parameters"]["x"] == {"values": [0, 1, 2, 3, 4, 5]} and made["parameters"]["pause"] == {"value": 0.012}
    lr = dict(distribution="log_uniform_values", min=1e-5, max=2e-4)
    sweep = read_sweep(write(place, method="random", run_cap=4, parameters=dict(lr=lr, k=dict(min=10, max=25), b=dict(min=0, max=0.5))))
    assert {k: wandb_config(sweep)["parameters"][k] for k in "k b lr".split()} == dict(lr=lr, k=dict(distribution="int_uniform", min=10, max=25), b=dict(distribution="uniform", min=0.0, max=0.5))
    with pytest.raises(SweepError, match="--engine optuna"): wandb_config(read_sweep("other.yaml", seeds=(0, 1)))
