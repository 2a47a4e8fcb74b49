"A training stops at the first number that is not finite: nothing is learned from it, the good checkpoints stay."
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from bgrpo_nb.base.run_folder import checkpoints
from bgrpo_nb.cli import main
from bgrpo_nb.learn.config import BGRPOConfig
from bgrpo_nb.learn.finite import NotFinite
from bgrpo_nb.learn.trainer import BGRPOTrainer
from bgrpo_nb.policy.model import load_model, load_tokenizer, new_model

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
BAD_STEP = 3


def trainer_in(folder, model=None, evaluator=None, **more):
    def pay(completion_ids, beam_rank, **kwargs): return [len(set(ids)) / 8 - 0.1 * rank for ids, rank in zip(completion_ids, beam_rank)]
    settings = dict(num_generations=4, prompts_per_step=2, max_steps=5, max_completion_length=6, learning_rate=1e-3, warmup_steps=0, save_steps=1, save_total_limit=2, use_cpu=True,
                    disable_tqdm=True, seed=1)
    prompts = Dataset.from_dict({"prompt": [f"P {i} ⁇" for i in range(8)]})
    return BGRPOTrainer(model or new_model("tiny", initializer_range=0.5, **SMALL), pay, BGRPOConfig(output_dir=str(folder), **settings | more), prompts, processing_class=load_tokenizer("single"),
                        evaluator=evaluator)


def weights_of(model): return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("what,clipped", [("loss", 1.0), ("gradient", 1.0), ("gradient", 0.0), ("infinite gradient", 1.0)])
def test_a_step_that_is_not_finite_is_not_taken(tmp_path, monkeypatch, what, clipped):
    trainer = trainer_in(tmp_path, max_grad_norm=clipped)
    compute = BGRPOTrainer._compute_loss

    def spoiled(self, model, inputs):
        loss = compute(self, model, inputs)
        if self.state.global_step + 1 != BAD_STEP: return loss
        if what == "loss": return loss + math.nan                         # its gradient is finite
        weight = next(self.model.parameters())
        return loss + Spoil.apply(weight, math.inf if "infinite" in what else math.nan)

    monkeypatch.setattr(BGRPOTrainer, "_compute_loss", spoiled)
    with pytest.raises(NotFinite, match=f"step {BAD_STEP} was not taken.*last checkpoint is .*checkpoint-2.* lower learning_rate"): trainer.train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    good = load_model(tmp_path / "checkpoint-2", device="cpu")
    assert torch.equal(weights_of(trainer.model), weights_of(good))       # not touched by step 3
    kept = json.loads((tmp_path / f"not_finite_at_step_{BAD_STEP}.json").read_text())
    batch = kept["batch"]
    assert kept["step"] == BAD_STEP and math.isfinite(kept["loss"]) == (what != "loss") and math.isfinite(kept["grad_norm"]) == (what == "loss")
    assert [len(batch[name]) for name in ("prompt", "completion", "pay", "advantages", "beam_rank")] == [8] * 5
    for group in (batch["pay"][:4], batch["pay"][4:]): assert len(set(group)) > 1
    assert batch["advantages"][0] == pytest.approx(batch["pay"][0] - sum(batch["pay"][:4]) / 4, abs=1e-5)


class Spoil(torch.autograd.Function):
    "0, with a gradient of one's choice"
    @staticmethod
    def forward(ctx, weight, value):
        ctx.shape, ctx.value = weight.shape, value
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx, gradient): return torch.full(ctx.shape, ctx.value), None


def test_weights_that_are_not_finite_are_neither_measured_nor_saved(tmp_path):
    measured = []
    def evaluator(model, tokenizer): return measured.append(1) or {}
    trainer = trainer_in(tmp_path, evaluator=evaluator, learning_rate=1e39, eval_strategy="steps", eval_steps=1)
    with pytest.raises(NotFinite, match=r"weights are not finite after step 1 \(.*embed_tokens.weight"): trainer.train()
    assert not measured and not checkpoints(tmp_path)


@pytest.mark.parametrize("command,flags", [("train", dict(num_problems=30, prompts_per_step=4, num_generations=4, num_beams=4, wide_beams=4, num_samples=2, max_completion_length=8)),
                                           ("sft", dict(per_device_train_batch_size=8))])
def test_a_command_ends_with_status_2_and_one_line(tmp_path, capsys, monkeypatch, command, flags):
    flags |= dict(output_dir=tmp_path / "run", learning_rate=1000, warmup_steps=0, max_steps=40, held_out=4, save_steps=1, logging_steps=1, report_to="none", use_cpu="true", disable_tqdm="true")
    assert main([command, *(f"--{k}={v}" for k, v in flags.items())]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bgrpo:")]
    assert len(said) == 1 and re.search("was not taken, because its loss .* gradient norm (nan|inf)", said[0]), said
    assert not (tmp_path / "run/policy").exists() and not (tmp_path / "run/result.json").exists()


TWO = """
import math, os, sys
sys.path.insert(0, "tests")
import test_finite as t
rank, step = int(os.environ["RANK"]), [0]
compute = t.BGRPOTrainer._compute_loss
def spoiled(self, model, inputs):
    bad = rank == 1 and self.state.global_step + 1 == t.BAD_STEP
    return compute(self, model, inputs) + (math.nan if bad else 0)
t.BGRPOTrainer._compute_loss = spoiled
try: t.trainer_in(sys.argv[1]).train()
except t.NotFinite as e: print(f"process {rank} stopped", flush=True)
"""


def test_all_processes_stop_where_one_has_a_loss_that_is_not_finite(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "two.py"), str(tmp_path / "run")], capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=900)
    assert done.stdout.count("process 0 stopped") == done.stdout.count("process 1 stopped") == 1, done.stderr[-3000:]
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-1", "checkpoint-2"]
