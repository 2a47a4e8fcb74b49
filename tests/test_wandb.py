"W&B with its real client, offline, read back with its own reader."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bgrpo_nb.recipes import wandb_logging
from bgrpo_nb.algebra.problems import generate_problems, write_problems
from bgrpo_nb.policy.model import load_tokenizer, new_model, save_model
from bgrpo_nb.recipes.flags import override
from bgrpo_nb.recipes.sft import SupervisedConfig
from bgrpo_nb.recipes.train import TrainConfig

wandb = pytest.importorskip("wandb")
BIN = Path(sys.executable).parent
FLAGS = dict(problems="p.txt", prompts_per_step=3, num_generations=4, max_steps=2, held_out=6, eval_steps=1,
             save_steps=2, num_beams=4, wide_beams=4, num_samples=2, max_completion_length=6, use_cpu="true",
             learning_rate=1e-3)


@pytest.fixture
def policy(tmp_path):
    write_problems(tmp_path / "p.txt", generate_problems(12, 2, 2, seed=50))
    model = new_model("tiny", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    return save_model(model, load_tokenizer("single"), tmp_path / "policy")


def train(policy, *words, **environment):
    "`bgrpo train` of a user who has set up nothing, with an empty home folder"
    plain = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    home = dict(HOME=str(policy.parent), OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "bgrpo_nb", "train", "--model", policy, *override([f"--{k}={v}" for k, v in FLAGS.items()], list(words))]
    done = subprocess.run(command, cwd=policy.parent, env=plain | home | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def read_back(folder):
    "Configuration, history, files and the whole text of the one offline run in a folder"
    log, = Path(folder).glob("wandb/offline-run-*/run-*.wandb")
    command = [BIN / "wandb", "leet", "inspect", "--json", log]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    config, history = {}, []
    for record in map(json.loads, text.splitlines()):
        config |= record.get("run", {}).get("config", {}).get("update", {})
        config |= record.get("config", {}).get("update", {})
        if "history" in record: history.append(record["history"]["item"])
    media = log.parent / "files/media"
    files = [str(path.relative_to(media)) for path in media.rglob("*") if path.is_file()]
    return config, history, files, text


def test_offline_by_default_and_all_is_there(policy):
    done = train(policy, "--output_dir=run")
    config, history, files, text = read_back(policy.parent / "run")
    assert config["learning_rate"] == 1e-3 and config["objective"] == "paper" and config["num_generations"] == 4
    assert config["baseline"] == "mean"        # a start that solves little
    rows = [json.loads(line) for line in (policy.parent / "run/metrics.jsonl").read_text().splitlines()]
    scores = {r["step"]: r["eval_beam_rank_score"] for r in rows if "eval_beam_rank_score" in r}
    logged = {int(h["train/global_step"]): h["eval/beam_rank_score"] for h in history if "eval/beam_rank_score" in h}
    assert len(scores) == 3 and logged == scores
    assert [h["train/loss"] for h in history if "train/loss" in h] == [r["loss"] for r in rows if "loss" in r]
    counts = [h["eval/rank_histogram.values"] for h in history if "eval/rank_histogram.values" in h]
    assert len(counts) == 3 and all(sum(c) == 6 for c in counts)
    assert sum(f.startswith("images/plots/history") for f in files) == 3
    tables = (policy.parent / "run").glob("wandb/offline-run-*/files/media/table/completions*")
    table = json.loads(next(tables).read_text())
    assert {"prompt", "completion", "reason", "beam_rank", "rank_reward"} <= set(table["columns"])
    assert len(table["data"]) == 12
    assert {row[table["columns"].index("beam_rank")] for row in table["data"]} == {0, 1, 2, 3}
    assert "best/beam_rank_score" in text and "wandb:" not in done.stdout


def test_one_flag_turns_it_off(policy):
    train(policy, "--output_dir=run", "--report_to=none", "--max_steps=1", "--held_out=0")
    assert not (policy.parent / "run/wandb").exists() and not (policy.parent / "wandb").exists()


def test_started_by_an_agent(policy):
    "The agent's choices are in the run's config, booleans as booleans, and on the command line, booleans as words"
    chosen = policy.parent / "config.yaml"
    chosen.write_text("wandb_version: 1\nlearning_rate:\n  value: 0.00002\n"
                      "use_beam:\n  value: false\nshare_prefixes:\n  value: false\n")
    train(policy, "--use_beam=False", "--learning_rate=2e-05", "--max_steps=1", "--held_out=0",
          WANDB_SWEEP_ID="s1", WANDB_RUN_ID="r1", WANDB_SWEEP_PARAM_PATH=str(chosen), WANDB_MODE="offline")
    folder = policy.parent / "runs/sweeps/s1/trials/r1"
    assert json.loads((folder / "result.json").read_text())["step"] == 1
    config, *_ = read_back(policy.parent)
    assert (config["rollout"], config["share_prefixes"], config["learning_rate"]) == ("sample", False, 2e-5)


def test_online_where_somebody_is_logged_in_and_offline_where_the_server_is_away(monkeypatch, tmp_path):
    asked = []
    def init(mode, **rest):
        asked.append((mode, rest["resume"]))
        if mode == "online" and away: raise wandb.errors.CommError("no route to host")
        return type("Run", (), {"id": "abc"})()
    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    away = False
    wandb_logging.start_wandb(tmp_path)
    assert asked == [("online", "allow")] and (tmp_path / "wandb_run.txt").read_text() == "abc\n"
    away = True
    with pytest.warns(UserWarning, match="logged offline"): wandb_logging.start_wandb(tmp_path)
    assert asked[1:] == [("online", "allow"), ("offline", None)]


@pytest.mark.parametrize("flags,environment,named", [
    ({}, {}, ("run", "bgrpo")), (dict(run_name="mine", project="ours"), {}, ("mine", "ours")),
    (dict(run_name="mine", project="ours"), dict(WANDB_NAME="its", WANDB_PROJECT="theirs"), ("its", "theirs"))])
def test_a_run_and_its_project_are_called_as_asked(flags, environment, named, monkeypatch, tmp_path):
    asked = []
    def init(name, project, **rest):
        asked.append((name, project))
        return type("Run", (), {"id": "abc"})()
    for name in ("WANDB_NAME", "WANDB_PROJECT"): monkeypatch.delenv(name, raising=False)
    for name, value in environment.items(): monkeypatch.setenv(name, value)
    monkeypatch.setattr(wandb, "init", init)
    (tmp_path / "run").mkdir()
    for config in (TrainConfig, SupervisedConfig):
        with wandb_logging.at_wandb(config(output_dir=str(tmp_path / "run"), use_cpu=True, report_to=["wandb"], **flags)): pass
    assert asked == [named] * 2
