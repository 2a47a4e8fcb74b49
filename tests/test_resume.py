"""A run that was interrupted continues exactly: any epoch, several passes over a batch, one and two processes; real
signals, incomplete checkpoints, full disks."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from datasets import Dataset

from bgrpo_nb.base import run_folder
from bgrpo_nb.algebra.problems import generate_problems, write_problems
from bgrpo_nb.policy.model import load_model, load_tokenizer, new_model, save_model
from bgrpo_nb.base.run_folder import check_space, open_run, read_metrics, newest_checkpoint
from bgrpo_nb.learn.config import BGRPOConfig
from bgrpo_nb.learn.trainer import BGRPOTrainer

BGRPO = ["-m", "bgrpo_nb"] # of Python, or of torchrun
ALONE = os.environ | {"OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "WANDB_MODE": "disabled"}
CLOCK = ("runtime", "seconds", "step_time", "per_second", "train_loss", "total_flos")


pytestmark = pytest.mark.usefixtures("one_thread")


def train(policy, folder, resume=None, peft_config=None, **more):
    "Nine steps over six prompts: what each step saw and logged; `policy`: a folder, or what makes a model"
    seen = []

    def reward(prompts, completion_ids, beam_rank, **kwargs):
        seen.append((prompts, completion_ids))
        return [len(set(ids)) / 8 - 0.1 * r for ids, r in zip(completion_ids, beam_rank)]

    config = BGRPOConfig(output_dir=str(folder), **dict(num_generations=4, prompts_per_step=2, max_steps=9, max_completion_length=6, use_cpu=True, disable_tqdm=True,
                                                        save_steps=1, save_total_limit=None, seed=1, warmup_steps=2, learning_rate=1e-3) | more)
    prompts = [p.prompt for p in generate_problems(6, 2, 2, seed=5)]
    model = policy() if callable(policy) else str(policy)
    trainer = BGRPOTrainer(model, reward, config, Dataset.from_dict({"prompt": prompts}), processing_class=load_tokenizer("single"), peft_config=peft_config)
    trainer.train(resume_from_checkpoint=resume)
    logged = [{k: v for k, v in row.items() if not any(c in k for c in CLOCK)} for row in trainer.state.log_history]
    return seen, [row for row in logged if "loss" in row], torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("more,generations_before", [
    (dict(), lambda step: step),                                                                # an epoch is 3 steps: the permutations of later epochs
    (dict(num_iterations=2, rollout="mixed", logging_steps=2), lambda step: -(-step // 2)),     # odd checkpoints lie between two passes, and between two log lines
    (dict(steps_per_generation=2, per_device_train_batch_size=4, rollout="sample", objective="original", num_iterations=2), lambda step: -(-step // 4)),
], ids=["later epochs", "two passes", "two steps a batch, two passes, reference"])
def test_every_checkpoint_leads_to_the_same_end(policy, tmp_path, more, generations_before):
    seen, logged, weights = train(policy, tmp_path / "run", **more)
    assert len(seen) == generations_before(9)
    for step in (2, 3, 5, 7):
        again, rows, end = train(policy, tmp_path / "run", str(tmp_path / f"run/checkpoint-{step}"), **more, save_strategy="no")
        assert again == seen[generations_before(step):], f"other prompts or completions after step {step}"
        assert rows == logged and torch.equal(end, weights)        # Transformers keeps the rows before the checkpoint


MOVING = dict(beta=0.1, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.5)
LORA = dict(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def a_trained_adapter(policy):
    "In memory, as a PeftModel with weights of its own"
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(3)
    return get_peft_model(load_model(policy, device="cpu"), LoraConfig(**LORA, init_lora_weights=False))


@pytest.mark.parametrize("kind", ["a reference that moves", "LoRA", "LoRA trained before"])
def test_reference_policies_and_adapters_continue_too(policy, tmp_path, kind):
    more, start = dict(beta=0.1, gradient_checkpointing=True), policy
    if kind == "a reference that moves": more = MOVING
    if kind == "LoRA":
        from peft import LoraConfig
        more |= dict(peft_config=LoraConfig(**LORA))
    if kind == "LoRA trained before":
        def start(): return a_trained_adapter(policy)
    seen, logged, weights = train(start, tmp_path / "run", **more)
    assert logged[0]["kl"] == 0 and logged[-1]["kl"] > 1e-6
    for step in (2, 5):
        again, rows, end = train(start, tmp_path / "run", str(tmp_path / f"run/checkpoint-{step}"), **more, save_strategy="no")
        assert again == seen[step:] and rows == logged and torch.equal(end, weights)
    size = sum(path.stat().st_size for path in (tmp_path / "run/checkpoint-9").rglob("adapter_model.safetensors"))
    assert size < (policy / "model.safetensors").stat().st_size and (size > 0) == ("LoRA" in kind)


def test_a_checkpoint_without_its_reference_continues_with_a_warning(policy, tmp_path):
    train(policy, tmp_path / "run", **MOVING, max_steps=2)
    for name in ("reference.pt", "seal.json"): (tmp_path / f"run/checkpoint-2/{name}").unlink()  # as TRL writes it
    with pytest.warns(UserWarning, match="holds no reference policy"):
        train(policy, tmp_path / "run", str(tmp_path / "run/checkpoint-2"), **MOVING | dict(max_steps=3, save_strategy="no"))


def rows_of(run):
    "Logged rows without times; entropy to 6 places, because its last bit depends on the alignment of memory"
    logged = [row for row in read_metrics(Path(run) / "metrics.jsonl") if "train_runtime" not in row]
    def untimed(row): return {k: v for k, v in row.items() if not any(c in k for c in CLOCK)}
    return [{k: round(v, 6) if k == "entropy" else v for k, v in untimed(row).items()} for row in logged]


def command(policy, folder, processes=1, **more):
    flags = dict(model=policy, problems="p.txt", output_dir=folder, prompts_per_step=3, num_generations=4, num_iterations=2, max_steps=10, held_out=4, eval_steps=5, save_steps=3,
                 num_beams=4, wide_beams=4, num_samples=2, max_completion_length=6, warmup_steps=0, learning_rate=1e-3, use_cpu="true", report_to="none", disable_tqdm="true") | more
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else [sys.executable]
    return [*start, *BGRPO, "train", *(f"--{k}={v}" for k, v in flags.items())]


def start(command, cwd):
    return subprocess.Popen(command, cwd=cwd, env=ALONE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)


def after_step(running, metrics, step):
    end = time.time() + 900
    def reached():
        rows = read_metrics(metrics) if metrics.exists() else []
        return any("loss" in row and row["step"] >= step for row in rows)
    while time.time() < end and running.poll() is None and not reached(): time.sleep(0.02)
    assert running.poll() is None, running.communicate()[1][-3000:]


def children(pid):
    found = [int(p) for t in Path(f"/proc/{pid}/task").glob("*/children") for p in t.read_text().split()]
    return found + [c for p in found for c in children(p)]


def test_the_best_adapters_come_back_at_the_end(policy, tmp_path):
    "An evaluator that prefers the first checkpoint; what is saved as a policy can be loaded again"
    from peft import LoraConfig
    scores = iter([0.9, 0.1, 0.2])
    config = BGRPOConfig(output_dir=str(tmp_path / "run"), num_generations=4, prompts_per_step=2, max_steps=3, max_completion_length=6, use_cpu=True, disable_tqdm=True, save_steps=1,
                         eval_strategy="steps", eval_steps=1, learning_rate=1e-2, metric_for_best_model="score", load_best_model_at_end=True, beta=0.1)
    def pay(completion_ids, **kwargs): return [len(set(ids)) / 8 for ids in completion_ids]
    trainer = BGRPOTrainer(load_model(policy, device="cpu"), pay, config, Dataset.from_dict({"prompt": ["P 1 ⁇"] * 6}), processing_class=load_tokenizer("single"),
                           evaluator=lambda *_: dict(score=next(scores)), peft_config=LoraConfig(**LORA, init_lora_weights=False))
    trainer.train()
    from safetensors.torch import load_file
    best = load_file(tmp_path / "run/checkpoint-1/adapter_model.safetensors")
    now = {name.replace(".default", ""): p for name, p in trainer.model.named_parameters() if "lora_" in name}
    assert best.keys() == now.keys() and all(torch.equal(best[name], now[name]) for name in best)
    save_model(trainer.model, load_tokenizer("single"), tmp_path / "policy")
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad(): a, b = (m.eval()(input_ids=ids).logits for m in (trainer.model, load_model(tmp_path / "policy", device="cpu")))
    torch.testing.assert_close(a, b)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds children in /proc")
@pytest.mark.parametrize("processes", [1, 2])
def test_kill_9_and_resume(policy, tmp_path, processes):
    """Killed somewhere after step 7 of 10. An epoch has 6 steps, and the checkpoint at step 3 is between two passes. Two
    processes have 6 rows each, so they split a group of 4"""
    write_problems(tmp_path / "p.txt", generate_problems(13, 2, 2, seed=50))
    straight = subprocess.run(command(policy, "straight", processes), cwd=tmp_path, env=ALONE, capture_output=True, text=True)
    assert straight.returncode == 0, straight.stderr[-3000:]
    running = start(command(policy, "killed", processes), tmp_path)
    after_step(running, tmp_path / "killed/metrics.jsonl", 7)
    for pid in [running.pid, *children(running.pid)]: os.kill(pid, signal.SIGKILL)
    running.communicate()
    torn = tmp_path / "killed/checkpoint-9"                             # as if it had been killed while it wrote this one
    if not torn.exists(): shutil.copytree(newest_checkpoint(tmp_path / "killed"), torn)
    (torn / "trainer_state.json").write_text('{"global_step": 9, "log')
    again = subprocess.run([*command(policy, "killed", processes), "--resume"], cwd=tmp_path, env=ALONE, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "checkpoint-9 is ignored, it was not written to its end" in again.stderr
    a, b = rows_of(tmp_path / "straight"), rows_of(tmp_path / "killed")
    assert len([r for r in a if "loss" in r]) == 10 and a == b
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("straight", "killed"))
    assert one["data"] == two["data"] and {k: v["value"] for k, v in one["best"].items()} == {k: v["value"] for k, v in two["best"].items()}
    assert (tmp_path / "straight/policy/model.safetensors").read_bytes() == (tmp_path / "killed/policy/model.safetensors").read_bytes()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds children in /proc")
def test_sigterm_at_one_of_two_processes_saves_and_ends_both(policy, tmp_path):
    "A signal reaches processes at different moments; they agree on the step to end at"
    write_problems(tmp_path / "p.txt", generate_problems(13, 2, 2, seed=50))
    running = start(command(policy, "run", 2, max_steps=400, held_out=0, save_steps=1000), tmp_path)
    after_step(running, tmp_path / "run/metrics.jsonl", 2)
    workers = [p for p in children(running.pid) if b"train" in Path(f"/proc/{p}/cmdline").read_bytes()]
    os.kill(max(workers), signal.SIGTERM)
    said, errors = running.communicate(timeout=900)
    assert said.count("stopped after step") == 1 and "resume with: bgrpo train" in said, said + errors[-3000:]
    step = int(said.split("stopped after step ")[1].split(",")[0])
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint.name == f"checkpoint-{step}" and {p.name for p in checkpoint.glob("pending_*")} == {"pending_0_of_2.pt", "pending_1_of_2.pt"}


def test_another_number_of_processes_continues_with_a_warning(policy, tmp_path):
    train(policy, tmp_path / "run", max_steps=2)
    (tmp_path / "run/checkpoint-2/pending_0_of_1.pt").rename(tmp_path / "run/checkpoint-2/pending_0_of_2.pt")
    (tmp_path / "run/checkpoint-2/seal.json").unlink()
    checkpoint = str(tmp_path / "run/checkpoint-2")
    with pytest.warns(UserWarning, match="not written by 1 process"):
        _, rows, _ = train(policy, tmp_path / "run", checkpoint, max_steps=4, save_strategy="no")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


def test_incomplete_checkpoints_are_skipped_and_removed(tmp_path):
    with open_run(tmp_path, {}): pass
    for step, state in ((2, '{"global_step": 2}'), (4, '{"global_step": 4, "best'), (6, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in ("model.safetensors.index.json", "optimizer.json"):    # stand for weights and optimizer
            (tmp_path / f"checkpoint-{step}" / name).write_text("{}")
        if state: (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text(state)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with open_run(tmp_path, {}, resume=True) as checkpoint: assert checkpoint.name == "checkpoint-2"
    assert [str(w.message).split(" is ignored")[0][-12:] for w in caught] == ["checkpoint-4", "checkpoint-6"]
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_disk_too_small_is_found_before_training(policy, tmp_path, monkeypatch):
    config = BGRPOConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=100, save_steps=10, save_total_limit=2)
    model = new_model("tiny", **SMALL)
    weights = 4 * sum(p.numel() for p in model.parameters())
    need = 3 * 3 * weights + weights
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12 - need, need))
    check_space(config, model)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12 - need + 1, need - 1))
    with pytest.raises(OSError, match="3 checkpoints of .* lower --save_total_limit"): check_space(config, model)
    from peft import LoraConfig, get_peft_model
    adapted = get_peft_model(new_model("tiny", **SMALL), LoraConfig(**LORA))
    adapters = 4 * sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 3 * 3 * adapters + adapters))
    check_space(config, adapted)                                          # checkpoints hold adapters alone
    config.sync_ref_model = True
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, need))
    with pytest.raises(OSError, match="3 checkpoints of .* lower --save_total_limit"): check_space(config, model)
    epochs = BGRPOConfig(output_dir=str(tmp_path), use_cpu=True, num_train_epochs=3, save_steps=10, save_total_limit=2)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12 - weights, weights))
    with pytest.raises(OSError, match="2 checkpoints of"): check_space(epochs, model)


FULL = """
mount -t tmpfs -o size=$SIZE disk disk || exit 77
"$@"; status=$?
find disk -type f > found.txt; cp -r disk/run/. kept/ 2>/dev/null
exit $status
"""


def on_a_small_disk(words, cwd, size):
    "In a mount namespace of its own, on a real file system of `size`"
    for name in ("disk", "kept"): (cwd / name).mkdir(exist_ok=True)
    done = subprocess.run(["unshare", "-rm", "sh", "-c", FULL, "sh", *words], cwd=cwd, env=ALONE | {"SIZE": size}, capture_output=True, text=True)
    if done.returncode in (1, 77) and ("unshare" in done.stderr or "mount" in done.stderr): pytest.skip("no mount namespaces here")
    return done


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare(1)")
def test_a_disk_that_fills_leaves_the_last_checkpoint_whole(policy, tmp_path):
    "First a disk too small from the start; then one that another process fills while the training runs"
    write_problems(tmp_path / "p.txt", generate_problems(13, 2, 2, seed=50))
    words = command(policy, "disk/run", max_steps=3, held_out=0, save_steps=1)
    done = on_a_small_disk(words, tmp_path, "200k")
    assert done.returncode == 2 and "lower --save_total_limit" in done.stderr and "loss" not in done.stdout, done.stderr[-2000:]
    assert len([line for line in done.stderr.splitlines() if line.startswith("bgrpo:")]) == 1
    fill = "import os, sys, threading, time\nsys.argv = sys.argv[1:]\n" \
           "def fill():\n" \
           "    while not os.path.exists('disk/run/checkpoint-1/trainer_state.json'): time.sleep(0.001)\n" \
           "    try:\n" \
           "        with open('disk/other', 'wb', buffering=0) as f:\n" \
           "            while True: f.write(bytes(4096))\n" \
           "    except OSError: pass\n" \
           "threading.Thread(target=fill, daemon=True).start()\n" \
           "from bgrpo_nb.cli import main\nsys.exit(main(sys.argv[1:]))"
    longer = command(policy, "disk/run", max_steps=50, held_out=0, save_steps=1)
    done = on_a_small_disk([sys.executable, "-c", fill, *longer[2:]], tmp_path, "3m")
    assert done.returncode == 2, done.stdout + done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if line.startswith("bgrpo:")]
    assert len(said) == 1 and "cannot be written" in said[0] and "--resume" in said[0], done.stderr[-2000:]
    kept = sorted(p.name for p in (tmp_path / "kept").glob("checkpoint-*"))
    assert kept and newest_checkpoint(tmp_path / "kept").name == kept[-1]
    shutil.copytree(tmp_path / "kept", tmp_path / "disk/run")              # the namespace is gone, and the disk with it
    steps = int(kept[-1][11:])
    again = subprocess.run([*command(policy, "disk/run", max_steps=steps + 1, held_out=0, save_steps=1), "--resume"], cwd=tmp_path, env=ALONE, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-2000:]


@pytest.mark.parametrize("asked", [4, 5])
def test_from_a_checkpoint_with_every_step_none_is_taken(policy, tmp_path, asked):
    "In the middle of an epoch Transformers' trainer would take one more; a larger number of steps continues"
    _, _, whole = train(policy, tmp_path / "run", max_steps=4)
    seen, rows, again = train(policy, tmp_path / "run", max_steps=asked, resume=tmp_path / "run/checkpoint-4")
    assert len(rows) == asked and bool(seen) == (asked > 4)
    assert torch.equal(whole, again) == (asked == 4)


def test_a_run_in_epochs_is_over_after_its_epochs(policy, tmp_path):
    _, rows, _ = train(policy, tmp_path / "run", max_steps=None, num_train_epochs=1)
    last = tmp_path / f"run/checkpoint-{len(rows)}"
    for epochs in (1, 2):
        _, again, _ = train(policy, tmp_path / "run", max_steps=None, num_train_epochs=epochs, resume=last)
        assert len(again) == epochs * len(rows)
