"Validation in a run of `bgrpo train`: the best policy is saved, the start included; what was known before; one summary."
import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from bgrpo_nb.algebra.problems import polynomial_key
from bgrpo_nb.base.run_folder import read_metrics
from bgrpo_nb.policy.loading import known_to
from bgrpo_nb.recipes import train as recipe
from bgrpo_nb.recipes import validation
from bgrpo_nb.recipes.train import TrainConfig, choose_problems, train_bgrpo
from bgrpo_nb.recipes.validation import known_problems, sign_test_interval
from bgrpo_nb.solve.evaluation import ProblemResult, Report
from bgrpo_nb.study.run_readers import metrics_of, read_folder

RUN = dict(num_problems=24, held_out=8, prompts_per_step=4, num_generations=4, max_steps=6, eval_steps=2, save_steps=2,
           save_total_limit=None, max_completion_length=6, num_beams=4, num_samples=2, warmup_steps=0,
           learning_rate=1e-2, use_cpu=True, report_to="none", disable_tqdm=True)


pytestmark = pytest.mark.usefixtures("one_thread")


def run(policy, folder, **more):
    return train_bgrpo(TrainConfig(model=str(policy), output_dir=str(folder), **RUN | more))


def weights(folder):
    "As one tensor, in the order of the names"
    return torch.cat([x.flatten() for _, x in sorted(load_file(Path(folder) / "model.safetensors").items())])


@pytest.fixture
def made_up(monkeypatch):
    "An evaluation that is a function of the weights and of a salt; every completion has a reward of its own"
    def draw(model, salt, n):
        chance = random.Random(f"{salt} {sum(p.double().abs().sum().item() for p in model.parameters()):.9f}")
        return [chance.choice([1, 2, 3, None]) for _ in range(n)]

    def measure(model, tokenizer, problems, **settings):
        places = draw(model, made_up.salt, len(problems))
        rows = [ProblemResult(p.expanded, 6, 2, k == 1, k, k, int(k is not None), "ok")
                for p, k in zip(problems, places)]
        return Report(rows, dict(num_beams=4, wide_beams=4, num_samples=2))

    def reward_of(*settings):
        def by_content(prompts, completion_ids, **columns): return [len(set(ids)) / 8 for ids in completion_ids]
        return by_content
    monkeypatch.setattr(validation, "measure", measure)
    monkeypatch.setattr(recipe, "decomposition_reward", reward_of)
    made_up.salt = 0
    return made_up


def scores_of(folder):
    return {row["step"]: row["eval_beam_rank_score"] for row in read_metrics(Path(folder) / "metrics.jsonl")
            if "eval_beam_rank_score" in row}


def test_the_best_is_saved_whichever_step_it_has(policy, tmp_path, made_up):
    seen = set()
    for salt in range(12):
        made_up.salt, folder = salt, tmp_path / str(salt)
        result = run(policy, folder)
        scores = scores_of(folder)
        best = max(scores, key=scores.get)                                 # of equal ones the first
        assert list(scores) == [0, 2, 4, 6] and result["saved_step"] == best
        source = policy if best == 0 else folder / f"checkpoint-{best}"
        assert torch.equal(weights(folder / "policy"), weights(source))
        says = result["summary"][0]
        assert ("the policy is the start" in says) if best == 0 else (f"after step {best} of 6" in says)
        assert json.loads((folder / "result.json").read_text())["saved_step"] == best
        saved = Report.from_json(folder / "reports/held_out_end.json").metrics["beam_rank_score"]
        assert saved == scores[best]
        seen.add(0 if best == 0 else 6 if best == 6 else 3)
        if len(seen) == 3: return
    raise AssertionError(f"no salt for each case: {seen}")


def test_a_best_step_between_two_saves_is_saved_too(policy, tmp_path, made_up):
    for salt in range(20):
        made_up.salt, folder = salt, tmp_path / str(salt)
        result = run(policy, folder, save_steps=6)
        if result["saved_step"] in (2, 4): break
    assert torch.equal(weights(folder / "policy"), weights(folder / f"checkpoint-{result['saved_step']}"))


def test_the_last_step_takes_part_whatever_eval_steps_is(policy, tmp_path, made_up):
    run(policy, tmp_path / "run", max_steps=5, eval_steps=3, save_steps=3)
    assert list(scores_of(tmp_path / "run")) == [0, 3, 5]


@pytest.mark.parametrize("salt", range(3))
def test_a_resumed_run_finds_the_same_best(policy, tmp_path, made_up, salt):
    made_up.salt = salt
    whole = run(policy, tmp_path / "whole")
    run(policy, tmp_path / "parts", max_steps=4)
    rest = run(policy, tmp_path / "parts", resume=True)
    for key in ("saved_step", "summary", "change"): assert rest[key] == whole[key]
    assert torch.equal(weights(tmp_path / "whole/policy"), weights(tmp_path / "parts/policy"))
    assert rest["summary"][1:] or whole["saved_step"] == 0


def test_intervals_allow_for_the_choice(policy, tmp_path, made_up):
    "The best of three validations has lower low ends, on the problems that chose it, than the last by itself"
    for made_up.salt in range(12):
        best = run(policy, tmp_path / f"best{made_up.salt}")
        if best["saved_step"]: break
    assert best["saved_step"] and "the best of 3 by beam_rank_score; intervals" in best["summary"][0]
    last = run(policy, tmp_path / "last", load_best_model_at_end=False)
    for result, confidence in ((best, 1 - 0.05 / 3), (last, 0.95)):
        c = result["change"]["held_out"]["greedy_accuracy"]
        of_test = partial(sign_test_interval, c["better"], c["worse"], result["held_out"])
        assert (c["low"], c["high"]) == (of_test(confidence)[0], of_test(0.95)[1])


@pytest.mark.parametrize("metric, chosen_on", [("beam_rank_score", "held_out"), ("known_beam_rank_score", "known")])
def test_problems_that_chose_nothing_keep_their_intervals(metric, chosen_on):
    def report(places):
        rows = [ProblemResult(str(i), 6, 2, k == 1, k, k, 0, "ok") for i, k in enumerate(places)]
        return Report(rows, dict(num_beams=4, wide_beams=4, num_samples=2))
    validator = validation.Validator([], TrainConfig(**RUN | dict(metric_for_best_model=metric)))
    validator.start = dict.fromkeys(("held_out", "known"), report([2] * 20))
    found = validator.changes(dict.fromkeys(("held_out", "known"), report([1] * 8 + [3] * 2 + [2] * 10)), 4)
    for name, of_set in found.items():
        confidence = 1 - 0.05 / 4 if name == chosen_on else 0.95
        low, high = sign_test_interval(8, 0, 20, confidence)[0], sign_test_interval(8, 0, 20)[1]
        assert of_set["greedy_accuracy"][3:5] == (low, high)


def test_without_it_the_last_weights_are_saved_and_what_fell_is_said(policy, tmp_path, made_up):
    result = run(policy, tmp_path / "run", load_best_model_at_end=False)
    assert result["saved_step"] == 6 and len(result["summary"]) >= 1
    assert torch.equal(weights(tmp_path / "run/policy"), weights(tmp_path / "run/checkpoint-6"))
    before, after = (scores_of(tmp_path / "run")[step] for step in (0, 6))
    assert result["change"]["held_out"]["beam_rank_score"]["mean"] == pytest.approx(after - before)
    row = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if "eval_change" in row][-1]
    assert row["eval_change"]["beam_rank_score"]["mean"] == pytest.approx(after - before)
    assert metrics_of(row)["eval_beam_rank_score_change"] == pytest.approx(after - before)
    assert metrics_of({"eval/known_change.greedy_accuracy.mean": 0.5}) == {"eval_known_greedy_accuracy_change": 0.5}


@pytest.mark.parametrize("more,on", [
    (dict(), True), (dict(save_steps=None, eval_steps=3), True), (dict(held_out=0), False), (dict(save_steps=3), False), (dict(save_strategy="no"), False),
    (dict(eval_strategy="no", eval_on_start=False), False), (dict(metric_for_best_model=None), False),
    (dict(metric_for_best_model="kl_to_start"), False), (dict(load_best_model_at_end=False), False)], ids=str)
def test_it_is_on_where_it_is_possible(more, on):
    assert TrainConfig(**RUN | more).load_best_model_at_end is on


@pytest.mark.parametrize("more,says", [
    (dict(held_out=0), "held_out=0"), (dict(save_steps=3), "round multiple"), (dict(save_strategy="no"), "to match"),
    (dict(metric_for_best_model=None), "needs a metric_for_best_model"), (dict(save_total_limit=1), "use 2 or more"),
    (dict(metric_for_best_model="kl_to_start"), "would always be the start")], ids=str)
def test_asked_for_where_it_is_not_possible(more, says):
    with pytest.raises(ValueError, match=says): TrainConfig(**RUN | dict(load_best_model_at_end=True) | more)


def test_what_was_known_before_is_measured_and_passed_on(tmp_path, made_up):
    result = run("tiny", tmp_path / "run", known_problems=6, max_steps=2)
    row = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if "eval_known_change" in row][-1]
    assert {"eval_known_greedy_accuracy", "eval_known_beam_rank_score"} <= row.keys()
    if result["saved_step"]: assert any(line.startswith("known before, 6 problems") for line in result["summary"])
    assert known_to(tmp_path / "run/policy") == [dict(kind="univariate", degrees="2_2"),
                                                 dict(kind="univariate", degrees="3_2", variables=3)]
    plain = run("tiny", tmp_path / "plain", known_problems=0, max_steps=2)
    assert not any("eval_known_greedy_accuracy" in row for row in read_metrics(tmp_path / "plain/metrics.jsonl"))
    assert "known" not in plain["change"]


def test_known_problems_are_never_trained_on():
    train, held_out = choose_problems(TrainConfig(model="tiny", **RUN | dict(degrees="2_2", num_problems=400)))
    seeded = known_problems(known_to("tiny"), 60)
    taken = {polynomial_key(p.expanded) for p in seeded[:30]}
    found = known_problems(known_to("tiny"), 60, [*train, *held_out, *seeded[:30]])
    keys = {polynomial_key(p.expanded) for p in found}
    assert len(keys) == 60 and not keys & taken
    assert not keys & {polynomial_key(p.expanded) for p in [*train, *held_out]}


GOOD = dict(degrees="2_2", max_completion_length=30, known_problems=0)    # `tiny` was trained on these


def test_a_good_start_is_warned_before_its_first_step(tmp_path):
    with pytest.warns(UserWarning, match="the start solves .* greedily.*--baseline minimum_risk"):
        run("tiny", tmp_path / "good", **GOOD | dict(max_steps=1), baseline="mean")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the start solves")
        run("tiny", tmp_path / "careful", **GOOD | dict(max_steps=1), baseline="minimum_risk")
        run("tiny", tmp_path / "chosen", **GOOD | dict(max_steps=1))
        run("tiny", tmp_path / "weak", max_steps=1, known_problems=0)


def test_a_baseline_that_is_left_out_follows_from_the_start(tmp_path, capsys):
    plain = GOOD | dict(learning_rate=1e-4, load_best_model_at_end=False)
    chosen = run("tiny", tmp_path / "chosen", **plain | dict(disable_tqdm=False))
    named = run("tiny", tmp_path / "named", **plain, baseline="minimum_risk")
    assert chosen["chosen"] == dict(baseline="minimum_risk") and named["chosen"] == {}
    assert read_folder(tmp_path / "chosen").parameters["baseline"] == "minimum_risk"     # as the analysis sees it
    assert torch.equal(weights(tmp_path / "chosen/policy"), weights(tmp_path / "named/policy"))
    assert "baseline=minimum_risk, since the start solves" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "chosen/config.yaml").read_text())["baseline"] is None     # as it was asked for
    assert run("tiny", tmp_path / "weak", max_steps=1, known_problems=0)["chosen"] == dict(baseline="mean")
    for more in (dict(rollout="sample"), dict(objective="original"), dict(eval_on_start=False)):
        result = run("tiny", tmp_path / "-".join(more), **plain | dict(max_steps=1) | more)
        assert result["chosen"] == dict(baseline="mean")


def test_a_run_that_continues_has_the_baseline_that_was_chosen(tmp_path):
    plain = GOOD | dict(learning_rate=1e-4, load_best_model_at_end=False)
    run("tiny", tmp_path / "whole", **plain)
    run("tiny", tmp_path / "parts", **plain | dict(max_steps=2))
    shutil.rmtree(tmp_path / "parts/reports")    # lost, and yet the choice stays
    again = run("tiny", tmp_path / "parts", **plain, resume=True)
    assert again["chosen"] == dict(baseline="minimum_risk")
    assert torch.equal(weights(tmp_path / "whole/policy"), weights(tmp_path / "parts/policy"))
    with pytest.raises(ValueError, match="baseline"):
        run("tiny", tmp_path / "parts", **plain | dict(max_steps=8), resume=True, baseline="mean")


@pytest.mark.parametrize("more,says", [
    (dict(known_problems=5), "needs to know what .* was trained on"),
    (dict(metric_for_best_model="known_greedy_accuracy"), "there are none")])
def test_a_policy_that_does_not_say_what_it_knows(policy, tmp_path, more, says):
    with pytest.raises(ValueError, match=says): run(policy, tmp_path / "run", **more)
    assert not (tmp_path / "run").exists()


def test_two_processes_agree_on_the_best(policy, tmp_path):
    flags = RUN | dict(model=policy, output_dir=tmp_path / "run", max_steps=2, save_total_limit=2, use_cpu="true",
                       disable_tqdm="true")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "-m", "bgrpo_nb", "train", *(f"--{k}={v}" for k, v in flags.items())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=tmp_path,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("the policy is the start") == 1       # a policy that solves nothing gains nothing
    assert torch.equal(weights(tmp_path / "run/policy"), weights(policy))
