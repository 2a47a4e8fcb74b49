"""Nothing of the user's is overwritten, a resumed run is the one that was begun, damaged checkpoints are noticed, settings
are read as they were meant, signals and W&B end nothing that they should not."""
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from bgrpo_nb.algebra.problems import generate_problems, read_problems, write_problems
from bgrpo_nb.base import checkpoints as ck
from bgrpo_nb.base.files import filling, replacing, write_text
from bgrpo_nb.base.ownership import MARK, check_new_file, check_owner, claim_folder, locked
from bgrpo_nb.base.run_folder import HISTORY, open_run, read_run_config
from bgrpo_nb.base.settings import read_value, settings_of
from bgrpo_nb.base.signals import handled
from bgrpo_nb.base.strict_yaml import parse_yaml
from bgrpo_nb.cli import main
from bgrpo_nb.learn.config import BGRPOConfig
from bgrpo_nb.recipes.callbacks import StopCleanly
from bgrpo_nb.recipes.flags import Fault, read_config
from bgrpo_nb.recipes.sft import SupervisedConfig, train_policy
from bgrpo_nb.recipes.train import TrainConfig, train_bgrpo
from bgrpo_nb.recipes.wandb_logging import Guarded, at_wandb
from bgrpo_nb.policy.model import load_tokenizer, new_model, save_model

BGRPO = [sys.executable, "-m", "bgrpo_nb"]
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
PLAIN = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_model(new_model("tiny", **SMALL), load_tokenizer("single"), tmp_path_factory.mktemp("policy"))


def snapshot(folder):
    "Every file below a folder and its bytes"
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def said(capsys, *words):
    "Status and standard error of a command, in this process"
    status = main([str(w) for w in words])
    return status, capsys.readouterr().err.strip()


# 2. Nothing of the user's is overwritten

FOREIGN = ("config.yaml", "metrics.jsonl", "README.md", "results.json", "report.html", "sweep.yaml",
           "checkpoint-3/model.safetensors", "plots/history.png", "thesis.txt")


@pytest.fixture
def foreign(tmp_path):
    folder = tmp_path / "mine"
    for name in FOREIGN: write_text(folder / name, f"mine: {name}")
    return folder


@pytest.mark.parametrize("command", [
    "train --model {policy} --problems {p} --output_dir {mine} --prompts_per_step 2 --use_cpu true",
    "train --model {policy} --problems {p} --output_dir {mine} --prompts_per_step 2 --use_cpu true --resume",
    "sft --output_dir {mine} --max_steps 1 --per_device_train_batch_size 2 --held_out 2 --use_cpu true",
    "demo --output_dir {mine} --steps 1", "evaluate --model {policy} --problems {p} --out {mine}",
    "analyze {run} --out {mine} --metric reward", "sweep {sweep} --output_dir {mine} --engine optuna",
    "convert {pt} {mine}"], ids=lambda c: " ".join(c.split()[:1] + [w for w in c.split() if w == "--resume"]))
def test_a_foreign_folder_is_refused_and_stays_byte_by_byte(command, foreign, policy, tmp_path, capsys):
    write_problems(tmp_path / "p.txt", generate_problems(12, 2, 2, seed=3))
    for seed in (0, 1):    # two finished runs, for analyze
        run = tmp_path / f"runs/{seed}"
        write_text(run / "config.yaml", f"seed: {seed}\nrollout: beam\noutput_dir: x\n")
        write_text(run / "metrics.jsonl", '{"step": 1, "reward": 0.5}\n')
        write_text(run / "result.json", '{"step": 1}')
    write_text(tmp_path / "s.yaml", "method: grid\nmetric: {name: reward, goal: maximize}\nparameters: {seed: {values: [0, 1]}}\n")
    state = {name: torch.zeros(1) for name in ("pos_emb", "ln_f.weight", "head.weight", "tok_emb.weight")}
    torch.save(state, tmp_path / "x.pt")
    before = snapshot(foreign)
    words = command.format(policy=policy, mine=foreign, p=tmp_path / "p.txt", run=tmp_path / "runs", sweep=tmp_path / "s.yaml", pt=tmp_path / "x.pt")
    status, err = said(capsys, *words.split())
    assert status == 2 and len(err.splitlines()) == 1, err
    assert "README.md" in err and "choose another" in err and str(foreign) in err
    assert snapshot(foreign) == before


def test_a_claimed_folder_is_ours_for_one_purpose(tmp_path):
    claim_folder(tmp_path / "a", "run")
    (tmp_path / "a/notes.txt").write_text("later")
    claim_folder(tmp_path / "a", "run")
    with pytest.raises(FileExistsError, match="run, here evaluation"): claim_folder(tmp_path / "a", "evaluation")
    (tmp_path / "a" / MARK).write_text("")      # the disk was full when it was marked
    check_owner(tmp_path / "a", "run")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="is a file"): claim_folder(tmp_path / "file", "run")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="choose another"): claim_folder(tmp_path / "loop", "run")


def test_a_run_of_an_earlier_version_is_known_by_its_content(tmp_path, policy):
    config = TrainConfig(output_dir=str(tmp_path / "old"), model=str(policy), use_cpu=True).to_dict()
    (tmp_path / "old").mkdir()
    write_text(tmp_path / "old/config.yaml", yaml.safe_dump(config))
    write_text(tmp_path / "old/metrics.jsonl", "")
    checkpoint_at(tmp_path / "old", 2, sealed=False)
    with open_run(tmp_path / "old", config, resume=True) as checkpoint: assert checkpoint.name == "checkpoint-2"
    assert (tmp_path / "old" / MARK).exists()


def test_two_trainings_never_share_a_folder(tmp_path):
    with open_run(tmp_path / "run", {}):
        with pytest.raises(BlockingIOError, match="another process"):
            with open_run(tmp_path / "run", {}): pass
        code = f"from bgrpo_nb.base.run_folder import open_run\nwith open_run({str(tmp_path / 'run')!r}, {{}}): pass"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "another process is at work" in done.stderr
    with open_run(tmp_path / "run", {}): pass


def test_a_file_is_replaced_only_where_that_was_asked_for(tmp_path, capsys):
    path = tmp_path / "p.txt"
    path.write_text("mine")
    status, err = said(capsys, "generate", path, "--n", 3)
    assert status == 2 and "--overwrite" in err and path.read_text() == "mine"
    assert said(capsys, "generate", path, "--n", 3, "--overwrite")[0] == 0 and len(read_problems(path)) == 3
    link = tmp_path / "link.txt"
    link.symlink_to(path)
    assert said(capsys, "generate", link, "--n", 5)[0] == 2
    assert said(capsys, "generate", link, "--n", 5, "--overwrite")[0] == 0
    assert link.is_symlink() and len(read_problems(path)) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.txt", "p.txt"]


def test_a_figure_has_the_name_that_was_given_and_replaces_nothing_unasked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_text("run/metrics.jsonl", '{"step": 1, "eval_beam_rank_score": 1.0}\n')
    for mine in ("fig.png", "adir.png", "adir/notes.txt", "taken.pdf"): write_text(mine, "mine")
    before = snapshot(tmp_path)
    for out, says in (("adir", "adir is a folder, where a file is needed"), ("new/", "new/ is a folder"), ("fig.png", "fig.png exists"), ("taken.pdf", "--overwrite")):
        status, err = said(capsys, "plot", "run", "--out", out)
        assert status == 2 and len(err.splitlines()) == 1 and says in err, err
    assert snapshot(tmp_path) == before
    for out, begins in (("fig", b"\x89PNG"), ("fig.svg", b"<?xml"), ("deep/er/fig.pdf", b"%PDF")):
        assert said(capsys, "plot", "run", "--out", out)[0] == 0
        assert Path(out).read_bytes().startswith(begins), "what was named, in the format of its suffix"
    assert snapshot(tmp_path).items() >= before.items()
    assert said(capsys, "plot", "run", "--out", "taken.pdf", "--overwrite")[0] == 0 and Path("taken.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("line", ["generate adir", "filter --problems p.txt --out adir", "filter --problems p.txt --out new/", "evaluate --problems p.txt --out r.json"])
def test_a_folder_where_a_file_is_needed_is_found_before_the_work(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("adir", "r.json"): Path(folder).mkdir()
    write_problems("p.txt", generate_problems(5, 2, 2, seed=1))
    monkeypatch.setattr("bgrpo_nb.policy.model.load_model", None)    # no work is begun
    status, err = said(capsys, *line.split())
    assert status == 2 and len(err.splitlines()) == 1 and "is a folder, where a file is needed; name a file in it" in err, err
    with pytest.raises(IsADirectoryError, match="name a file in it"): write_text("adir", "x")


def test_devices_and_pipes_are_written_to(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    check_new_file(pipe)
    write_text(pipe, "through")
    reader.join(10)
    assert got == ["through"] and pipe.is_fifo()
    before = os.stat("/dev/null")
    check_new_file("/dev/null")
    write_text("/dev/null", "gone")
    assert os.stat("/dev/null") == before
    with open(tmp_path / "out.txt", "w") as out:
        code = "from bgrpo_nb.base.files import write_text; write_text('/dev/stdout', 'a'); print('b')"
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert "b" in (tmp_path / "out.txt").read_text()     # the shell's file was not replaced


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path):
    path = write_text(tmp_path / "a.txt", "old")
    path.chmod(0o600)
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert snapshot(tmp_path) == {"a.txt": b"old"}
    with pytest.raises(OSError, match="a.txt cannot be written .No space left"), replacing(path) as part:
        part.write_text("half")
        raise OSError(28, "No space left on device")
    assert snapshot(tmp_path) == {"a.txt": b"old"}
    write_text(path, "new")
    assert path.stat().st_mode & 0o777 == 0o600
    write_text(tmp_path / "policy/notes.txt", "mine")
    with pytest.raises(OSError, match="free some space"), filling(tmp_path / "policy") as part:
        (part / "model.safetensors").write_text("half")
        raise RuntimeError("unexpected pos 64 vs 0")
    with filling(tmp_path / "policy") as part: (part / "config.json").write_text("{}")
    assert set(snapshot(tmp_path)) == {"a.txt", "policy/notes.txt", "policy/config.json"}


def test_convert_never_destroys_its_source(tmp_path, capsys):
    model = new_model("tiny", position="learned", **SMALL)
    source = save_model(model, load_tokenizer("single"), tmp_path / "F")
    before = snapshot(source)
    for destination in (source / "model.safetensors", source / "other.pt"):
        status, err = said(capsys, "convert", source, destination, "--overwrite")
        assert status == 2 and "name another destination" in err and snapshot(source) == before
    assert said(capsys, "convert", source, tmp_path / "back/x.pt")[0] == 0
    status, err = said(capsys, "convert", source, tmp_path / "back/x.pt")
    assert status == 2 and "--overwrite" in err
    status, err = said(capsys, "convert", tmp_path / "back/x.pt", tmp_path / "back")
    assert status == 2 and "choose another" in err


def theirs(folder):
    "A small checkpoint in the authors' format, made of the policy in F"
    save_model(new_model("tiny", position="learned", **SMALL), load_tokenizer("single"), folder / "F")
    assert main(["convert", str(folder / "F"), str(folder / "theirs/x.pt")]) in (0, None)
    return folder / "theirs/x.pt"


def test_convert_replaces_its_own_folder_when_it_is_asked_to(tmp_path, capsys):
    "With the mark and, as of earlier versions, without it; nothing of anybody else's"
    source, folder = theirs(tmp_path), tmp_path / "hf"
    assert said(capsys, "convert", source, folder)[0] == 0
    for marked in (True, False):
        if not marked: (folder / ".bgrpo_nb.json").unlink()
        (folder / "model.safetensors").write_bytes(b"old")
        status, err = said(capsys, "convert", source, folder)
        assert status == 2 and "replace it with --overwrite" in err
        assert (folder / "model.safetensors").read_bytes() == b"old"
        assert said(capsys, "convert", source, folder, "--overwrite")[0] == 0 and (folder / "model.safetensors").stat().st_size > 1000
    (folder / ".bgrpo_nb.json").unlink()
    (folder / "notes.txt").write_text("mine")
    status, err = said(capsys, "convert", source, folder, "--overwrite")
    assert status == 2 and "did not write (config.json" in err


def test_convert_obeys_or_refuses(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    theirs(tmp_path)
    for words, says in ((["F", "x.pt", "--n_head", 7], "leave out n_head"), (["tiny", "x.pt"], "tiny is a llama model"), (["nowhere", "x.pt"], "give the authors' file")):
        status, err = said(capsys, "convert", *words)
        assert status == 2 and says in err and len(err.strip().splitlines()) == 1 and not list(tmp_path.glob("*.pt"))


# 3. --resume means the run that was begun

SFT = dict(max_steps=6, per_device_train_batch_size=2, per_device_eval_batch_size=4, held_out=4, save_steps=2, eval_steps=4,
           logging_steps=1, warmup_steps=0, use_cpu=True, disable_tqdm=True, save_total_limit=None)


@pytest.fixture(scope="module")
def begun(policy, tmp_path_factory):
    "A supervised run of six steps with checkpoints at 2, 4 and 6, as if it had been killed before its end"
    folder = tmp_path_factory.mktemp("begun") / "run"
    train_policy(SupervisedConfig(output_dir=str(folder), model=str(policy), **SFT))
    (folder / "result.json").unlink()
    return folder


@pytest.fixture
def run(begun, tmp_path):
    import shutil
    return Path(shutil.copytree(begun, tmp_path / "run"))


def test_resume_without_flags_is_the_run_that_was_begun(run, policy):
    config = read_config(SupervisedConfig, ["--output_dir", str(run), "--resume"], "bgrpo sft")
    assert (config.model, config.max_steps, config.held_out, config.resume) == (str(policy), 6, 4, True)
    with open_run(run, config.to_dict(), resume=True) as checkpoint: assert checkpoint.name == "checkpoint-6"
    assert not (run / HISTORY).exists()


@pytest.mark.parametrize("flag", ["learning_rate=0.5", "seed=7", "degrees=3_2", "max_steps=8", "problems=other.txt", "canonical=false"])
def test_another_setting_is_refused_by_name(run, flag, capsys):
    before = snapshot(run)
    status, err = said(capsys, "sft", "--output_dir", run, "--resume", f"--{flag}")
    assert status == 2 and err.startswith(f"bgrpo: {flag.split('=')[0]}=") and "begun with" in err, err
    assert snapshot(run) == before


def test_what_may_change_is_recorded(run):
    config = read_config(SupervisedConfig, ["--output_dir", str(run), "--resume", "--save_steps", "3"], "bgrpo sft")
    with open_run(run, config.to_dict(), resume=True): pass
    assert read_run_config(run)["save_steps"] == 3
    row, = map(json.loads, (run / HISTORY).read_text().splitlines())
    assert (row["step"], row["save_steps"]) == (6, [2, 3])


def test_max_steps_of_a_training_may_change(tmp_path, policy):
    config = TrainConfig(output_dir=str(tmp_path / "run"), model=str(policy), max_steps=4, use_cpu=True)
    with open_run(tmp_path / "run", config.to_dict()): pass
    checkpoint_at(tmp_path / "run", 4)
    longer = read_config(TrainConfig, ["--output_dir", str(tmp_path / "run"), "--resume", "--max_steps", "9"], "bgrpo train")
    with open_run(tmp_path / "run", longer.to_dict(), resume=True): pass
    assert read_run_config(tmp_path / "run")["max_steps"] == 9
    epochs = TrainConfig(output_dir=str(tmp_path / "e"), model=str(policy), num_train_epochs=2, use_cpu=True)
    with open_run(tmp_path / "e", epochs.to_dict()): pass
    again = read_config(TrainConfig, ["--output_dir", str(tmp_path / "e"), "--resume"], "bgrpo train")
    assert again.to_dict() | {"resume": False} == epochs.to_dict()


def test_a_run_of_another_command_is_not_resumed(run):
    config = TrainConfig(output_dir=str(run), use_cpu=True, resume=True)
    with pytest.raises(ValueError, match="holds a run of bgrpo sft; resume it with that command"):
        with open_run(run, config.to_dict(), resume=True): pass


@pytest.mark.parametrize("config", [SupervisedConfig, TrainConfig])
@pytest.mark.parametrize("name,says", [("tensorboard", "report_to=tensorboard cannot be used .*; install"), ("tensor", "report_to=tensor is not known; use none or one of ")])
def test_where_nothing_can_be_reported(config, name, says, monkeypatch):
    from transformers.integrations import integration_utils
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
    with pytest.raises(ValueError, match=says) as error: config(use_cpu=True, report_to=name)
    assert "\n" not in str(error.value)
    assert not config(use_cpu=True, report_to="none").report_to and config(use_cpu=True, report_to="wandb").report_to == ["wandb"]


def test_a_run_cannot_become_shorter_than_it_is(tmp_path, policy):
    "As long as it is, it ends there"
    for name, length, asked in (("s", dict(max_steps=9), "max_steps"), ("e", dict(num_train_epochs=3), "num_train_epochs")):
        where = tmp_path / name
        with open_run(where, TrainConfig(output_dir=str(where), model=str(policy), use_cpu=True, **length).to_dict()): pass
        state = checkpoint_at(where, 6, sealed=False) / "trainer_state.json"
        state.write_text(json.dumps({"global_step": 6, "epoch": 2.0}))
        ck.seal(state.parent, state)
        is_at = {"max_steps": 6, "num_train_epochs": 2}[asked]
        for value in (is_at - 1, is_at, is_at + 1):
            config = read_config(TrainConfig, ["--output_dir", str(where), "--resume", f"--{asked}", str(value)], "bgrpo train").to_dict()
            if value >= is_at:
                with open_run(where, config, resume=True): pass
                continue
            before = snapshot(where)
            with pytest.raises(ValueError, match=f"{asked}={value}.* is less than the {is_at} that"):
                with open_run(where, config, resume=True): pass
            assert snapshot(where) == before


STEP = "--max_steps 1 --save_steps 1 --warmup_steps 0 --use_cpu true --disable_tqdm true --report_to none".split()
TRAIN = "--prompts_per_step 2 --num_generations 2 --num_beams 2 --num_samples 2 --max_completion_length 4".split()
READS = {
    "sft problems": ["sft", *STEP, "--held_out", "4", "--problems", "p.txt"],
    "train problems": ["train", *STEP, *TRAIN, "--held_out", "4", "--problems", "p.txt"],
    "train eval_problems": ["train", *STEP, *TRAIN, "--num_problems", "4", "--eval_problems", "p.txt"],
    "train regular_problems": ["train", *STEP, *TRAIN, "--held_out", "0", "--problems", "hard.txt",
                               "--hard_fraction", "0.5", "--regular_problems", "p.txt"],
}


@pytest.mark.parametrize("reads", READS)
def test_a_file_with_another_content_is_refused_by_name(reads, policy, tmp_path, monkeypatch, capsys):
    "An empty line more, or another end of the lines, is the same content; a run of an earlier version has no record"
    monkeypatch.chdir(tmp_path)
    write_problems("p.txt", generate_problems(12, 2, 2, seed=1))
    write_problems("hard.txt", generate_problems(12, 2, 2, seed=2))
    words, setting = [*READS[reads], "--model", policy, "--output_dir", "run"], reads.split()[1]
    assert said(capsys, *words)[0] == 0
    as_it_was = Path("p.txt").read_bytes()
    write_problems("p.txt", generate_problems(13, 2, 2, seed=3))
    before = snapshot("run")
    status, err = said(capsys, *words[:1], "--output_dir", "run", "--resume")
    assert status == 2 and f"{setting}=p.txt has another content (13 lines)" in err and "restore it" in err
    assert len(err.splitlines()) == 1 and snapshot("run") == before
    Path("run/inputs.json").write_text("{")
    status, err = said(capsys, *words[:1], "--output_dir", "run", "--resume")
    assert status == 2 and "inputs.json cannot be read; restore it, or delete it" in err
    Path("run/inputs.json").write_bytes(before["inputs.json"])
    Path("p.txt").write_bytes(as_it_was.replace(b"\n", b"\r\n") + b"\n\n")
    assert said(capsys, *words[:1], "--output_dir", "run", "--resume")[0] == 0
    Path("run/inputs.json").unlink()
    assert said(capsys, *words[:1], "--output_dir", "run", "--resume")[0] == 0
    assert json.loads(Path("run/inputs.json").read_text())[setting]["n"] == 12


@pytest.mark.parametrize("command", ["sft", "train"])
def test_another_policy_in_the_folder_of_the_start_is_refused(command, policy, tmp_path, monkeypatch, capsys):
    "The start is loaded again for a KL, and where it is the best: it must be the same. A README does not count"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(policy, "start")
    write_problems("p.txt", generate_problems(12, 2, 2, seed=1))
    words = [*READS[f"{command} problems"], "--model", "start", "--output_dir", "run"]
    assert said(capsys, *words)[0] == 0
    Path("start/README.md").write_text("mine")
    assert said(capsys, command, "--output_dir", "run", "--resume")[0] == 0
    before, weights = snapshot("run"), Path("start/model.safetensors").read_bytes()
    Path("start/model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    status, err = said(capsys, command, "--output_dir", "run", "--resume")
    assert status == 2 and "model=start has another content than when the run in run was begun" in err
    assert len(err.splitlines()) == 1 and snapshot("run") == before


def test_another_list_of_problems_is_refused(policy, tmp_path):
    "Lists that are given in Python have no name; their content is compared all the same"
    problems = generate_problems(12, 2, 2, seed=1)
    config = dict(model=str(policy), output_dir=str(tmp_path / "run"), prompts_per_step=2, num_generations=2, num_beams=2,
                  num_samples=2, max_completion_length=4, max_steps=1, save_steps=1, warmup_steps=0, use_cpu=True,
                  disable_tqdm=True, report_to="none")
    train_bgrpo(TrainConfig(**config), problems[:8], problems[8:])
    for changed, setting in (((problems[:7], problems[8:]), "problems"), ((problems[:8], problems[9:]), "held_out")):
        with pytest.raises(ValueError, match=f"{setting}=given has another content"):
            train_bgrpo(TrainConfig(**config, resume=True), *changed)
    train_bgrpo(TrainConfig(**config, resume=True), problems[:8], problems[8:])


def test_batches_keep_their_size_on_another_number_of_processes(tmp_path, monkeypatch):
    config = dict(per_device_train_batch_size=12, output_dir=str(tmp_path / "run"))
    with open_run(tmp_path / "run", config): pass
    checkpoint_at(tmp_path / "run", 4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="give --per_device_train_batch_size 6"):
        with open_run(tmp_path / "run", config, resume=True): pass
    with open_run(tmp_path / "run", config | dict(per_device_train_batch_size=6), resume=True): pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match="per_device_train_batch_size=24"):
        with open_run(tmp_path / "run", config | dict(per_device_train_batch_size=24), resume=True): pass


# 5. Checkpoints

def checkpoint_at(folder, step, sealed=True):
    "Files with the names and formats of a checkpoint"
    from safetensors.torch import save_file
    where = Path(folder) / f"checkpoint-{step}"
    where.mkdir(parents=True)
    save_file({"w": torch.ones(50)}, where / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "pending_0_of_1.pt"): torch.save({"x": torch.ones(9)}, where / name)
    (where / "config.json").write_text("{}")
    state = where / "trainer_state.json"
    state.write_text(json.dumps({"global_step": step}))
    if sealed: ck.seal(where, state)
    return where


PARTS = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def damage(path, how):
    if how == "missing": path.unlink()
    elif how == "empty": path.write_bytes(b"")
    elif how == "truncated": path.write_bytes(path.read_bytes()[:-20])
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "changed"])
@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_part_leads_to_the_checkpoint_before(run, part, how):
    damage(run / "checkpoint-6" / part, how)
    config = read_config(SupervisedConfig, ["--output_dir", str(run), "--resume"], "bgrpo sft")
    with pytest.warns(UserWarning, match="checkpoint-6 is ignored.*continues from checkpoint-4"):
        with open_run(run, config.to_dict(), resume=True) as checkpoint: assert checkpoint.name == "checkpoint-4"
    assert [p.name for p in ck.checkpoint_folders(run)] == ["checkpoint-2", "checkpoint-4"]
    assert (run / "damaged-6").exists() == ((run / "damaged-6/trainer_state.json").exists())


@pytest.mark.parametrize("how", ["empty", "truncated"])
@pytest.mark.parametrize("part", PARTS)
def test_without_a_seal_what_can_be_found_out_is(tmp_path, part, how):
    checkpoint_at(tmp_path, 2, sealed=False)
    damage(checkpoint_at(tmp_path, 4, sealed=False) / part, how)
    with pytest.warns(UserWarning, match="checkpoint-4 is ignored"): assert ck.newest_checkpoint(tmp_path).name == "checkpoint-2"


def test_all_damaged_is_one_message_that_names_each(tmp_path):
    (checkpoint_at(tmp_path, 2) / "optimizer.pt").unlink()
    (checkpoint_at(tmp_path, 4) / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="checkpoint-4: model.safetensors is missing; checkpoint-2: optimizer.pt is missing"):
        ck.newest_checkpoint(tmp_path)


def test_a_number_in_the_state_cannot_change_silently(run):
    "Among the log lines or elsewhere, the JSON stays valid and the step is right"
    path = run / "checkpoint-6/trainer_state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"best_metric": 0.5}, indent=2, sort_keys=True) + "\n")
    assert ck.why_not_resume(run / "checkpoint-6").startswith("trainer_state.json has")
    path.write_text(path.read_text()[:-1])
    assert "trainer_state.json" in ck.why_not_resume(run / "checkpoint-6")


def test_what_cannot_be_resumed_can_be_started_anew(run):
    "The hashes of all checkpoints are wrong, their sizes are right; they are kept aside"
    for checkpoint in ck.checkpoints(run): damage(checkpoint / "model.safetensors", "changed")
    config = read_config(SupervisedConfig, ["--output_dir", str(run)], "bgrpo sft").to_dict()
    (run / "result.json").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match="no whole checkpoint.*leave out --resume"):
        with open_run(run, config, resume=True): pass
    with open_run(run, config) as checkpoint: assert checkpoint is None
    assert sorted(p.name for p in run.glob("*-[0-9]")) == ["damaged-2", "damaged-4", "damaged-6"]


def test_the_library_resumes_from_no_damaged_checkpoint(run):
    damage(run / "checkpoint-6/optimizer.pt", "changed")
    with pytest.raises(ValueError, match="the content of optimizer.pt has changed; name another checkpoint"):
        ck.checkpoint_of(str(run / "checkpoint-6"), run)
    with pytest.warns(UserWarning, match="checkpoint-6 is ignored"): assert ck.checkpoint_of(True, run).name == "checkpoint-4"
    assert ck.checkpoint_of(run / "checkpoint-4", run) == run / "checkpoint-4" and ck.checkpoint_of(None, run) is None


def test_a_resumed_run_with_a_damaged_checkpoint_ends_like_the_whole_one(run, begun):
    "Six steps in one go, and steps 5 and 6 again from the checkpoint at 4"
    damage(run / "checkpoint-6/optimizer.pt", "truncated")
    with pytest.warns(UserWarning, match="optimizer.pt has"):
        train_policy(read_config(SupervisedConfig, ["--output_dir", str(run), "--resume"], "bgrpo sft"))
    assert (run / "policy/model.safetensors").read_bytes() == (begun / "policy/model.safetensors").read_bytes()
    assert ck.why_not_resume(run / "checkpoint-6") is None


# 8. Settings

def known(name, cls=TrainConfig): return settings_of(cls)[name]


@pytest.mark.parametrize("name,given", [(n, g) for n, values in {
    "max_steps": [0, -1, 1.5, True, [3], {"a": 1}, "many", "3_2", ".inf", "nan", ""], "learning_rate": ["nan", "inf", float("nan"), float("inf"), -1e-5, [1e-5], "", False],
    "num_generations": [1, 100_000, "1e5"], "num_beams": [0, 100_000], "held_out": [-1, "0.5"], "seed": [-1, 2**32, "3_2", 1e300], "canonical_": [],
    "use_cpu": ["maybe", 2, [True]], "hard_fraction": [1.5, -0.1], "degrees": [["3_2"], True], "model": [None], "adam_beta1": [1.5], "save_steps": [-1],
}.items() for g in values])
def test_a_value_that_cannot_be_meant_is_refused(name, given):
    with pytest.raises(ValueError, match=f"^{name}"): read_value(known(name), given)


@pytest.mark.parametrize("name,given,meant", [
    ("max_steps", "12", 12), ("max_steps", None, None), ("learning_rate", "1e-4", 1e-4), ("learning_rate", 1, 1.0), ("bf16", "false", False), ("use_cpu", "True", True),
    ("degrees", "3_2", "3_2"), ("report_to", "none", ["none"]), ("report_to", [], []), ("save_steps", 0.5, 0.5), ("save_total_limit", None, None)])
def test_a_value_is_read_as_it_was_meant(name, given, meant):
    found = read_value(known(name), given)
    assert found == meant and type(found) is type(meant)


@pytest.mark.parametrize("text,says", [
    ("max_steps: 3\nmax_steps: 4", "twice"), ("max_steps: " + "[" * 3000, "nested too deeply"), ("[1, 2]", "name: value"), ("1: 2", "no name"), ("max_stepz: 3", "did you mean max_steps"),
    ("max_steps: 0", "whole number of 1 or more"), ("max_steps: -1", "1 or more"), ("learning_rate: .nan", "number from 0 to 1000"), ("num_generations: 100000", "from 2 to 10000"),
    ("seed: 3_2", "whole number"), ("beam_width: 4\nnum_generations: 5", "keep one"), ("use_beam: 3", "true or false"), ("max_steps: {a: 1}", "cannot be read"),
    ("a: !!python/object/apply:os.system ['touch hacked']", "no YAML"), ("learning_rate:", ""), ("model:", "is empty")])
def test_a_file_of_settings_is_read_strictly(text, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text)
    if text == "learning_rate:":
        says = "is empty"
    with pytest.raises(Fault, match=says): read_config(TrainConfig, ["--config", "c.yaml"], "bgrpo train")
    assert not (tmp_path / "hacked").exists()


def test_degrees_in_a_file_are_degrees(tmp_path):
    (tmp_path / "c.yaml").write_text("degrees: 3_2\n")
    assert read_config(TrainConfig, ["--config", str(tmp_path / "c.yaml"), "--use_cpu"], "bgrpo train").degrees == "3_2"
    assert read_config(SupervisedConfig, ["--config", str(tmp_path / "c.yaml"), "--use_cpu"], "bgrpo sft").degrees == ["3_2"]


@pytest.mark.parametrize("config", [SupervisedConfig, TrainConfig])
@pytest.mark.parametrize("flags,says", [
    (["--lr_scheduler_kwargs", "foo"], "lr_scheduler_kwargs=foo cannot be read; use a map"),
    (["--lr_scheduler_type", "linear", "--lr_scheduler_kwargs", '{"min_lr_rate": 0.1}'], "has 'min_lr_rate', which lr_scheduler_type=linear does not take; it takes: none"),
    (["--lr_scheduler_type", "constant", "--lr_scheduler_kwargs", '{"power": 2}'], "has 'power', which lr_scheduler_type=constant"),
    (["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", "{}"], "it takes: num_cycles, min_lr, min_lr_rate"),
    (["--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs", '{"power": "high"}'], "it takes: lr_end, power"),
    (["--lr_scheduler_type", "reduce_lr_on_plateau", "--lr_scheduler_kwargs", '{"patient": 3}'], "patient")])
def test_arguments_that_do_not_fit_the_scheduler(config, flags, says):
    with pytest.raises(ValueError) as error: read_config(config, ["--use_cpu", "true", *flags], "bgrpo x")
    assert says in str(error.value) and len(str(error.value).splitlines()) == 1, error.value


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "cosine_with_restarts"])
def test_every_scheduler_is_had_without_arguments(kind):
    for config in (SupervisedConfig, TrainConfig): assert not config(use_cpu=True, lr_scheduler_type=kind).lr_scheduler_kwargs
    assert SupervisedConfig(use_cpu=True).lr_scheduler_kwargs == {"min_lr_rate": 0.02}


@pytest.mark.parametrize("settings", [dict(max_steps=0), dict(max_steps=-1), dict(learning_rate=float("nan")), dict(num_beams=100_000), dict(sample_temperature=0.0), dict(held_out=-3), dict(seed=-1)])
def test_the_same_ranges_hold_for_configs_made_in_python(settings):
    name, = settings
    with pytest.raises(ValueError, match=f"{name}=.*out of range"): TrainConfig(use_cpu=True, **settings)


def test_every_own_number_has_a_range():
    for cls in (TrainConfig, SupervisedConfig, BGRPOConfig):
        for name in cls.__annotations__: assert not known(name, cls).range or known(name, cls).low is not None, name


def test_sweeps_and_trainings_read_yaml_alike():
    assert parse_yaml("a: 3_2\nb: 1e-5\nc: 007\nd: '5'") == {"a": "3_2", "b": 1e-5, "c": "007", "d": "5"}


# 6. Signals

def test_signals_reach_the_handler_and_ignored_ones_stay_ignored():
    heard, before = [], signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handled(heard.append):
            for number in (signal.SIGTERM, signal.SIGHUP): os.kill(os.getpid(), number)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert heard == [signal.SIGTERM]
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with handled(heard.append): os.kill(os.getpid(), signal.SIGHUP)
        assert heard == [signal.SIGTERM, signal.SIGHUP]
    finally: signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_closes_says_so_twice():
    "Shell and system both send SIGHUP: a second one is no second wish"
    heard, before = [], signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with handled(heard.append):
            for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP): os.kill(os.getpid(), number)
        with StopCleanly() as stop:
            for _ in range(2): os.kill(os.getpid(), signal.SIGHUP)
        assert heard == [signal.SIGHUP, signal.SIGTERM] and stop.asked
    finally: signal.signal(signal.SIGHUP, before)


TWICE = """
import os, signal, sys, time
import bgrpo_nb.cli as cli
def stops_slowly(argv):
    try: os.kill(os.getpid(), signal.SIGINT)
    finally: at_work()
def ends_slowly(argv):
    import atexit
    atexit.register(at_work)
def at_work():
    print("at work", flush=True)
    sum(range(10**12)) # one operation, which no handler of Python's interrupts
cli.COMMANDS["generate"] = globals()[sys.argv.pop()], ""
sys.exit(cli.main())
"""


@pytest.mark.parametrize("command", ["stops_slowly", "ends_slowly"])
def test_a_second_signal_ends_a_command_within_a_long_operation(command, tmp_path):
    (tmp_path / "command.py").write_text(TWICE)
    running = subprocess.Popen([sys.executable, "command.py", "generate", command], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=PLAIN)
    assert running.stdout.readline() == "at work\n"
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=900)
    assert running.returncode == -signal.SIGINT and not err


def test_a_second_signal_ends_a_training_within_a_step(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("bgrpo_nb.base.signals._a_command", True)
    try:
        with StopCleanly() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.asked and signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL, "while it saves, too"
    finally: signal.signal(signal.SIGINT, before)


def test_no_second_signal_ends_a_kernel():
    "In a notebook, and in these tests, it stops the training alone"
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopCleanly():
        for _ in range(2): os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_command_that_a_signal_stops_says_so(monkeypatch, capsys):
    import bgrpo_nb.cli as cli
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        def wait(argv, number=number):
            os.kill(os.getpid(), number)
            time.sleep(5)
        monkeypatch.setitem(cli.COMMANDS, "generate", (wait, ""))
        status, err = said(capsys, "generate")
        assert (status, err) == (128 + number, "bgrpo: stopped")


def test_stopping_twice_says_so(monkeypatch, capsys):
    import bgrpo_nb.cli as cli
    def interrupted(argv): raise KeyboardInterrupt
    monkeypatch.setitem(cli.COMMANDS, "generate", (interrupted, ""))
    assert said(capsys, "generate") == (130, "bgrpo: stopped")


def test_evaluate_says_how_to_continue(monkeypatch, tmp_path, capsys):
    from bgrpo_nb.solve import test_sets
    write_problems(tmp_path / "p.txt", generate_problems(4, 2, 2, seed=3))
    def wait(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    monkeypatch.setattr(test_sets, "evaluate_files", wait)
    status, err = said(capsys, "evaluate", "--problems", tmp_path / "p.txt", "--out", tmp_path / "e")
    assert status == 143 and "the same command continues" in err


def test_a_closed_terminal_stops_a_training_which_saves(tmp_path, policy):
    "The terminal is a pseudo-terminal; closing it sends SIGHUP, and printing to it then fails"
    write_problems(tmp_path / "p.txt", generate_problems(60, 2, 2, seed=50))
    flags = SFT | dict(max_steps=20000, save_steps=100000, eval_steps=100000, model=policy, problems="p.txt", output_dir="run", disable_tqdm="false")
    words = [*BGRPO, "sft", *(f"--{k}={v}" for k, v in flags.items() if v is not None)]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execvpe(words[0], words, PLAIN)
    metrics, end = tmp_path / "run/metrics.jsonl", time.time() + 900
    while time.time() < end and not (metrics.exists() and metrics.read_text().count("\n") > 3): time.sleep(0.05)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert len(ck.checkpoints(tmp_path / "run")) == 1


# 7. W&B

def test_an_error_of_wandb_is_a_warning():
    class Broken:
        calls = 0
        def on_log(self, *args, **kwargs):
            Broken.calls += 1
            raise OSError("no space left")
    guarded = Guarded(Broken())
    with pytest.warns(UserWarning, match="no space left.*continues without it"): guarded.on_log()
    guarded.on_log()
    assert Broken.calls == 1


@pytest.mark.parametrize("error", [OSError("read-only"), RuntimeError("the service ended"), ValueError("x")])
def test_a_training_whose_wandb_cannot_start_goes_without(error, monkeypatch):
    import types
    from bgrpo_nb.recipes import wandb_logging
    def broken(folder): raise error
    monkeypatch.setattr(wandb_logging, "start_wandb", broken)
    config = types.SimpleNamespace(report_to=["wandb"], output_dir="x", run_name=None, project="huggingface")
    with pytest.warns(UserWarning, match="cannot be used"):
        with at_wandb(config) as summary: summary["done"] = True
    assert config.report_to == []


GUARD = """
import socket, sys
def refuse(*a, **k):
    print("NETWORK", a, file=sys.stderr, flush=True)
    raise OSError("no network in this test")
socket.getaddrinfo = refuse
_connect = socket.socket.connect
def connect(self, address):
    if self.family != socket.AF_UNIX and not str(address[0]).startswith("127."): refuse(address)
    return _connect(self, address)
socket.socket.connect = connect
from bgrpo_nb.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("report", ["none", "wandb"])
def test_nobody_logged_in_no_network(report, policy, tmp_path):
    "The whole command, where looking up a name would be seen"
    write_problems(tmp_path / "p.txt", generate_problems(12, 2, 2, seed=50))
    flags = dict(model=policy, problems="p.txt", output_dir="run", prompts_per_step=2, num_generations=3, max_steps=1, held_out=0, max_completion_length=4, use_cpu="true", report_to=report)
    home = {k: v for k, v in PLAIN.items() if not k.startswith("HF_")} | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", GUARD, "train", *(f"--{k}={v}" for k, v in flags.items())], cwd=tmp_path, env=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "NETWORK" not in done.stderr, [line for line in done.stderr.splitlines() if "NETWORK" in line]


# 10. One line, never a traceback

def test_what_nobody_foresaw_is_one_line_and_a_file(monkeypatch, capsys):
    import bgrpo_nb.cli as cli
    def broken(argv): raise ZeroDivisionError("a bug\nof two lines")
    monkeypatch.setitem(cli.COMMANDS, "generate", (broken, ""))
    status, err = said(capsys, "generate")
    assert status == 1 and len(err.splitlines()) == 1 and "ZeroDivisionError" in err
    kept = Path(err.split()[-1])
    assert "in broken" in kept.read_text()
    kept.unlink()


def test_a_closed_pipe_and_an_ascii_terminal(tmp_path):
    done = subprocess.run(f"{' '.join(BGRPO)} train --help | head -1", shell=True, capture_output=True, text=True, env=PLAIN)
    assert done.stdout.startswith("usage") and not done.stderr
    done = subprocess.run([*BGRPO, "--help"], capture_output=True, text=True, env=PLAIN | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    assert done.returncode == 0 and not done.stderr
    code = "from bgrpo_nb.cli import main, COMMANDS\nCOMMANDS['demo'] = (lambda argv: print('3∘2'), '')\nmain(['demo'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=PLAIN | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "3\\u22182" in done.stdout


@pytest.mark.parametrize("line,says", [
    ("demo --output_dir file.txt", "is a file"), ("convert x.pt out --n_head 0", "from 1"), ("convert x.pt out --n_head -2", "from 1"), ("demo --steps 0", "from 1"),
    ("generate o.txt --n 1_0", "whole number"), ("evaluate --problems p.txt --num_beams 100000", "from 1 to 10000"), ("plot deep", "was not written by"), ("generate loop", "loop")])
def test_one_line(line, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("x")
    Path("loop").symlink_to("loop")
    write_text("deep/results.json", "[" * 100_000)
    status, err = said(capsys, *line.split())
    assert status == 2 and len(err.splitlines()) == 1 and says in err, err


@pytest.mark.parametrize("line", [
    "evaluate --model loop --problems p.txt", "evaluate --problems loop", "evaluate --problems p.txt --out loop", "filter --problems loop --out x", "plot loop",
    "filter --problems p.txt --out loop", "analyze loop", "sweep loop", "sweep s.yaml --output_dir loop", "train --config loop", "train --problems loop",
    "train --problems p.txt --output_dir loop", "sft --problems loop", "sft --output_dir loop/a", "convert loop out", "convert p.txt loop/a", "demo --output_dir loop"])
def test_a_link_to_itself_is_one_line_wherever_it_is_named(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    said(capsys, "generate", "p.txt", "--n", "60")
    write_text("s.yaml", "program: p.txt\nmethod: grid\nmetric: {name: x, goal: maximize}\nparameters: {x: {values: [1]}}\n")
    status, err = said(capsys, *line.split())
    assert status == 2 and len(err.splitlines()) == 1 and "loop" in err and "should not happen" not in err, err


def test_where_a_file_cannot_be_made_is_found_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file, where a folder is needed"): check_new_file(tmp_path / "file/a/b.txt")
    with pytest.raises(FileExistsError, match="--overwrite"): check_new_file(tmp_path / "file")
    check_new_file(tmp_path / "file", overwrite=True)
    check_new_file(tmp_path / "new/deep/b.txt")
    (tmp_path / "locked").mkdir(mode=0o500)
    if os.geteuid():    # root may write anywhere
        with pytest.raises(PermissionError, match="cannot be written"): check_new_file(tmp_path / "locked/b.txt")


def test_kept_lines_that_hold_no_record_are_left_out(tmp_path):
    from bgrpo_nb.solve.result_store import ResultStore
    store = ResultStore(tmp_path, model="m")
    with store.open("beams", width=2) as results: results.add({0: {"a": 1}, 1: {"a": 2}})
    file, = tmp_path.glob("*.jsonl")
    file.write_text(file.read_text() + "[1, 2]\n" + "[" * 50_000 + "\n" + '{"a": 3}\n')
    with store.open("beams", width=2) as results: assert results.found == {0: {"a": 1}, 1: {"a": 2}}


def test_locks_and_warnings_leave_no_trace(tmp_path):
    claim_folder(tmp_path / "a", "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with locked(tmp_path / "a"): pass


def test_a_readme_of_somebodys_stays(tmp_path, policy):
    "TRL writes a README.md into the run's folder with every checkpoint"
    from bgrpo_nb.recipes.train import train_bgrpo
    claim_folder(tmp_path / "run", "run")
    (tmp_path / "run/README.md").write_text("my notes")
    flags = dict(num_problems=12, prompts_per_step=2, num_generations=3, max_steps=1, held_out=0, max_completion_length=4, use_cpu=True, report_to="none", disable_tqdm=True)
    train_bgrpo(TrainConfig(output_dir=str(tmp_path / "run"), model=str(policy), **flags))
    assert (tmp_path / "run/README.md").read_text() == "my notes" and (tmp_path / "run/policy/config.json").exists()


def test_an_error_has_a_line_of_its_own_below_the_progress_bar(capsys):
    from bgrpo_nb.recipes.callbacks import Progress, run_steps
    bar = Progress(["loss"])
    class Failing:
        callback_handler = type("Handler", (), dict(callbacks=[bar]))
        def train(self, resume_from_checkpoint):
            state = type("State", (), dict(is_world_process_zero=True, max_steps=8, global_step=0))
            bar.on_train_begin(None, state, None)
            raise OSError("the disk is full")
    with pytest.raises(OSError, match="full"): run_steps(Failing())
    assert bar.bar.disable and capsys.readouterr().err.endswith("\n")


def test_a_run_that_was_killed_after_its_last_step_takes_no_other(policy, tmp_path):
    "Between the last checkpoint and the policy"
    import shutil
    folder = tmp_path / "run"
    flags = dict(model=policy, degrees="2_2", num_problems=30, held_out=0, max_steps=2, save_steps=1, prompts_per_step=4,
                 num_generations=4, max_completion_length=8, report_to="none", disable_tqdm="true", output_dir=folder)
    assert main(["train", *(f"--{name}={value}" for name, value in flags.items())]) in (0, None)
    whole = (folder / "policy/model.safetensors").read_bytes()
    shutil.rmtree(folder / "policy")
    assert main(["train", "--resume", "--output_dir", str(folder)]) in (0, None)
    assert (folder / "policy/model.safetensors").read_bytes() == whole
    assert json.loads((folder / "result.json").read_text())["step"] == 2
    assert (folder / "metrics.jsonl").read_text().count('"loss"') == 2


@pytest.mark.parametrize("command, config_class, other", [("train", TrainConfig, "sft"), ("sft", SupervisedConfig, "train")])
def test_a_run_of_another_command_is_named_before_its_settings_are_read(tmp_path, command, config_class, other):
    own = dict(sft="vocabulary: compact", train="rollout: beam")[other]
    (tmp_path / "config.yaml").write_text(own + "\ndegrees: [2_2]\n")
    with pytest.raises((ValueError, Fault), match=f"holds a run of bgrpo {other}; resume it with that command"):
        read_config(config_class, ["--output_dir", str(tmp_path), "--resume"], f"bgrpo {command}")
