"BGRPOTrainer on small models: ranks, advantages, log-probabilities, several processes, validation, signals."
import base64
import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import transformers
from datasets import Dataset
from transformers import MistralConfig, MistralForCausalLM
from trl import GRPOConfig

from bgrpo_nb.study.analysis import read_runs
from bgrpo_nb.cli import main
from bgrpo_nb.algebra.problems import generate_problems, write_problems
from bgrpo_nb.solve.evaluation import METRICS
from bgrpo_nb.policy.model import load_model, load_tokenizer, new_model, save_model
from bgrpo_nb.base.processes import hand_back_memory
from bgrpo_nb.learn.rewards import VerifiedReward, advantages_of
from bgrpo_nb.solve.decomposition_reward import decomposition_reward
from bgrpo_nb.base.run_folder import read_metrics
from bgrpo_nb.learn.arguments import check_checkpointing
from bgrpo_nb.learn.config import BGRPOConfig
from bgrpo_nb.learn import gradients
from bgrpo_nb.learn.trainer import BGRPOTrainer
from bgrpo_nb.recipes.train import TrainConfig, choose_problems, train_bgrpo
from bgrpo_nb.recipes.validation import Validator

TESTS = Path(__file__).parent
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}


POSITIONS = "rotary", "learned" # with learned ones (GPT-2) left padding matters


def untrained(position, folder): # which is returned
    return save_model(new_model("tiny", position=position, initializer_range=0.5, **SMALL), load_tokenizer("single"), folder)


@pytest.fixture(scope="module", params=POSITIONS)
def saved(request, tmp_path_factory):
    "A policy with random weights in a folder"
    return untrained(request.param, tmp_path_factory.mktemp("policy"))


def prompts():
    return Dataset.from_dict({"prompt": [p.prompt for p in generate_problems(4, 2, 2, seed=5) + generate_problems(4, 3, 2, seed=5)]})


def settings(folder, **more):
    return BGRPOConfig(output_dir=str(folder), **dict(num_generations=4, prompts_per_step=4, max_steps=2, max_completion_length=8, use_cpu=True, disable_tqdm=True,
                                                      save_strategy="no", seed=1, warmup_steps=0) | more)


def by_length(seen):
    "A reward that differs within every group and keeps what it was given"
    def reward(prompts, completion_ids, beam_rank, beam_score, **kwargs):
        rewards = [len(ids) / 8 - 0.1 * r for ids, r in zip(completion_ids, beam_rank)]
        seen.append(dict(prompts=prompts, ids=completion_ids, ranks=beam_rank, scores=beam_score, rewards=rewards))
        return rewards
    return reward


def by_sum(seen):
    "Right or wrong, in no order of rank"
    def reward(prompts, completion_ids, beam_rank, beam_score, **kwargs):
        rewards = [1 - 0.01 * r if sum(ids) % 3 == 0 else -0.1 for ids, r in zip(completion_ids, beam_rank)]
        seen.append(dict(rewards=rewards, scores=beam_score))
        return rewards
    return reward


def batches_of(trainer):
    "The batches of a training, ready for the loss"
    found, inner = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda x: (found.append(inner(x)), found[-1])[1]
    trainer.train()
    return found


@pytest.mark.parametrize("share", [True, False], ids=["trie", "full rows"])
def test_ranks_advantages_and_log_probabilities(saved, tmp_path, share):
    "Two steps on prompts of mixed length"
    seen, batches = [], []
    trainer = BGRPOTrainer(str(saved), by_length(seen), settings(tmp_path, share_prefixes=share), prompts())
    compute = trainer._compute_loss

    def keep(model, inputs):
        rows = [torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask")]
        logps, _, _ = trainer._get_per_token_logps_and_entropies(model, *rows, inputs["completion_ids"].shape[1])
        batches.append((inputs, (logps.detach() * inputs["completion_mask"]).sum(1)))
        return compute(model, inputs)

    trainer._compute_loss = keep
    trainer.train()
    assert len(seen) == len(batches) == 2
    for step, (inputs, sums) in zip(seen, batches):
        assert len({len(p) for p in step["prompts"]}) > 1
        assert step["ranks"] == [0, 1, 2, 3] * 4
        assert all(step["scores"][i] >= step["scores"][i + 1] for i in range(16) if i % 4 < 3)
        expected = dict(zip(((p, tuple(ids)) for p, ids in zip(step["prompts"], step["ids"])), zip(advantages_of(step["rewards"], 4), step["scores"])))
        assert len(expected) == 16
        for ids, on, p_ids, p_on, advantage, total in zip(*(inputs[k] for k in ("completion_ids", "completion_mask", "prompt_ids", "prompt_mask", "advantages")), sums):
            prompt = " ".join(trainer.processing_class.convert_ids_to_tokens(p_ids[p_on.bool()].tolist()))
            wanted, score = expected[prompt, tuple(ids[on.bool()].tolist())]
            assert abs(advantage.item() - wanted) < 1e-5 and abs(total.item() - score) < 1e-4


@pytest.mark.parametrize("broken,says", [
    (dict(objective="papers"), "objective 'papers' is not known; use one of paper, original"),
    (dict(rollout="beams"), "beam, sample, mixed"), (dict(reward="ranks"), "rank, simple, reverse_rank"),
    (dict(baseline="median"), "use one of mean, leave_one_out"),
    (dict(baseline="right_only", objective="original"), "use scale_rewards='none'"),
    (dict(num_generations=1), "2 or more"), (dict(prompts_per_step=0), "1 or more"), (dict(use_vllm=True), "use_vllm"),
    (dict(temperature=0.7), "no meaning for beams"), (dict(disable_dropout=False), "leave it on"),
    (dict(distinct_bonus=-0.5), "0 or more"), (dict(mask_truncated_completions=True), "truncated beams"),
    (dict(save_total_limit=1, metric_for_best_model="beam_accuracy"), "best checkpoint and the last"),
    (dict(prompts_per_step=3, gradient_accumulation_steps=5), "equal parts"),
    (dict(per_device_train_batch_size=6, num_generations=4), "whole number of groups")])
def test_a_setting_that_cannot_work_is_refused_with_a_way_to_fix_it(broken, says):
    with pytest.raises(ValueError, match=says): BGRPOConfig(use_cpu=True, **broken)


def test_defaults_come_from_the_objective_and_the_machine():
    config = BGRPOConfig(use_cpu=True)
    assert (config.scale_rewards, config.loss_type, config.beta, config.num_iterations) == ("none", "grpo", 0.0, 1)
    assert config.bf16 is False and config.per_device_train_batch_size == 48 * 16
    original = BGRPOConfig(objective="original", num_iterations=2, use_cpu=True)
    assert (original.scale_rewards, original.beta, original.num_iterations) == ("group", 0.01, 2)
    for metric, better in (("eval_oracle_accuracy", True), ("kl_to_start", False)):
        assert BGRPOConfig(use_cpu=True, metric_for_best_model=metric).greater_is_better is better


def a_batch_and_its_loss(tmp_path):
    "A trainer after a step that moved nothing, its loss, and the inputs of that step"
    batches = []
    trainer = BGRPOTrainer("tiny", by_length([]), settings(tmp_path, max_steps=1, learning_rate=0.0), prompts())
    compute = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: (batches.append(inputs), compute(model, inputs))[1]
    trainer.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer, compute, batches[0]


def test_the_trie_and_full_rows_give_one_loss_and_one_gradient(tmp_path):
    """Trained weights, an old policy that differs, every element of the gradient. Each form is about 3e-5 of the
    gradient's norm away from a computation in float64, so that is how closely they can agree"""
    trainer, compute, inputs = a_batch_and_its_loss(tmp_path)
    torch.manual_seed(0)
    inputs["old_per_token_logps"] = torch.randn_like(inputs["completion_ids"], dtype=torch.float32) * 0.1 - 1

    def loss_and_gradient(share):
        trainer.args.share_prefixes = share
        trainer.model.train()
        trainer.model.zero_grad()
        loss = compute(trainer.model, inputs)
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])

    (loss, gradient), (other_loss, other) = loss_and_gradient(True), loss_and_gradient(False)
    assert abs(loss - other_loss) < 1e-5 and (gradient - other).norm() < 1e-4 * other.norm()


@pytest.mark.parametrize("kind", ["rows", "tokens"])
def test_groups_without_an_advantage_cost_no_gradient_and_change_nothing(tmp_path, kind, monkeypatch):
    "Two of four groups teach; loss, gradient and entropy are those of one forward of all rows"
    forwards, (trainer, compute, inputs) = [], a_batch_and_its_loss(tmp_path)
    off = torch.arange(16) % 8 < 4
    if kind == "tokens": inputs["advantages"] = inputs["advantages"][:, None] * inputs["completion_mask"]
    inputs["advantages"] = inputs["advantages"].clone()
    inputs["advantages"][off] = 0
    inner = gradients.trie_logps
    monkeypatch.setattr(gradients, "trie_logps", lambda model, ids, *more: (
        forwards.append((len(ids), torch.is_grad_enabled())), inner(model, ids, *more))[1])

    def measured():
        trainer.model.train()
        trainer.model.zero_grad()
        trainer._metrics["train"].clear()
        forwards.clear()
        loss = compute(trainer.model, inputs)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
        return loss.item(), gradient, trainer._metrics["train"]["entropy"], list(forwards)

    loss, gradient, entropy, split = measured()
    monkeypatch.setattr(trainer, "_rows_that_teach", lambda inputs: None)
    other_loss, other, other_entropy, whole = measured()
    assert split == [(8, False), (8, True)] and whole == [(16, True)]
    assert abs(loss - other_loss) < 1e-5 and (gradient - other).norm() < 1e-4 * other.norm() and other.norm() > 0
    assert entropy == pytest.approx(other_entropy, abs=1e-5)


@pytest.mark.parametrize("more,advantages", [
    (dict(beta=0.1), [0.0, 1.0]), (dict(share_prefixes=False), [0.0, 1.0]), ({}, [1.0, 1.0]), ({}, [0.0, 0.0])])
def test_all_rows_have_gradients_where_all_may_be_moved(saved, tmp_path, more, advantages):
    "A KL term moves every row; a batch in which nothing teaches still needs a gradient"
    trainer = BGRPOTrainer(str(saved), by_length([]), settings(tmp_path, **more), prompts())
    inputs = dict(prompt_ids=torch.tensor([[5], [6]]), prompt_mask=torch.ones(2, 1, dtype=torch.long),
                  advantages=torch.tensor(advantages))
    assert trainer._rows_that_teach(inputs) is None
    if not more: assert trainer._rows_that_teach(inputs | dict(advantages=torch.tensor([0.0, 2.0]))).tolist() == [False, True]


def run_processes(folder, processes, jobs): # name -> (policy, settings)
    "Two steps of each job, 12 rows a step; all jobs in one launch, because libraries take longer to load: name -> steps and weights"
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    folders = {name: folder / f"{processes}-{i}" for i, name in enumerate(jobs)}
    for path in folders.values(): path.mkdir()
    (folder / "jobs.json").write_text(json.dumps([dict(folder=str(folders[name]), policy=str(policy), rows=12 // processes, **more) for name, (policy, more) in jobs.items()]))
    done = subprocess.run([sys.executable, *launch, str(TESTS / "two_processes.py"), str(folder / "jobs.json")], capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: what_was_seen(path, processes) for name, path in folders.items()}


def what_was_seen(folder, processes):
    parts = [json.loads((folder / f"seen_{i}.json").read_text()) for i in range(processes)]
    steps = [{k: sum((p["seen"][s][k] for p in parts), []) for k in ("ids", "ranks", "scores", "rewards")} |
             dict(advantages=sum((p["advantages"][s] for p in parts), []), logged=parts[0]["logged"][s]) for s in range(2)]
    return steps, torch.load(folder / "state.pt")


def assert_equal_runs(one, two):
    for a, b in zip(one[0], two[0]):
        assert a["ids"] == b["ids"] and a["ranks"] == b["ranks"]
        for k in ("scores", "rewards", "advantages"): torch.testing.assert_close(torch.tensor(a[k]), torch.tensor(b[k]), atol=1e-4, rtol=0)
        assert a["logged"] == pytest.approx(b["logged"], abs=1e-4)
    assert one[1].keys() == two[1].keys()
    for k in one[1]: torch.testing.assert_close(one[1][k], two[1][k], atol=2e-5, rtol=1e-4)


WAYS = {"trie": dict(share_prefixes=True, baseline="leave_one_out", distinct_bonus=0.5), "full rows": dict(share_prefixes=False)}


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    "Every policy trained in every way, by one process and by two"
    folder = tmp_path_factory.mktemp("processes")
    jobs = {(position, way): (untrained(position, folder / position), more) for position in POSITIONS for way, more in WAYS.items()}
    return [run_processes(folder, processes, jobs) for processes in (1, 2)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("position", POSITIONS)
def test_two_processes_equal_one_also_where_a_group_spans_them(one_and_two, position, way):
    "Groups of 4 in slices of 6 rows: the second group lies on both processes"
    one, two = (found[position, way] for found in one_and_two)
    assert one[0][0]["ranks"] == [0, 1, 2, 3] * 3
    assert_equal_runs(one, two)


def test_a_sharded_model_searches_and_learns_as_a_whole_one(tmp_path):
    """Each process runs every search, because a forward on one waits for the other: beams, samples, log-probabilities and
    gradients"""
    policy = save_model(new_model("tiny", initializer_range=0.5, **SMALL), load_tokenizer("single"), tmp_path / "policy")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(TESTS / "sharded.py"), str(policy)], capture_output=True, text=True,
                          env=ONE_THREAD, timeout=900)
    assert done.returncode == 0 and done.stdout.count("equal") == 2, done.stderr[-3000:]


def test_the_config_for_two_nodes_is_accelerates_own():
    from accelerate.commands.config.config_args import load_config_from_file
    config = load_config_from_file(str(TESTS.parent / "configs/accelerate/two_nodes.yaml"))
    assert (config.distributed_type, config.num_machines, config.num_processes) == ("MULTI_GPU", 2, 16)


def test_dropout_is_off_while_beams_are_searched(tmp_path):
    model = new_model("tiny", position="learned", **SMALL)
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout): part.p = 0.5
    trainer = BGRPOTrainer(model, by_length([]), settings(tmp_path), prompts(), processing_class=load_tokenizer("single"))
    trainer.model.train()
    a, b = (trainer._roll_out([prompts()[0]["prompt"]] * 4, trainer) for _ in range(2))
    assert a["completion_ids"] == b["completion_ids"] and a["beam_score"] == b["beam_score"] and trainer.model.training


def test_a_reference_policy_is_forwarded_over_the_trie_too(saved, tmp_path):
    trainer = BGRPOTrainer(str(saved), by_length([]), settings(tmp_path, objective="original", num_iterations=2, learning_rate=1e-3), prompts())
    trainer.train()
    kl = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert len(kl) == 2 and abs(kl[0]) < 1e-6 < kl[1]
    assert (trainer.args.scale_rewards, trainer.args.loss_type) == ("group", "bnpo")


@pytest.mark.parametrize("every, times", [(None, 0), (2, 1), (1, 2)])
def test_freed_memory_goes_back_before_each_forward_where_it_is_asked_for(tmp_path, monkeypatch, every, times):
    handed_back = []
    monkeypatch.setattr("bgrpo_nb.learn.gradients.hand_back_memory", lambda: handed_back.append(1))
    model = new_model("tiny", **SMALL)
    BGRPOTrainer(model, by_length([]), settings(tmp_path, torch_empty_cache_steps=every), prompts(), processing_class=load_tokenizer("single")).train()
    assert len(handed_back) == times                           # two steps of one forward each


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_memory_handed_back_leaves_the_process():
    def held(): return psutil.Process().memory_info().rss / 2**20
    pieces = [torch.ones(2**14) for _ in range(4096)]           # 64 KiB each: below the size that glibc maps on its own
    full, last = held(), pieces[-1]                             # the last one keeps the heap from shrinking
    del pieces
    freed = held()
    hand_back_memory()
    assert full - freed < 64 and full - held() > 192 and last.sum() == 2**14


def test_balanced_groups_sum_to_zero(saved, tmp_path):
    got = []
    def reward(prompts, beam_rank, **kwargs): return [1.0 if r == 2 else -0.1 for r in beam_rank]
    trainer = BGRPOTrainer(str(saved), reward, settings(tmp_path, balance_rewards=True, max_steps=1), prompts())
    inner = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda x: (got.append(inner(x)), got[-1])[1]
    trainer.train()
    torch.testing.assert_close(got[0]["advantages"].view(-1, 4), torch.tensor([[-1 / 3, -1 / 3, 1.0, -1 / 3]]).expand(4, 4))


def test_a_family_without_a_tree_trains_in_full_rows_with_one_warning(tmp_path):
    config = MistralConfig(vocab_size=31, pad_token_id=0, eos_token_id=9, bos_token_id=None, num_key_value_heads=2, sliding_window=16, max_position_embeddings=256, **SMALL)
    trainer = BGRPOTrainer(MistralForCausalLM(config), by_length([]), settings(tmp_path), prompts(), processing_class=load_tokenizer("single"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert sum("forwarded in full" in str(w.message) for w in caught) == 1
    assert sum("without a beam tree" in str(w.message) for w in caught) == 1
    assert trainer.state.global_step == 2


def test_a_completion_that_never_ended_earns_nothing():
    tokenizer = load_tokenizer("single")
    pay = decomposition_reward(tokenizer)
    right = tokenizer.convert_tokens_to_ids("^ a P 2".split())
    prompt = "+ P 1 + * P 2 ^ a P 2 ^ a P 4 ⁇"
    assert pay([prompt] * 2, [right + [tokenizer.eos_token_id], right], beam_rank=[0, 0]) == [1.0, -0.1]
    assert tokenizer.decode(right + [tokenizer.eos_token_id], skip_special_tokens=True) == tokenizer.decode(right)  # text alone cannot tell them apart


def miniature(folder, policy="tiny", **more):
    return TrainConfig(output_dir=str(folder), model=str(policy), **dict(num_problems=60, held_out=8, prompts_per_step=6, num_generations=6, max_steps=6, eval_steps=2, save_steps=2,
                       num_samples=2, wide_beams=6, num_beams=6, disable_tqdm=True, use_cpu=True, report_to="none", seed=5) | more)


@pytest.mark.parametrize("rate,won", [(3e-3, False), (1e-5, None)], ids=["the start wins", "whichever wins"])
def test_the_best_policy_by_any_metric_and_the_last_checkpoint(tmp_path, rate, won):
    "The first rate destroys the policy, so that none is better than the start"
    metric = "wide_beam_accuracy"
    result = train_bgrpo(miniature(tmp_path / "run", degrees="2_2", metric_for_best_model=metric, load_best_model_at_end=True, learning_rate=rate, warmup_steps=0, save_total_limit=2))
    state = json.loads((tmp_path / "run/checkpoint-6/trainer_state.json").read_text())      # the last is there
    values = {row["step"]: row[f"eval_{metric}"] for row in read_metrics(tmp_path / "run/metrics.jsonl") if f"eval_{metric}" in row}
    first_best = max(values, key=values.get)                                                # of equal ones the first
    assert set(values) == {0, 2, 4, 6} and state["best_metric"] == values[first_best] and result["saved_step"] == first_best
    if won is False: assert first_best == 0 and values[6] < values[0]
    best = tmp_path / f"run/checkpoint-{first_best}" if first_best else "tiny"
    for a, b in zip(load_model(tmp_path / "run/policy").parameters(), load_model(best).parameters(), strict=True): assert torch.equal(a, b)
    written = json.loads((tmp_path / "run/result.json").read_text())
    everything = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if "eval_seconds" in row]
    assert written["best"].keys() == {*METRICS, "kl_to_start"} and written["best"] == result["best"]
    for name, b in written["best"].items():
        assert b["value"] == (min if name == "kl_to_start" else max)(row[f"eval_{name}"] for row in everything) and b["runtime"] > 0
        assert any(row["step"] == b["step"] and row[f"eval_{name}"] == b["value"] for row in everything)


def test_the_same_seed_gives_the_same_metrics(tmp_path):
    runs = [train_bgrpo(miniature(tmp_path / name, max_steps=2, rollout="mixed")) for name in ("a", "b")]
    rows = [[{k: v for k, v in row.items() if "time" not in k and "second" not in k} for row in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("a", "b")]
    assert rows[0] == rows[1] and len(rows[0]) == 5
    data = runs[0]["data"]
    config = miniature(tmp_path / "c")
    train, held_out = choose_problems(config)
    assert data == runs[1]["data"] and data["n"] == len(train) == 52 and data["held_out"]["n"] == len(held_out) == 8
    assert data["sha256"] == hashlib.sha256("\n".join(p.line for p in train).encode()).hexdigest() and "degrees=3_2" in data["name"]


def test_problems_of_several_degrees_are_measured_degree_by_degree_too(tmp_path):
    """Metrics of each degree, weighted by its number of problems, add up to the metrics of all, and the analysis reads
    them; with held-out problems of one degree nothing is logged by degree"""
    few = dict(num_beams=6, max_steps=1, eval_steps=1, save_strategy="no")
    result = train_bgrpo(miniature(tmp_path / "two", degrees="2_2,3_2", held_out=12, **few))
    counts = {d: len(r) for d, r in result["reports"][-1].by_degree().items()}
    assert sum(counts.values()) == 12 and counts.keys() == {"2∘2", "3∘2"}
    rows = [row for row in read_metrics(tmp_path / "two/metrics.jsonl") if "eval_seconds" in row]
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert row["eval_by_degree"].keys() == counts.keys() and all(part.keys() == set(METRICS) for part in row["eval_by_degree"].values())
        for m in METRICS: assert row[f"eval_{m}"] == pytest.approx(sum(n * row["eval_by_degree"][d][m] for d, n in counts.items()) / 12)
    assert rows[0]["eval_by_degree"]["2∘2"]["beam_accuracy"] > rows[0]["eval_by_degree"]["3∘2"]["beam_accuracy"]      # the bundled policy knows 2∘2 alone
    found = read_runs(tmp_path / "two").degrees("eval_beam_accuracy", arm=None)
    assert {(m, d) for m, d in zip(found.metric, found.degree)} == {(f"eval_{m}", d) for m in METRICS for d in counts}
    assert set(result["best"]) == {*METRICS, "kl_to_start"}
    train_bgrpo(miniature(tmp_path / "one", **few))
    assert not [row for row in read_metrics(tmp_path / "one/metrics.jsonl") if "eval_by_degree" in row]


def test_kl_to_start_is_that_of_the_two_policies(saved, tmp_path):
    "Against the exact divergence, token by token over the vocabulary, on the same completions"
    start, moved = load_model(saved, device="cpu"), load_model(saved, device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in moved.parameters(): p += 0.01 * torch.randn_like(p)
    config = miniature(tmp_path, saved, max_completion_length=10, eval_strategy="no", eval_on_start=False)
    problems = generate_problems(300, 2, 2, seed=9)
    validator = Validator(problems, config)
    trainer = BGRPOTrainer(start, by_length([]), config, prompts(), processing_class=load_tokenizer("single"))
    validator.remember(trainer)
    assert validator.kl_to_start(start) < 1e-9
    exact = []
    for (ids, mask, C), on, _ in validator.drawn:
        with torch.no_grad(): p, q = (m(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, -C - 1:-1].log_softmax(-1) for m in (start, moved))
        exact.append((p.exp() * (p - q)).sum(-1)[on])
    exact = torch.cat(exact).mean().item()
    assert exact > 1e-3 and validator.kl_to_start(moved) == pytest.approx(exact, rel=0.25)


def test_a_recorded_trajectory(saved, tmp_path):
    "Six steps on a random policy, as they were when this was recorded; a change here means that training has changed"
    name = "learned" if (saved / "config.json").read_text().count("GPT2") else "rotary"
    trainer = BGRPOTrainer(str(saved), by_length([]), settings(tmp_path, max_steps=6, learning_rate=1e-3, num_iterations=2), prompts())
    trainer.train()
    found = [[row.get(k, -1) for k in ("reward", "grad_norm", "entropy", "completions/mean_length")] for row in trainer.state.log_history if "loss" in row]
    recorded = json.loads((TESTS / "recorded_trajectory.json").read_text())[name]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(recorded), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_another_family_trains_by_beams(family, tmp_path):
    "Beams over shared prefixes, gradients over the trie: the same loss as full rows"
    config = getattr(transformers, f"{family}Config")(vocab_size=31, pad_token_id=0, eos_token_id=9, bos_token_id=None, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
                                                      initializer_range=0.5, **SMALL)
    ends = []
    for share in (True, False):
        torch.manual_seed(0)
        model, seen = transformers.AutoModelForCausalLM.from_config(config), []
        trainer = BGRPOTrainer(model, by_length(seen), settings(tmp_path, share_prefixes=share, per_device_train_batch_size=16, learning_rate=1e-3), prompts(),
                               processing_class=load_tokenizer("single"))
        trainer.train()
        assert [s["ranks"] for s in seen] == [[0, 1, 2, 3] * 4] * 2
        ends.append((seen[0]["ids"], [row["grad_norm"] for row in trainer.state.log_history if "loss" in row]))
    assert ends[0][0] == ends[1][0] and ends[0][1] == pytest.approx(ends[1][1], rel=1e-3)


@pytest.mark.parametrize("kind,degrees", [("multivariate", "2_2"), ("on_singlets", "2_2")])
def test_tasks_of_many_variables_by_the_same_commands(tmp_path, kind, degrees):
    more = dict(variables=2) if kind == "multivariate" else {}
    policy = save_model(new_model("tiny", vocabulary="multi", **SMALL), load_tokenizer("multi"), tmp_path / "policy")
    assert main(["train", *(f"--{k}={v}" for k, v in dict(model=policy, output_dir=tmp_path / "run", kind=kind, degrees=degrees, **more, coefficient_bound=5, num_problems=24, held_out=4,
                 prompts_per_step=4, num_generations=4, max_steps=1, num_beams=4, wide_beams=4, num_samples=2, max_completion_length=8, report_to="none", use_cpu="true").items())]) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["last"]["step"] == 1 and f"kind={kind}" in result["data"]["name"]
    assert main(["generate", str(tmp_path / "p.txt"), "--kind", kind, "--n", "5", "--coefficient_bound", "5"]) == 0
    assert main(["evaluate", "--model", str(tmp_path / "run/policy"), "--problems", str(tmp_path / "p.txt"), "--num_beams", "4", "--wide_beams", "4", "--num_samples", "2"]) == 0


def test_equal_answers_earn_the_bonus_once_and_equal_prompts_are_two_groups(saved, tmp_path):
    "Two groups with the same prompt: groups come from the trainer's group size, not from equal prompts"
    tokenizer = load_tokenizer("single")
    prompt = "+ P 1 + * P 2 ^ a P 2 ^ a P 4 ⁇"
    answers = ["^ a P 2", "* N 3 ^ a P 2", "a", "+ P 7 ^ a P 2"]
    algebra = decomposition_reward(tokenizer)
    trainer = BGRPOTrainer(str(saved), algebra, settings(tmp_path, reward="simple", distinct_bonus=0.5, max_steps=1),
                           Dataset.from_dict({"prompt": [prompt] * 4}))
    ids = [tokenizer.convert_tokens_to_ids(a.split()) + [tokenizer.eos_token_id] for a in answers] * 2
    trainer.model.train()
    rewards = trainer._calculate_rewards([{"beam_rank": k % 4} for k in range(8)], [prompt] * 8, answers * 2, ids)
    assert rewards[:, 0].tolist() == pytest.approx([1.5, 1.0, -0.1, 1.0] * 2)
    logged = {k: v[-1] for k, v in trainer._metrics["train"].items() if k.startswith("groups/")}
    assert logged == {"groups/none_valid": 0, "groups/all_valid": 0, "groups/distinct_valid": 1}


def test_the_reward_setting_is_obeyed_or_refused(saved, tmp_path):
    def rewards(pay, **more):
        trainer = BGRPOTrainer(str(saved), pay, settings(tmp_path, **more), prompts())
        return trainer.reward_funcs
    verified = VerifiedReward(lambda prompts, ids: [True] * len(ids))
    assert [f.reward for f in rewards(verified, reward="simple")] == ["simple"] and verified.reward is None
    assert [f.reward for f in rewards([verified, VerifiedReward(verified.verify, reward="rank")])] == ["rank", "rank"]
    with pytest.raises(ValueError, match="reaches no reward function"): rewards(by_length([]), reward="simple")
    with pytest.raises(ValueError, match="reaches no reward function"):
        rewards(VerifiedReward(verified.verify, reward="rank"), reward="simple")
    with pytest.raises(ValueError, match="reward_funcs is missing"): rewards(None)


def test_shares_of_groups_without_verdicts_go_by_rewards(saved, tmp_path):
    trainer = BGRPOTrainer(str(saved), lambda completion_ids, **k: [1.0 if i < 4 or i == 9 else -0.1 for i in range(len(completion_ids))], settings(tmp_path), prompts())
    trainer.model.train()
    trainer._calculate_rewards([{}] * 16, ["a"] * 16, [""] * 16, [[k] for k in (1, 1, 2, 3)] * 4)
    assert {k: v[-1] for k, v in trainer._metrics["train"].items() if k.startswith("groups/")} == {"groups/none_valid": 0.5, "groups/all_valid": 0.25, "groups/distinct_valid": (3 + 1) / 4}


@pytest.mark.parametrize("rollout", ["beam", "mixed"])
def test_advantages_against_the_others(saved, tmp_path, rollout):
    seen, batches = [], []
    trainer = BGRPOTrainer(str(saved), by_length(seen), settings(tmp_path, baseline="leave_one_out", rollout=rollout, max_steps=1, share_prefixes=False), prompts())
    inner = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda x: (batches.append(inner(x)), batches[-1])[1]
    trainer.train()
    rewards = torch.tensor(seen[0]["rewards"]).view(-1, 4)
    torch.testing.assert_close(batches[0]["advantages"].view(-1, 4), rewards - (rewards.sum(1, keepdim=True) - rewards) / 3)
    assert seen[0]["ranks"] == ([0, 1, 2, 3] if rollout == "beam" else [0, 1, 2, 2]) * 4


@pytest.mark.parametrize("baseline", ["right_only", "minimum_risk"])
@pytest.mark.parametrize("rollout", ["beam", "sample"])
def test_older_ways_to_learn_from_a_list(saved, tmp_path, baseline, rollout):
    "Advantages from rewards and scores, in the order of the rows; the scores are the policy's own log-probabilities"
    seen, batches = [], []
    trainer = BGRPOTrainer(str(saved), by_length(seen), settings(tmp_path, baseline=baseline, rollout=rollout, max_steps=1, share_prefixes=False), prompts())
    inner = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda x: (batches.append(inner(x)), batches[-1])[1]
    trainer.train()
    rewards = torch.tensor(seen[0]["rewards"]).view(-1, 4)
    batch, start = batches[0], load_model(saved)
    ids, mask = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1), torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad(): logits = start(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    logps = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0][:, -batch["completion_ids"].shape[1]:]
    q = (logps * batch["completion_mask"]).sum(1).view(-1, 4).softmax(1)
    expected = (rewards > 0).float() if baseline == "right_only" else 4 * q * (rewards - (q * rewards).sum(1, keepdim=True))
    torch.testing.assert_close(batch["advantages"].view(-1, 4), expected, atol=1e-4, rtol=1e-4)


def test_the_figure_is_replaced_in_a_notebook(tmp_path):
    "In a real kernel: two validations, one image, that of the second"
    nbformat = pytest.importorskip("nbformat")
    from nbclient import NotebookClient
    code = ("import sys\nfrom types import SimpleNamespace as N\nfrom bgrpo_nb.recipes.callbacks import PlotHistory\n"
            "def draw(rows, path):\n    import matplotlib.pyplot as plt\n    path.parent.mkdir(exist_ok=True); fig = plt.figure(figsize=(1 + len(rows), 1)); fig.savefig(path); plt.close(fig)\n"
            "p = PlotHistory('.', draw)\n"
            "for k in (1, 2):\n    open('metrics.jsonl', 'a').write('{}\\n')\n    p.on_evaluate(N(disable_tqdm=False), N(is_world_process_zero=True), None)\n")
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(nb, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    images = [o.data["image/png"] for o in nb.cells[0].outputs if "image/png" in o.get("data", {})]
    assert len(images) == 1 and base64.b64decode(images[0]) == (tmp_path / "plots/history.png").read_bytes()


def test_ctrl_c_saves_and_resume_goes_on(tmp_path):
    write_problems(tmp_path / "p.txt", generate_problems(80, 3, 2, seed=50))
    command = [sys.executable, "-m", "bgrpo_nb", "train", "--problems", "p.txt", "--output_dir", "run", "--prompts_per_step", "6", "--num_generations", "4",
               "--held_out", "0", "--save_steps", "1000000"]
    running = subprocess.Popen([*command, "--max_steps", "100000"], cwd=tmp_path, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    metrics, end = tmp_path / "run/metrics.jsonl", time.time() + 900
    while time.time() < end and running.poll() is None and not (metrics.exists() and metrics.read_text().count("loss")): time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    said, _ = running.communicate(timeout=900)
    assert running.returncode == 130 and "resume with: bgrpo train" in said and said.rstrip().endswith("--resume"), said
    stopped = int(said.split("after step ")[1].split(",")[0])
    assert stopped >= 1 and (tmp_path / f"run/checkpoint-{stopped}/trainer_state.json").exists()
    again = subprocess.run([*command, "--max_steps", str(stopped + 2), "--resume"], cwd=tmp_path, env=ONE_THREAD, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-2000:]
    assert [row["step"] for row in read_metrics(metrics) if "loss" in row] == list(range(1, stopped + 3))
    assert json.loads((tmp_path / "run/result.json").read_text())["step"] == stopped + 2


@pytest.mark.parametrize("more", [dict(baseline="tempered", alpha=0.3), dict(baseline="violations")], ids=lambda m: m["baseline"])
def test_a_list_weighed_by_probability(saved, tmp_path, more):
    "The gradient of an expected reward over a list, by autograd"
    seen = []
    trainer = BGRPOTrainer(str(saved), by_sum(seen), settings(tmp_path, max_steps=1, share_prefixes=False, **more), prompts())
    found, pushed = batches_of(trainer)[0]["advantages"].view(-1, 4), 0
    for row, rewards, scores in zip(found, torch.tensor(seen[0]["rewards"]).view(-1, 4), torch.tensor(seen[0]["scores"]).view(-1, 4)):
        logps, right = scores.clone().requires_grad_(), (rewards > 0).nonzero().flatten()
        if more["baseline"] == "tempered": ((0.3 * logps).softmax(0) @ rewards * 4 / 0.3).backward()
        elif len(right) and right[0]: (logps[:right[0] + 1].softmax(0) @ rewards[:right[0] + 1] * 4).backward()
        expected = torch.zeros(4) if logps.grad is None else logps.grad
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)
        pushed += bool(expected.any())
    assert pushed


@pytest.mark.parametrize("share,loss_type", [(True, "dr_grpo"), (False, "dr_grpo"), (True, "grpo"), (True, "dapo"), (False, "bnpo"), (True, "cispo")])
def test_each_token_has_the_advantage_of_its_fork(saved, tmp_path, share, loss_type):
    "Values of beginnings counted by hand; the loss pushes each token by its own advantage"
    seen = []
    how = dict(baseline="siblings", max_steps=1, share_prefixes=share, loss_type=loss_type, learning_rate=0)
    trainer = BGRPOTrainer(str(saved), by_sum(seen), settings(tmp_path, **how), prompts())
    batch, rewards = batches_of(trainer)[0], seen[0]["rewards"]
    C, mask = batch["completion_ids"].shape[1], batch["completion_mask"]
    for start in range(0, 16, 4):
        rows = [batch["completion_ids"][k][:int(mask[k].sum())].tolist() for k in range(start, start + 4)]
        def value(beginning): # mean reward of the completions that begin so
            return np.mean([rewards[start + k] for k, row in enumerate(rows) if row[:len(beginning)] == beginning])
        for k, row in enumerate(rows):
            expected = [value(row[:t + 1]) - value(row[:t]) for t in range(len(row))] + [0.0] * (C - len(row))
            assert batch["advantages"][start + k].tolist() == pytest.approx(expected, abs=1e-5)
    assert list(trainer._logs["advantages"]) == pytest.approx(batch["advantages"].sum(1).tolist(), abs=1e-5)
    model = trainer.model
    logps = trainer._get_per_token_logps_and_entropies(model, torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
                                                       torch.cat([batch["prompt_mask"], mask], 1), C)[0]
    weight = mask / mask.sum(1, keepdim=True) if loss_type == "grpo" else mask
    slow = torch.autograd.grad(-(batch["advantages"] * logps * weight).sum(), list(model.parameters()))
    fast = torch.autograd.grad(trainer._compute_loss(model, batch), list(model.parameters()))
    slow, fast = (torch.cat([g.flatten() for g in gs]) for gs in (slow, fast))
    assert slow.norm() > 0 and torch.cosine_similarity(slow, fast, 0) > 1 - 1e-5


def test_equivalent_answers_are_credited_once(saved, tmp_path):
    "All right answers of a group have one key: the best one is scored, the others are neither paid nor punished"
    seen = []
    reward = by_sum(seen)
    def one_key(prompts, completion_ids, log_extra=None, **columns):
        rewards = reward(prompts=prompts, completion_ids=completion_ids, **columns)
        log_extra("answer_key", ["same"] * len(rewards))
        return rewards
    trainer = BGRPOTrainer(str(saved), one_key, settings(tmp_path, credit_once=True, max_steps=1, share_prefixes=False), prompts())
    found, repeated = batches_of(trainer)[0]["advantages"].tolist(), 0
    for start in range(0, 16, 4):
        rewards = seen[0]["rewards"][start:start + 4]
        right = [k for k, r in enumerate(rewards) if r > 0]
        scored = [None if k in right[1:] else r for k, r in enumerate(rewards)]
        assert found[start:start + 4] == pytest.approx(advantages_of(scored, 4), abs=1e-5)
        repeated += len(right[1:])
    assert repeated


@pytest.mark.parametrize("broken,says", [
    (dict(alpha=1.5, baseline="tempered"), "outside of 0"), (dict(alpha=0.2), "read with baseline='tempered' only"),
    (dict(baseline="violations", rollout="sample"), "samples have none"), (dict(credit_once=True, distinct_bonus=0.1), "leave one of them out"),
    (dict(baseline="siblings", use_liger_kernel=True), "use_liger_kernel does not take"), (dict(baseline="tempered", objective="original"), "scale_rewards='none'"),
    (dict(baseline="sibling"), "use one of mean")])
def test_credit_settings_that_contradict(tmp_path, broken, says):
    with pytest.raises(ValueError, match=says): settings(tmp_path, **broken)


@pytest.mark.parametrize("broken,says", [(dict(beta=0.1), "built in memory"), (dict(max_completion_length=2000), "positions"), (dict(num_generations=64, prompts_per_step=1,
                                         max_completion_length=1), "lower num_generations")])
def test_what_cannot_work_is_one_clear_error(tmp_path, broken, says):
    with pytest.raises(ValueError, match=says):
        BGRPOTrainer(new_model("tiny", position="learned", **SMALL), by_length([]), settings(tmp_path, **broken),
                     prompts(), processing_class=load_tokenizer("single")).train()


@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_bgrpo_train_says_of_long_prompts_what_the_trainer_says(position, monkeypatch):
    "Learned positions: refused; rotary ones: one warning"
    from bgrpo_nb.recipes.train import _check_lengths
    from bgrpo_nb.search import generation
    monkeypatch.setattr(generation, "_LONG", set())
    model = new_model("tiny", position=position, **SMALL)
    rest = load_tokenizer("single"), model, generate_problems(4, 2, 2, seed=5)
    config = SimpleNamespace(max_completion_length=model.config.max_position_embeddings)
    if position == "learned":
        with pytest.raises(ValueError, match="may reach .* tokens.*lower max_completion_length by"): _check_lengths(*rest, config)
        return
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2): _check_lengths(*rest, config)
    assert [w.category for w in found] == [UserWarning] and "was not trained beyond" in str(found[0].message)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "right_only", "minimum_risk", "tempered", "violations"])
def test_a_completion_without_a_reward_has_advantage_0(saved, tmp_path, baseline):
    "It is left out of its group's baseline, and the advantages that are logged are those of the loss"
    seen, batches = [], []
    score = by_length(seen)

    def some(**columns): # in the four groups: one unscored, two, all but one, all
        rewards = score(**columns)
        for k in (1, 4, 7, 8, 9, 10, 12, 13, 14, 15): rewards[k] = None
        return rewards

    trainer = BGRPOTrainer(str(saved), some, settings(tmp_path, baseline=baseline, max_steps=1, share_prefixes=False),
                           prompts())
    inner = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda x: (batches.append(inner(x)), batches[-1])[1]
    trainer.train()
    found, rewards, scores = batches[0]["advantages"].tolist(), seen[0]["rewards"], seen[0]["scores"]
    assert rewards.count(None) == 10 and all(found[k] == 0 for k, r in enumerate(rewards) if r is None)
    for start in range(0, 16, 4):
        scored = [k for k in range(start, start + 4) if rewards[k] is not None]
        if len(scored) < 2: continue
        expected = advantages_of([rewards[k] for k in scored], len(scored), baseline, [scores[k] for k in scored])
        assert [found[k] for k in scored] == pytest.approx(expected, abs=1e-4)
    assert found[11] == (baseline == "right_only" and rewards[11] > 0)
    assert list(trainer._logs["advantages"]) == pytest.approx(found)


@pytest.mark.parametrize("share", [True, False], ids=["trie", "full rows"])
def test_a_group_of_equal_rewards_keeps_its_kl_term(saved, tmp_path, share):
    "As in TRL: all advantages are 0, and beta still pulls a policy that has moved towards the start"
    def gradient(beta):
        model = load_model(saved, device="cpu")
        trainer = BGRPOTrainer(model, lambda completion_ids, **k: [0.5] * len(completion_ids),
                               settings(tmp_path, beta=beta, max_steps=1, share_prefixes=share), prompts(),
                               processing_class=load_tokenizer("single"))
        with torch.no_grad():
            for p in model.parameters(): p *= 1.05
        trainer.train()
        return next(row["grad_norm"] for row in trainer.state.log_history if "loss" in row)
    assert gradient(0.0) == 0 and gradient(0.1) > 1e-3


def verdicts_of_each(reward, reason, key):
    "A reward function that logs what it is given for each completion"
    def pay(completion_ids, log_extra, **columns):
        log_extra("reason", [reason(k) for k in range(len(completion_ids))])
        log_extra("answer_key", [key(k) for k in range(len(completion_ids))])
        return [reward] * len(completion_ids)
    return pay


def test_of_columns_with_one_name_the_first_functions_count(saved, tmp_path):
    "The bonus and the shares of groups go by it; metrics of functions with one name keep apart"
    first = verdicts_of_each(0.0, lambda k: "ok" if k % 4 < 2 else "wrong", lambda k: ["the same"])
    second = verdicts_of_each(0.0, lambda k: "ok", lambda k: str(k))
    trainer = BGRPOTrainer(str(saved), [first, second], settings(tmp_path, distinct_bonus=0.5, max_steps=1,
                           log_completions=True), prompts())
    trainer.train()
    row = next(row for row in trainer.state.log_history if "loss" in row)
    assert (row["groups/none_valid"], row["groups/all_valid"], row["groups/distinct_valid"]) == (0, 0, 1)
    assert list(trainer._logs["extra"]["reason"]) == ["ok", "ok", "wrong", "wrong"] * 4
    assert (row["rewards/pay/mean"], row["rewards/pay_2/mean"]) == (0.5 / 4, 0)


def test_a_metric_never_stops_a_run(saved, tmp_path):
    "Reasons for finished completions alone, columns of any kind, metrics that are no numbers: one warning each"
    def pay(completion_ids, log_extra, log_metric, **columns):
        log_extra("reason", ["ok"] * 3)
        log_extra("other", None)
        log_metric("share", None)
        log_metric("half", torch.tensor(0.5))
        return [1.0] + [0.0] * (len(completion_ids) - 1)
    trainer = BGRPOTrainer(str(saved), pay, settings(tmp_path, distinct_bonus=0.5, log_completions=True), prompts())
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.train()
    about = [str(w.message) for w in found if "left out" in str(w.message)]
    assert len(about) == 3 and "log_extra('reason') got 3 values for 16 completions" in about[0]
    row = next(row for row in trainer.state.log_history if "loss" in row)
    assert row["half"] == 0.5 and "share" not in row and row["groups/none_valid"] == 0.75
    assert set(trainer._logs["extra"]) == {"beam_rank"}


def test_a_wrong_number_of_answer_keys_is_a_warning(saved, tmp_path):
    pay = VerifiedReward(lambda prompts, ids: [True] * len(ids), lambda ids: ["one key"])
    with pytest.warns(UserWarning, match="answer_keys gave 1 keys for 16 right completions"):
        BGRPOTrainer(str(saved), pay, settings(tmp_path, max_steps=1, distinct_bonus=0.5), prompts()).train()


DROPS = {
    "OPT": dict(dropout=0.3, attention_dropout=0.3, layerdrop=0.3, ffn_dim=48, word_embed_proj_dim=32),
    "XGLM": dict(dropout=0.3, attention_dropout=0.3, activation_dropout=0.3, layerdrop=0.3, d_model=32, num_layers=2,
                 attention_heads=4, ffn_dim=48),
    "BioGpt": dict(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3, activation_dropout=0.3, layerdrop=0.3),
    "SeedOss": dict(attention_dropout=0.3, residual_dropout=0.3, num_key_value_heads=2, head_dim=8),
    "Falcon": dict(hidden_dropout=0.3, attention_dropout=0.3),
    "GPT2": dict(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3, n_positions=256),
}


@pytest.mark.parametrize("family", DROPS)
def test_dropout_off_means_off(family, tmp_path):
    "Two forwards in train mode are equal, whichever way a family drops values or layers"
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**dict(vocab_size=31, pad_token_id=0, eos_token_id=9,
                      bos_token_id=None, max_position_embeddings=256, initializer_range=0.5) | SMALL | DROPS[family])
    model = transformers.AutoModelForCausalLM.from_config(config)
    ids = torch.randint(10, 31, (2, 12))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        def spread():
            model.train()
            first = model(input_ids=ids, attention_mask=mask).logits
            return max((model(input_ids=ids, attention_mask=mask).logits - first).abs().max() for _ in range(3))
        assert spread() > 0
        trainer = BGRPOTrainer(model, by_length([]), settings(tmp_path, max_steps=1), prompts(),
                               processing_class=load_tokenizer("single"))
        assert spread() == 0
    assert trainer.model is model


@pytest.mark.parametrize("given,steps", [(dict(num_train_epochs=2), 4), (dict(num_train_epochs=0.5), 1),
                                         (dict(num_train_epochs=2, max_steps=1), 1)])
def test_epochs_without_max_steps_mean_epochs(saved, tmp_path, given, steps):
    "8 prompts, 4 a step"
    more = dict(max_steps=None) | given
    trainer = BGRPOTrainer(str(saved), by_length([]), settings(tmp_path, **more), prompts())
    trainer.train()
    assert trainer.state.global_step == steps
    default = BGRPOConfig(use_cpu=True)
    assert (default.max_steps, default.num_train_epochs) == (100, transformers.TrainingArguments.num_train_epochs)


def test_arguments_that_cannot_work_are_one_clear_error(saved, tmp_path):
    "Found before a model is loaded"
    def refused(says, dataset=None, args=None, error=ValueError, **more):
        with pytest.raises(error, match=says):
            args = args or settings(tmp_path)
            BGRPOTrainer("no such model", by_length([]), args, prompts() if dataset is None else dataset, **more)
    refused("3 prompts are fewer than the 4 of one step; lower prompts_per_step", prompts().select(range(3)))
    named = prompts().add_column("beam_score", [0.0] * 8)
    refused("a column 'beam_score'", named)
    refused("a column 'beam_score'", eval_dataset={"one": prompts(), "two": named})
    refused("args is a GRPOConfig", args=GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False),
            error=TypeError)
    refused("max_completion_length=None gives a search no end", args=settings(tmp_path, max_completion_length=None))
    with pytest.raises(ValueError, match="max_completion_length=0 leaves no room"):
        BGRPOConfig(use_cpu=True, max_completion_length=0)


def test_the_bonus_goes_to_a_function_that_has_paid(saved, tmp_path):
    "A right answer whose first function gave None keeps its bonus; one without any reward stays unscored"
    ok = verdicts_of_each(None, lambda k: "ok", str)
    trainer = BGRPOTrainer(str(saved), [ok, lambda completion_ids, **k: [1.0] * 8 + [None] * 8],
                           settings(tmp_path, distinct_bonus=0.5), prompts())
    trainer.model.train()
    rewards = trainer._calculate_rewards([{}] * 16, ["a"] * 16, [""] * 16, [[k] for k in range(16)])
    assert rewards[:8, 1].tolist() == [1.5] * 8 and rewards[:, 0].isnan().all() and rewards[8:].isnan().all()


LORA = dict(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def grouped_keys():
    torch.manual_seed(0)
    config = transformers.Qwen3Config(vocab_size=31, pad_token_id=0, eos_token_id=9, bos_token_id=None, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
                                      initializer_range=0.5, **SMALL)
    return transformers.AutoModelForCausalLM.from_config(config)


def two_steps(folder, model, **more):
    peft_config = more.pop("peft_config", None)
    seen = []
    trainer = BGRPOTrainer(model, by_length(seen), settings(folder, learning_rate=1e-3, **more), prompts(), processing_class=load_tokenizer("single"), peft_config=peft_config)
    trainer.train()
    return trainer, seen, [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("share", [True, False], ids=["trie", "full rows"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("rollout", ["beam", "mixed"])
def test_checkpointing_changes_nothing_but_memory(tmp_path, share, lora, rollout):
    "TRL's default; the searches read each prompt once, with a cache, and checkpointing is on again afterwards"
    from peft import LoraConfig
    more = dict(share_prefixes=share, rollout=rollout) | (dict(peft_config=LoraConfig(**LORA), beta=0.1) if lora else {})
    assert BGRPOConfig(use_cpu=True).gradient_checkpointing and not TrainConfig(use_cpu=True).gradient_checkpointing
    ends = []
    for checkpointing in (dict(gradient_checkpointing=False), dict(), dict(gradient_checkpointing_kwargs=dict(use_reentrant=True))):
        trainer, seen, logged = two_steps(tmp_path, grouped_keys(), **more, **checkpointing)
        assert trainer.model.is_gradient_checkpointing == (checkpointing != dict(gradient_checkpointing=False))
        ends.append(([s["ids"] for s in seen], [row["grad_norm"] for row in logged], torch.cat([p.detach().flatten() for p in trainer.model.parameters()])))
    for ids, norms, weights in ends[1:]:
        assert ids == ends[0][0] and norms == pytest.approx(ends[0][1], rel=1e-5)
        torch.testing.assert_close(weights, ends[0][2], rtol=1e-5, atol=1e-5)


def test_searches_under_checkpointing_use_the_cache(tmp_path):
    "A layer sees the prompt once, then at most one token of each beam"
    trainer = BGRPOTrainer(grouped_keys(), by_length([]), settings(tmp_path), prompts(), processing_class=load_tokenizer("single"))
    trainer.model.train()
    getattr(trainer.model, "activation_checkpointing_enable", trainer.model.gradient_checkpointing_enable)() # as `train` does
    widths = []
    trainer.model.model.layers[0].register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    trainer._roll_out([prompts()[0]["prompt"]] * 4, trainer)
    prompt = len(load_tokenizer("single")(prompts()[0]["prompt"])["input_ids"])
    steps = widths[widths.index(prompt) + 1:]                              # before them: a probe for trees
    assert len(steps) <= 8 and all(width <= 4 for width in steps) and trainer.model.is_gradient_checkpointing


@pytest.mark.parametrize("made", ["by the trainer", "in memory", "in memory, trained before"])
def test_lora_has_its_reference_in_itself(tmp_path, made):
    """The KL term at each step is that to the model without a new adapter, or to a trained adapter as it was: TRL's rule.
    Adapters are on in the search: scores are the log-probabilities of the adapted model"""
    from peft import LoraConfig, get_peft_model
    base, more = grouped_keys(), dict(beta=0.1, max_steps=3)
    start = grouped_keys()                                                 # the reference, made again
    torch.manual_seed(4)
    if made == "by the trainer": more |= dict(peft_config=LoraConfig(**LORA))
    if made == "in memory": base = get_peft_model(base, LoraConfig(**LORA))
    if made == "in memory, trained before":
        base = get_peft_model(base, LoraConfig(**LORA, init_lora_weights=False))
        state = {name: x.clone() for name, x in base.state_dict().items()}
        start = get_peft_model(start, LoraConfig(**LORA))
        start.load_state_dict(state)
    kls, scores = [], []
    compute = BGRPOTrainer._compute_loss

    def exact(self, model, inputs):
        rows = [torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask")]
        C, on = inputs["completion_ids"].shape[1], inputs["completion_mask"]
        with torch.no_grad():
            l, r = (m(input_ids=rows[0], attention_mask=rows[1], position_ids=(rows[1].cumsum(1) - 1).clamp(min=0)).logits[:, -C - 1:-1].log_softmax(-1)
                    .gather(2, inputs["completion_ids"][..., None])[..., 0] for m in (self.model, start))
        kls.append((((r - l).exp() - (r - l) - 1) * on).sum().item() / on.sum().item())
        scores.append(sorted((l * on).sum(1).tolist()))
        return compute(self, model, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BGRPOTrainer, "_compute_loss", exact)
        trainer, seen, logged = two_steps(tmp_path, base, **more)
    assert [row["kl"] for row in logged] == pytest.approx(kls, abs=1e-6) and kls[0] == 0 < 1e-6 < kls[-1]
    for found, step in zip(scores, seen): assert found == pytest.approx(sorted(step["scores"]), abs=1e-3)
    assert all(not p.requires_grad for name, p in trainer.model.named_parameters() if ".default." not in name)


def test_what_a_search_has_no_place_for_is_refused(tmp_path):
    from peft import LoraConfig, get_peft_model
    def make(model, **more):
        config = settings(tmp_path, beta=more.pop("beta", 0.0))
        return BGRPOTrainer(model, by_length([]), config, prompts(), processing_class=load_tokenizer("single"), **more)
    def add(a: int, b: int) -> int: return a + b
    for more in (dict(tools=[add]), dict(environment_factory=dict)):
        with pytest.raises(ValueError, match="several turns, and beam_rank and beam_score cover one .*TRL's GRPOTrainer"): make(grouped_keys(), **more)
    with pytest.raises(ValueError, match="adapter 'default', but this model's is called 'mine'"):
        make(get_peft_model(grouped_keys(), LoraConfig(**LORA), adapter_name="mine"), beta=0.1)
    with pytest.raises(ValueError, match="built in memory"): make(grouped_keys(), beta=0.1)
    with pytest.raises(ValueError, match="built in memory, and they alone cannot be loaded"):
        save_model(get_peft_model(grouped_keys(), LoraConfig(**LORA)), load_tokenizer("single"), tmp_path / "policy")


def test_reentrant_checkpointing_of_tries_is_refused_on_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(BGRPOConfig, "world_size", 2)
    reentrant = dict(gradient_checkpointing_kwargs=dict(use_reentrant=True))
    def check(**more): check_checkpointing(settings(tmp_path, **more))
    for fine in (dict(), reentrant | dict(share_prefixes=False), reentrant | dict(gradient_checkpointing=False)): check(**fine)
    with pytest.raises(ValueError, match="cannot be combined with tries on several processes; leave it out"): check(**reentrant)
