"Every file in configs/train: its first lines make its problems, and it trains on them, as BGRPO and as GRPO; in small."
import json
import re
from pathlib import Path

import pytest
import yaml

from bgrpo_nb.algebra.problems import degree, generate_problems, polynomial_key, read_problems, write_problems
from bgrpo_nb.base.run_folder import read_metrics
from bgrpo_nb.cli import Fault, main, read_config
from bgrpo_nb.recipes.train import TrainConfig, choose_problems, train_bgrpo

CONFIGS = sorted((Path(__file__).parent.parent / "configs/train").glob("*.yaml"))
SMALL = """--prompts_per_step 2 --num_generations 4 --eval_steps 1 --save_steps 1 --num_beams 4 --wide_beams 6 --num_samples 2
    --known_problems 4 --max_steps 2 --warmup_steps 0 --disable_tqdm true""".split()
GROUPS = dict(prompts_per_step=4, num_generations=4, use_cpu=True)


def first_lines(path):
    "The commands in a config's first lines"
    prefix = "#   bgrpo "
    return [line.removeprefix(prefix).strip() for line in path.read_text().splitlines() if line.startswith(prefix)]


def smaller(line):
    "The same command for fewer and easier problems"
    line = line.replace("_4_4.txt", ".txt")
    line = re.sub(r"--n \d+", "--n 45", line)
    line = re.sub("[34]_[24]", "3_2", line)
    line = re.sub(r"(?<=--degrees )\S+", lambda found: ",".join(dict.fromkeys(found[0].split(","))), line) # each once
    return re.sub(r"--num_beams \d+", "", line)


def keys(problems): return {polynomial_key(p.expanded) for p in problems}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_trains_in_both_rollouts(path, here, capsys):
    given, lines = yaml.safe_load(path.read_text()), first_lines(path)
    for name in ("problems", "eval_problems"):
        assert given.get(name, "") in " ".join(lines), f"its first lines do not make {given[name]}"
    for line in lines: assert main(smaller(line).split()) == 0, line
    small = [*SMALL, *"--eval_problems test.txt --eval_limit 4".split()] if "eval_problems" in given else [*SMALL, "--held_out", "4"]
    if "problems" not in given or "hard_fraction" in given: small += ["--num_problems", "45"]
    changed = {flag.removeprefix("--") for flag in small} | {"beam_width", "output_dir"}
    for rollout in ("beam", "sample"):
        flags = ["--config", str(path), *small, "--rollout", rollout, "--output_dir", rollout]
        assert main(["train", *flags]) == 0, capsys.readouterr().err
        written = yaml.safe_load((here / rollout / "config.yaml").read_text())
        assert {name: written[name] for name in given if name not in changed} == \
            {name: value for name, value in given.items() if name not in changed}
        rows = read_metrics(here / rollout / "metrics.jsonl")
        assert [r["step"] for r in rows if "eval_beam_rank_score" in r] == [0, 1, 2]
        assert sum("loss" in r for r in rows) == 2
        assert json.loads((here / rollout / "result.json").read_text())["step"] == 2
        assert (here / rollout / "policy/config.json").exists()


def test_every_original_experiment_has_a_config():
    "And each has settings within the authors' ranges; `nine_degrees` is an experiment of ours"
    assert {p.stem for p in CONFIGS} >= {"basic_validation", "hard_validation", "beam_rank_score", "hard_only",
                                         "hard_mixed", "original"}
    for path in CONFIGS:
        if path.stem == "nine_degrees": continue
        flags = ["--config", str(path), "--use_cpu", "true"]
        c = read_config(TrainConfig, flags, "bgrpo train")
        assert 1e-5 <= c.learning_rate <= 2e-4 and c.num_beams == 10, path
        assert 8 <= c.prompts_per_step <= 48 and 10 <= c.num_generations <= 25, path
        if c.objective == "original":
            assert (c.scale_rewards, c.num_iterations, c.beta, c.max_grad_norm) == ("group", 5, 0.01, 0.5)
            continue
        assert c.scale_rewards == "none"
        original = read_config(TrainConfig, [*flags, "--objective", "original"], "bgrpo train")
        assert original.scale_rewards == "group" and original.num_iterations == 5 and 0.01 <= original.beta <= 0.05


@pytest.mark.parametrize("share,own", [(0.5, False), (0.25, True)])
def test_hard_and_regular_problems_are_mixed(share, own, here):
    hard = generate_problems(60, 3, 2, seed=3)
    write_problems(here / "hard.txt", hard)
    write_problems(here / "regular.txt", generate_problems(90, 2, 2, seed=4))
    regular = dict(regular_problems="regular.txt") if own else dict(degrees="2_2,2_3", num_problems=50)
    config = TrainConfig(problems="hard.txt", hard_fraction=share, held_out=20, **regular, **GROUPS)
    train, held_out = choose_problems(config)
    assert len(held_out) == 20 and not keys(train) & keys(held_out)
    found = {p.expanded for p in train + held_out}
    degrees = [degree(p.expanded) for p in train + held_out]
    assert degrees.count(6) + degrees.count(4) == len(degrees) == (120 if own else 100)
    known = {p.expanded for p in hard}
    assert len(found & known) == (30 if own else 50)
    if own: assert found <= known | {p.expanded for p in read_problems("regular.txt")}


def test_problems_of_several_degrees_are_made(here):
    train, held_out = choose_problems(TrainConfig(degrees="2_2,2_3,3_3", num_problems=90, held_out=0, **GROUPS))
    assert [degree(p.expanded) for p in train].count(9) == 30 and len(train) == 90 and not held_out
    train, _ = choose_problems(TrainConfig(degrees="2_2,2_3,3_3", num_problems=5, held_out=0, **GROUPS))
    assert sorted(degree(p.expanded) for p in train) == [4, 4, 6, 6, 9]


@pytest.mark.parametrize("wrong,says", [
    (dict(hard_fraction=0.5), "name a file"), (dict(degrees="2_2,3"), "3"), (dict(degrees="2_2,1_3"), "2 or more")])
def test_a_wrong_choice_of_problems(wrong, says):
    with pytest.raises(ValueError, match=says): TrainConfig(use_cpu=True, **wrong)


@pytest.mark.parametrize("words,says", [
    ("--problems p.txt --regular_problems nowhere.txt", "regular_problems=nowhere.txt is not mixed in"),
    ("--eval_limit 4", "eval_limit=4 is of eval_problems"), ("--eval_problems e.txt --eval_limit 0", "eval_limit=0 is out of range"),
    ("--eval_problems e.txt --held_out 4", "held_out=4 keeps problems back"),
    ("--held_out 0 --known_problems 4", "known_problems=4 are measured with the held-out ones"),
    ("--problems p.txt --kind multivariate", "kind=multivariate is of generated problems"),
    ("--problems p.txt --degrees 2_2", "degrees=2_2 is of generated problems"),
    ("--problems p.txt --num_problems 9", "num_problems=9 is of generated problems"),
    ("--problems p.txt --regular_problems r.txt --hard_fraction 0.5 --num_problems 9", "num_problems=9 is of generated problems"),
    ("--variables 4", "variables=4 is of multivariate problems")])
def test_a_setting_that_would_not_be_read(words, says):
    with pytest.raises((ValueError, Fault), match=says) as error: read_config(TrainConfig, [*words.split(), "--use_cpu", "true"], "bgrpo train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", [
    "--problems p.txt --kind univariate --degrees 3_2 --num_problems 2000 --variables 3", "--eval_problems e.txt --eval_limit 4 --held_out 0",
    "--problems p.txt --hard_fraction 0.5 --degrees 2_2 --num_problems 9", "--kind multivariate --variables 4", "--held_out 0 --known_problems 0"])
def test_a_setting_with_its_default_value_is_read(words):
    read_config(TrainConfig, [*words.split(), "--use_cpu", "true"], "bgrpo train")


@pytest.mark.parametrize("held_out", [12, 500])
def test_held_out_problems_that_cannot_be_had(held_out, here):
    "A number that was given is refused; the default is a tenth, here none"
    write_problems(here / "p.txt", generate_problems(9, 2, 2) + generate_problems(1, 2, 2, seed=9) * 3)
    with pytest.raises(ValueError, match=f"held_out={held_out} is too many of 12 problems with 10 different.*lower --held_out"):
        choose_problems(TrainConfig(problems="p.txt", held_out=held_out, **GROUPS))
    write_problems(here / "same.txt", generate_problems(1, 2, 2) * 12)
    with pytest.raises(ValueError, match="with 1 different"): choose_problems(TrainConfig(problems="same.txt", held_out=3, **GROUPS))
    train, kept = choose_problems(TrainConfig(problems="p.txt", **GROUPS))
    assert len(train) + len(kept) == 12
    write_problems(here / "p.txt", generate_problems(9, 2, 2))
    assert [len(found) for found in choose_problems(TrainConfig(problems="p.txt", **GROUPS))] == [9, 0]


def test_the_best_is_not_asked_for_where_nothing_is_validated(here, policy):
    flags = dict(model=str(policy), max_steps=1, report_to="none", max_completion_length=4, disable_tqdm=True, **GROUPS)
    write_problems(here / "p.txt", generate_problems(9, 2, 2))
    with pytest.raises(ValueError, match="of 9 none is held out; give --held_out"):
        train_bgrpo(TrainConfig(problems="p.txt", load_best_model_at_end=True, **flags))
    with pytest.raises(ValueError, match="of 9 none is held out"):
        train_bgrpo(TrainConfig(load_best_model_at_end=True, **flags), generate_problems(9, 2, 2))
    assert train_bgrpo(TrainConfig(problems="p.txt", **flags))["held_out"] == 0


def test_problems_that_are_all_held_out(here):
    write_problems(here / "p.txt", generate_problems(9, 2, 2))
    with pytest.raises(ValueError, match=r"0 problems to train on \(9 more are in eval_problems, too\) .* give other problems"):
        choose_problems(TrainConfig(problems="p.txt", eval_problems="p.txt", **GROUPS))
