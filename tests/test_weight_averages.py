"Averages of weights and the optimizer's warm-up in a training by beams: against the slow form, resumed, with LoRA."
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from bgrpo_nb.algebra.problems import generate_problems
from bgrpo_nb.base.run_folder import check_space
from bgrpo_nb.learn.config import BGRPOConfig
from bgrpo_nb.learn.trainer import BGRPOTrainer
from bgrpo_nb.policy.model import load_model, load_tokenizer, new_model

BOTH = dict(ema_decay=0.6, average_with_start=0.25)
LORA = dict(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
PROMPTS = [p.prompt for p in generate_problems(6, 2, 2, seed=5)]


pytestmark = pytest.mark.usefixtures("one_thread")


def flat(model): return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


class Steps(TrainerCallback):
    "The weights after each optimizer step, the first of them the start"
    def __init__(self): self.seen = []
    def on_train_begin(self, args, state, control, model, **kwargs): self.seen.append(flat(model).clone())
    def on_step_end(self, args, state, control, model, **kwargs): self.seen.append(flat(model).clone())


def train(policy, folder, resume=None, measured=None, lora=False, **more):
    "Six steps of two prompts; every second step is measured and saved"
    def reward(completion_ids, beam_rank, **kwargs):
        return [len(set(ids)) / 8 - 0.1 * r for ids, r in zip(completion_ids, beam_rank)]

    def measure(model, tokenizer):
        if measured is not None: measured.append(flat(model).clone())
        return dict(size=flat(model).norm().item())

    config = BGRPOConfig(output_dir=str(folder), **dict(
        num_generations=4, prompts_per_step=2, max_steps=6, max_completion_length=6, use_cpu=True, disable_tqdm=True,
        save_steps=2, save_total_limit=None, eval_strategy="steps", eval_steps=2, seed=1, warmup_steps=0,
        learning_rate=1e-2) | more)
    peft_config = None
    if lora:
        from peft import LoraConfig
        peft_config = LoraConfig(**LORA)
    path = Steps()
    trainer = BGRPOTrainer(str(policy), reward, config, Dataset.from_dict({"prompt": PROMPTS}), evaluator=measure,
                           processing_class=load_tokenizer("single"), peft_config=peft_config, callbacks=[path])
    trainer.train(resume_from_checkpoint=resume)
    return trainer, path.seen


def by_hand(path, decay=0.0, share=1.0):
    "The average after each step: the formula, in float64, over the weights that were seen"
    start, mean, out = path[0].double(), path[0].double(), []
    for weights in path[1:]:
        mean = decay * mean + (1 - decay) * weights.double()
        out.append(start + share * (mean - start))
    return out


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "LoRA"])
@pytest.mark.parametrize("more", [dict(ema_decay=0.6), dict(average_with_start=0.25), BOTH], ids=str)
def test_what_is_measured_and_saved_is_the_average(policy, tmp_path, more, lora):
    measured = []
    trainer, path = train(policy, tmp_path / "run", measured=measured, lora=lora, **more)
    _, plain = train(policy, tmp_path / "plain", lora=lora)
    for a, b in zip(path, plain): assert torch.equal(a, b)                  # the steps are those of a run without it
    expected = by_hand(path, more.get("ema_decay", 0.0), more.get("average_with_start", 1.0))
    assert len(path) == 7 and (path[-1] - expected[-1].float()).abs().max() > 1e-3
    for found, step in zip(measured, (2, 4, 6)):
        torch.testing.assert_close(found.double(), expected[step - 1], atol=1e-6, rtol=0)
    torch.testing.assert_close(flat(trainer.model).double(), expected[-1], atol=1e-6, rtol=0)
    for step in (2, 6):
        file = next(p for p in (tmp_path / f"run/checkpoint-{step}").glob("*model.safetensors"))
        stored, names = load_file(file), [n for n, p in trainer.model.named_parameters() if p.requires_grad]
        saved = torch.cat([stored[n.replace(".default", "")].flatten() for n in names])
        torch.testing.assert_close(saved.double(), expected[step - 1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "LoRA"])
@pytest.mark.parametrize("more", [BOTH, dict(average_with_start=0.25), dict(optimizer_warmup_steps=3, warmup_steps=1),
                                  BOTH | dict(optimizer_warmup_steps=3)], ids=str)
def test_a_run_in_two_parts_ends_as_the_whole_one(policy, tmp_path, more, lora):
    whole, path = train(policy, tmp_path / "run", lora=lora, **more)
    for step in (2, 4):
        measured = []
        again, rest = train(policy, tmp_path / "run", str(tmp_path / f"run/checkpoint-{step}"), measured, lora, **more,
                            save_strategy="no")
        assert torch.equal(flat(again.model), flat(whole.model))
        for a, b in zip(rest[1:], path[step + 1:], strict=True): assert torch.equal(a, b)


def test_the_best_of_the_averages_is_loaded(policy, tmp_path):
    best = dict(load_best_model_at_end=True, metric_for_best_model="size", greater_is_better=False)
    trainer, path = train(policy, tmp_path / "run", **BOTH, **best)
    expected = by_hand(path, decay=0.6, share=0.25)
    sizes = {step: expected[step - 1].norm().item() for step in (2, 4, 6)}
    step = min(sizes, key=sizes.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{step}")
    torch.testing.assert_close(flat(trainer.model).double(), expected[step - 1], atol=1e-6, rtol=0)


def test_a_checkpoint_of_other_settings_is_refused(policy, tmp_path):
    train(policy, tmp_path / "run", **BOTH, max_steps=2)
    checkpoint = str(tmp_path / "run/checkpoint-2")
    for more in (dict(), dict(ema_decay=0.6), dict(average_with_start=0.25)):
        with pytest.raises(ValueError, match="was written with ema_decay=0.6 and average_with_start=0.25"):
            train(policy, tmp_path / "run", checkpoint, **more)
    train(policy, tmp_path / "plain", max_steps=2)
    with pytest.raises(ValueError, match="was written with no averages"):
        train(policy, tmp_path / "plain", str(tmp_path / "plain/checkpoint-2"), **BOTH)


def test_adam_collects_its_means_and_takes_no_step(policy, tmp_path):
    trainer, path = train(policy, tmp_path / "run", optimizer_warmup_steps=3, lr_scheduler_type="linear")
    for weights in path[:4]: assert torch.equal(weights, path[0])
    assert not torch.equal(path[4], path[0])
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {6}
    rates = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
    assert rates == pytest.approx([0, 0, 0, 1e-2, 1e-2 * 2 / 3, 1e-2 / 3])


@pytest.mark.parametrize("broken,says", [
    (dict(ema_decay=1.0), "ema_decay=1.0 is outside of"),
    (dict(ema_decay=-0.1), "ema_decay=-0.1 is outside of"),
    (dict(ema_decay=float("nan")), "ema_decay=nan is outside of"),
    (dict(average_with_start=0.0), "average_with_start=0.0 is outside of"),
    (dict(average_with_start=1.5), "average_with_start=1.5 is outside of"),
    (dict(optimizer_warmup_steps=-1), "use 0 or more"),
    (dict(optimizer_warmup_steps=5, max_steps=5), "leaves no step to take of max_steps=5"),
    (dict(optimizer_warmup_steps=5, optim="sgd"), "optim=sgd has others"),
    (dict(optimizer_warmup_steps=5, optim="adafactor"), "optim=adafactor has others"),
])
def test_what_cannot_work_is_refused(broken, says):
    with pytest.raises(ValueError, match=says): BGRPOConfig(use_cpu=True, **broken)


def test_an_optimizer_of_ones_own_is_refused(policy, tmp_path):
    model = load_model(policy, device="cpu")
    optimizer = torch.optim.AdamW(model.parameters())
    config = BGRPOConfig(output_dir=str(tmp_path), num_generations=4, prompts_per_step=2, use_cpu=True,
                         optimizer_warmup_steps=2)
    with pytest.raises(ValueError, match="others were given"):
        BGRPOTrainer(model, lambda **columns: [0.0], config, Dataset.from_dict({"prompt": PROMPTS}),
                     processing_class=load_tokenizer("single"), optimizers=(optimizer, None))


def test_checkpoints_need_space_for_averages(tmp_path, monkeypatch):
    model = new_model("tiny", **SMALL)
    size = 4 * sum(p.numel() for p in model.parameters())
    args = SimpleNamespace(output_dir=tmp_path, save_strategy="steps", save_steps=1, max_steps=1, save_total_limit=1)
    def fits(free, **more):
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
        try: check_space(SimpleNamespace(**vars(args), **more), model)
        except OSError: return False
        return True
    plain = next(k for k in range(3, 40) if fits(k * size))
    for more, extra in ((dict(ema_decay=0.9), 2), (dict(average_with_start=0.5), 2), (BOTH, 3)):
        n = next(k for k in range(3, 40) if fits(k * size, **more))
        assert n > plain and (n - plain) % extra == 0


def test_two_processes_average_as_one(policy, tmp_path):
    script = Path(__file__).with_name("two_processes.py")
    ends = []
    for n, rows in ((1, 8), (2, 4)):
        folder = tmp_path / str(n)
        folder.mkdir()
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
        job = dict(folder=str(folder), policy=str(policy), rows=rows, ema_decay=0.6, average_with_start=0.25,
                   save_strategy="steps", save_steps=1)
        (folder / "jobs.json").write_text(json.dumps([job]))
        subprocess.run([*start, script, folder / "jobs.json"], check=True, timeout=900, capture_output=True)
        ends.append(load_file(folder / "checkpoint-2/model.safetensors"))
        state = torch.load(folder / "state.pt")
        for name, saved in ends[-1].items(): torch.testing.assert_close(saved, state[name], atol=0, rtol=0)
    for name, alone in ends[0].items(): torch.testing.assert_close(ends[1][name], alone, atol=1e-6, rtol=0)
