"BGRPOTrainer on small models: ranks, advantages, log-probabilities, two processes, signals."
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import MistralConfig, MistralForCausalLM

from bgrpo_nb.data import generate_problems, write_problems
from bgrpo_nb.model import decode_completions, load_tokenizer, new_model, save_model
from bgrpo_nb.rewards import advantages_of, decomposition_reward
from bgrpo_nb.runs import read_metrics
from bgrpo_nb.trainer import BGRPOConfig, BGRPOTrainer, TrainConfig, train_bgrpo

TESTS = Path(__file__).parent
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}


@pytest.fixture(scope="module", params=["rotary", "learned"])
def saved(request, tmp_path_factory):
    "A random policy in a folder; with learned positions (GPT-2) padding on the left matters"
    return save_model(new_model("tiny", position=request.param, initializer_range=0.5, **SMALL), load_tokenizer("single"), tmp_path_factory.mktemp("policy"))


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


def run_processes(folder, policy, processes, rows, share):
    folder.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else [sys.executable]
    done = subprocess.run([*torchrun, str(TESTS / "two_processes.py"), str(folder), str(policy), str(rows), share], capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr[-3000:]
    parts = [json.loads((folder / f"seen_{i}.json").read_text()) for i in range(processes)]
    steps = [{k: sum((p["seen"][s][k] for p in parts), []) for k in ("ids", "ranks", "scores", "rewards")} |
             dict(advantages=sum((p["advantages"][s] for p in parts), [])) for s in range(2)]
    return steps, torch.load(folder / "state.pt")


@pytest.mark.parametrize("share", ["share", "full"])
def test_two_processes_equal_one_also_where_a_group_spans_them(saved, tmp_path, share):
    "Groups of 4 in slices of 6 rows: the second group lies on both processes"
    one, state = run_processes(tmp_path / "one", saved, 1, 12, share)
    two, other = run_processes(tmp_path / "two", saved, 2, 6, share)
    assert two[0]["ranks"] == [0, 1, 2, 3] * 3
    for a, b in zip(one, two):
        assert a["ids"] == b["ids"] and a["ranks"] == b["ranks"]
        for k in ("scores", "rewards", "advantages"): torch.testing.assert_close(torch.tensor(a[k]), torch.tensor(b[k]), atol=1e-4, rtol=0)
    assert state.keys() == other.keys()
    for k in state: torch.testing.assert_close(state[k], other[k], atol=2e-5, rtol=1e-4)


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
    assert sum("goes through generate" in str(w.message) for w in caught) == 1
    assert trainer.state.global_step == 2


def test_a_completion_that_never_ended_earns_nothing():
    tokenizer = load_tokenizer("single")
    pay = decomposition_reward(lambda ids: decode_completions(tokenizer, ids))
    right = tokenizer.convert_tokens_to_ids("^ a P 2".split())
    prompt = "+ P 1 + * P 2 ^ a P 2 ^ a P 4 ⁇"
    assert pay([prompt] * 2, [right + [tokenizer.eos_token_id], right], beam_rank=[0, 0]) == [1.0, -0.1]
    assert tokenizer.decode(right + [tokenizer.eos_token_id], skip_special_tokens=True) == tokenizer.decode(right)  # text alone cannot tell them apart


def test_the_best_checkpoint_is_known_by_any_metric(tmp_path):
    config = TrainConfig(output_dir=str(tmp_path / "run"), num_problems=60, held_out=8, prompts_per_step=6, num_generations=6, max_steps=4, eval_steps=2, save_steps=2,
                         num_samples=2, wide_beams=6, num_beams=6, metric_for_best_model="beam_rank_score", load_best_model_at_end=True, disable_tqdm=True, use_cpu=True)
    train_bgrpo(config)
    state = json.loads((tmp_path / "run/checkpoint-4/trainer_state.json").read_text())
    scores = [row["eval_beam_rank_score"] for row in read_metrics(tmp_path / "run/metrics.jsonl") if "eval_beam_rank_score" in row][1:]
    assert state["best_metric"] == pytest.approx(max(scores))


def test_ctrl_c_saves_and_resume_goes_on(tmp_path):
    write_problems(tmp_path / "p.txt", generate_problems(80, 3, 2, seed=50))
    command = [Path(sys.executable).with_name("bgrpo"), "train", "--problems", "p.txt", "--output_dir", "run", "--prompts_per_step", "6", "--num_generations", "4",
               "--max_steps", "6", "--held_out", "0", "--save_steps", "100"]
    running = subprocess.Popen(command, cwd=tmp_path, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    metrics, end = tmp_path / "run/metrics.jsonl", time.time() + 120
    while time.time() < end and running.poll() is None and not (metrics.exists() and metrics.read_text().count("loss")): time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    said, _ = running.communicate(timeout=120)
    assert running.returncode == 130 and "go on with: bgrpo train" in said and said.rstrip().endswith("--resume"), said
    stopped = int(said.split("after step ")[1].split(",")[0])
    assert 1 <= stopped < 6 and (tmp_path / f"run/checkpoint-{stopped}/trainer_state.json").exists()
    again = subprocess.run([*command, "--resume"], cwd=tmp_path, env=ONE_THREAD, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-2000:]
    assert [row["step"] for row in read_metrics(metrics) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "run/result.json").read_text())["step"] == 6


@pytest.mark.parametrize("broken,says", [(dict(beta=0.1), "built in memory"), (dict(max_completion_length=2000), "positions"), (dict(num_generations=64, prompts_per_step=1,
                                         max_completion_length=1), "lower num_generations")])
def test_what_cannot_work_is_one_clear_error(tmp_path, broken, says):
    with pytest.raises(ValueError, match=says):
        BGRPOTrainer(new_model("tiny", **SMALL), by_length([]), settings(tmp_path, **broken), prompts(), processing_class=load_tokenizer("single")).train()
