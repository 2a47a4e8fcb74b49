"Supervised training: it learns, a resumed run ends like an unbroken one, and a wrong setting is one clear error."
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bgrpo_nb.recipes import sft
from bgrpo_nb.algebra.problems import (
    Problem, generate_multivariate, generate_problems, highest_first, polynomial_key, write_problems)
from bgrpo_nb.search.generation import greedy
from bgrpo_nb.policy.loading import known_to
from bgrpo_nb.policy.model import decode_completions, encode, load_model, load_tokenizer, new_model, save_model
from bgrpo_nb.algebra.polynomial import canonical_inner, verify
from bgrpo_nb.base.ownership import claim_folder
from bgrpo_nb.base.run_folder import checkpoints, read_metrics, newest_checkpoint
from bgrpo_nb.recipes.callbacks import StopCleanly
from bgrpo_nb.recipes.flags import read_config
from bgrpo_nb.recipes.samples import (
    Batches, ProblemStream, SampleBlocks, bucketed_order, collate, default_workers, for_last_columns, in_order,
    make_samples)
from bgrpo_nb.recipes.sft import SupervisedConfig, train_policy


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    "A new policy of two layers"
    model = new_model("tiny", seed=0, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    return save_model(model, load_tokenizer("single"), tmp_path_factory.mktemp("start"))


@pytest.fixture
def config(start, tmp_path):
    "Settings of a run of seconds; a call changes some"
    def make(name="run", **changes):
        bound = {} if changes.get("problems") else dict(coefficient_bound=2)   # of generated problems
        common = dict(model=str(start), max_steps=24, per_device_train_batch_size=16, held_out=16,
                      warmup_steps=4, learning_rate=4e-3, logging_steps=1, eval_steps=12, save_steps=8,
                      disable_tqdm=True, bf16=False)
        return SupervisedConfig(str(tmp_path / name), **common | bound | changes)
    return make


def weights(folder): return load_model(folder, device="cpu").state_dict()


def figures(folder):
    "Logged rows, without what a clock decides"
    rows = [row for row in read_metrics(f"{folder}/metrics.jsonl") if "train_runtime" not in row]
    def timed(name): return any(word in name for word in ("runtime", "per_second", "wait_share"))
    return [{k: v for k, v in row.items() if not timed(k)} for row in rows]


def samples_of(config, tokenizer):
    "The samples of a run in the order of training"
    return [sample for block in make_samples(config, tokenizer)[0] for sample in block]


def at_step(monkeypatch, step, act):
    "Do something once in the middle of training, as a user or a machine would"
    log = sft.RunLog.on_log
    def on_log(self, args, state, control, **kwargs):
        log(self, args, state, control, **kwargs)
        if state.global_step == step and "loss" in kwargs["logs"]: act()
    monkeypatch.setattr(sft.RunLog, "on_log", on_log)


def test_a_policy_learns(config):
    run = config(max_steps=150, coefficient_bound=3, per_device_train_batch_size=64, held_out=64,
                 logging_steps=10, eval_steps=75, save_steps=75, learning_rate=6e-3)
    result = train_policy(run)
    losses = [row["loss"] for row in figures(run.output_dir) if "loss" in row]
    assert len(losses) == 15 and losses[-1] < 0.3 * losses[0]
    assert json.loads(open(f"{run.output_dir}/result.json").read()) == json.loads(json.dumps(result, default=str))
    assert (result["step"], result["samples"], result["stopped"]) == (150, 9600, False)
    model, tokenizer = load_model(f"{run.output_dir}/policy", device="cpu"), load_tokenizer(f"{run.output_dir}/policy")
    held_out = make_samples(run, tokenizer)[1]
    enc = encode(tokenizer, [p.prompt for p in held_out])
    found = greedy(model, enc.input_ids, enc.attention_mask, max_new_tokens=24,
                   eos_token_id=tokenizer.eos_token_id, pad_token_id=0).sequences[:, 0]
    share = np.mean([text == p.answer for text, p in zip(decode_completions(tokenizer, found), held_out)])
    assert result["eval_exact_match"] == pytest.approx(share), "validation agrees with greedy decoding"
    assert share > 0.05


def test_a_policy_says_what_it_was_trained_on(config, tmp_path):
    whole, file = ["2_2", "3_2", "2_2"], tmp_path / "mine.txt"
    train_policy(config("new", model=None, preset="tiny", degrees=whole, max_steps=1, eval_strategy="no"))
    known = [dict(kind="univariate", degrees="2_2,3_2", variables=3)]
    assert known_to(tmp_path / "new/policy") == known
    write_problems(file, generate_problems(80, 2, 3))
    train_policy(config("file", model=str(tmp_path / "new/policy"), problems=str(file), max_steps=1, eval_strategy="no"))
    assert known_to(tmp_path / "file/policy") == known        # a file may hold anything
    train_policy(config("unknown", max_steps=1, eval_strategy="no"))
    assert known_to(tmp_path / "unknown/policy") == []        # its start does not say


def test_an_interrupted_run_ends_like_an_unbroken_one(config, monkeypatch):
    whole, halted, torn = config("whole"), config("halted"), config("torn")
    train_policy(whole)
    with monkeypatch.context() as m:
        at_step(m, 13, lambda: os.kill(os.getpid(), signal.SIGINT))
        result = train_policy(halted)
    assert result["stopped"] and result["step"] in (13, 14)
    assert newest_checkpoint(halted.output_dir).name == f"checkpoint-{result['step']}"
    assert not os.path.exists(f"{halted.output_dir}/result.json") and not os.path.exists(f"{halted.output_dir}/policy")

    class Killed(Exception): pass
    def kill(): raise Killed
    with monkeypatch.context() as m, pytest.raises(Killed):
        at_step(m, 21, kill)
        train_policy(torn)
    shutil.copytree(f"{torn.output_dir}/checkpoint-16", f"{torn.output_dir}/checkpoint-20")
    os.remove(f"{torn.output_dir}/checkpoint-20/trainer_state.json")  # it is written last
    with open(f"{torn.output_dir}/metrics.jsonl", "a") as file: file.write('{"step": 22, "lo')
    assert [p.name for p in checkpoints(torn.output_dir)] == ["checkpoint-8", "checkpoint-16"]

    expected, end = figures(whole.output_dir), weights(f"{whole.output_dir}/policy")
    assert [row["step"] for row in expected if "loss" in row] == list(range(1, 25))
    tokenizer, model = load_tokenizer("single"), load_model(whole.model, device="cpu")
    samples = samples_of(whole, tokenizer)
    with torch.no_grad(): first = model(**collate(samples[:16], tokenizer.pad_token_id)).loss.item()
    assert expected[0]["loss"] == pytest.approx(first, abs=1e-5), "samples are seen in their order"
    for broken in ("halted", "torn"):
        again = train_policy(config(broken, resume=True))
        assert (again["step"], again["stopped"]) == (24, False)
        found = weights(f"{config(broken).output_dir}/policy")
        assert found.keys() == end.keys() and all(torch.equal(found[k], end[k]) for k in end)
        assert figures(config(broken).output_dir) == expected


def test_ctrl_c_twice_ends_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopCleanly() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second Ctrl-C did nothing")
    assert signal.getsignal(signal.SIGINT) is before


def test_the_loss_is_the_answers_alone(start):
    model, tokenizer = load_model(start, device="cpu"), load_tokenizer("single")
    problems = generate_problems(6, 2, 2, seed=1) + generate_problems(2, 3, 2, seed=1)
    batch = collate(list(ProblemStream(problems, tokenizer)), tokenizer.pad_token_id)
    losses = []
    for p in problems:
        prompt, answer = (tokenizer.convert_tokens_to_ids(text.split()) for text in (p.prompt, p.answer + " ⁇"))
        with torch.no_grad(): logp = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        losses += [-logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)]
    with torch.no_grad(): assert model(**batch).loss.item() == pytest.approx(np.mean(losses), abs=1e-5)


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(st.lists(st.integers(1, 300), max_size=200), st.integers(1, 8), st.integers(0, 3))
def test_buckets_are_a_permutation_of_like_lengths(lengths, batch_size, seed):
    order = bucketed_order(lengths, batch_size, seed, window=4)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    for start in range(0, len(lengths), 4 * batch_size):  # no batch of a window reaches into the lengths of another
        window = [lengths[i] for i in order[start:start + 4 * batch_size]]
        spans = sorted((min(b), max(b)) for b in (window[i:i + batch_size] for i in range(0, len(window), batch_size)))
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))


def keys(problems): return {polynomial_key(p.expanded) for p in problems}


def read_back(blocks, tokenizer):
    "Problems of a run"
    rows = [row for block in blocks for row in block.rows]
    texts = [" ".join(tokenizer.convert_ids_to_tokens(row.tolist())) for row in rows]
    return [Problem(*text.removesuffix(" ⁇").split(" ⁇ ")) for text in texts]


def test_held_out_problems_never_come_up_in_training(config, tmp_path):
    tokenizer = load_tokenizer("single")
    fresh, held_out = make_samples(config(max_steps=40, degrees=["2_2", "3_2"]), tokenizer)
    made = read_back(fresh, tokenizer)
    assert len(made) == 640 and len(held_out) == 16 and not keys(made) & keys(held_out)
    problems = generate_problems(40, 2, 2, seed=1)
    turned = [Problem(f"+ {p.expanded} P 0", p.answer) for p in problems]
    path = write_problems(tmp_path / "mine.txt", problems + turned)
    stream, held_out = make_samples(config(problems=str(path)), tokenizer)
    assert not keys(read_back(stream, tokenizer)) & keys(held_out), "the file has each polynomial in two forms"
    for p in read_back(stream, tokenizer) + held_out:
        assert p.answer == highest_first(canonical_inner(p.answer)) and verify(p.expanded, p.answer)
    rising, _ = make_samples(config(problems=str(path), descending=False), tokenizer)
    assert all(p.answer == canonical_inner(p.answer) for p in read_back(rising, tokenizer))


def test_several_variables(config):
    tokenizer = load_tokenizer("compact_multi")
    run = config(max_steps=4, kind="multivariate", degrees=["2_2"], vocabulary="compact_multi", model=None)
    stream, held_out = make_samples(run, tokenizer)
    made = read_back(stream, tokenizer)
    assert len(made) == 64 and not keys(made) & keys(held_out)
    for p in made + held_out:
        assert verify(p.expanded, p.answer)
        assert all(part == canonical_inner(part) for part in p.answer.split(" & ")[1:])


def no_answers(path): return write_problems(path, [Problem("^ a P 4", "")] * 20)
def several_variables(path): return write_problems(path, generate_multivariate(40))
def too_few(path): return write_problems(path, generate_problems(16, 2, 2))
def all_the_same(path): return write_problems(path, generate_problems(1, 2, 2) * 40)


@pytest.mark.parametrize("make,fault", [
    (no_answers, "20 problems without an answer"), (several_variables, "not in this vocabulary"),
    (too_few, "lower --held_out"), (all_the_same, "lower --held_out"),
    (lambda path: path, "there is no file")])
def test_a_file_that_cannot_be_learnt_from(config, tmp_path, make, fault):
    with pytest.raises((ValueError, FileNotFoundError), match=fault) as error:
        train_policy(config(problems=str(make(tmp_path / "mine.txt"))))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes,fault", [
    (dict(degrees=["2-2"]), "3_2"), (dict(degrees=["1_2"]), "2 or more"),
    (dict(preset="huge"), "tiny, small or paper|tiny, small, paper"),
    (dict(max_steps=0), "1 or more"), (dict(weights_dtype="float16"), "float32, bfloat16"),
    (dict(coefficient_bound=0), "1 or more"),
    (dict(coefficient_bound=1), "distinct problems"), (dict(model="nowhere"), "no model at nowhere"),
    (dict(resume=True), "leave out --resume"),
    (dict(vocabulary="double", model=None), "'single', 'multi', 'compact', 'compact_multi'")])
def test_a_wrong_setting(config, changes, fault):
    with pytest.raises((ValueError, OSError), match=fault) as error: train_policy(config(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words,fault", [
    ("--model tiny --preset paper", "preset=paper is of a new policy"),
    ("--model tiny --vocabulary multi", "vocabulary=multi is of a new policy"),
    ("--problems q.txt --degrees 4_4", "degrees=.*4_4.* is of generated problems"),
    ("--problems q.txt --kind multivariate", "kind=multivariate is of generated problems"),
    ("--problems q.txt --coefficient_bound 3", "coefficient_bound=3 is of generated problems"),
    ("--variables 4", "variables=4 is of multivariate problems"),
    ("--optim sgd", "optim=sgd .* use --optimizer adamw"), ("--optim_args lr=1", "optim_args=lr=1"),
    ("--resume_from_checkpoint s1/checkpoint-1", "resume_from_checkpoint=.* use --resume"),
    ("--num_train_epochs 7", "num_train_epochs=7.0 .* use max_steps"),
    ("--remove_unused_columns true", "remove_unused_columns=True must be off"), ("--data_seed 3", "use seed"),
    ("--dataloader_drop_last true", "all batches are whole")])
def test_a_setting_that_would_not_be_read(words, fault):
    with pytest.raises(ValueError, match=fault) as error: read_config(SupervisedConfig, words.split(), "bgrpo sft")
    assert "\n" not in str(error.value)


def test_a_setting_with_its_default_value_is_read(config, tmp_path):
    words = "--model tiny --preset tiny --vocabulary single --problems q.txt --degrees 2_2 --kind univariate --num_train_epochs 3 --remove_unused_columns false"
    assert read_config(SupervisedConfig, words.split(), "bgrpo sft").problems == "q.txt"
    adamw = read_config(SupervisedConfig, "--optimizer adamw --optim sgd".split(), "bgrpo sft")
    assert adamw.optim == "sgd"


def test_degrees_are_read_with_commas_or_spaces():
    for words in (["2_2,3_2"], ["2_2", "3_2"]):
        assert read_config(SupervisedConfig, ["--degrees", *words], "bgrpo sft").degrees == ["2_2", "3_2"]


def test_a_folder_that_is_taken(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="another --output_dir"): train_policy(config("file/run"))
    claim_folder(tmp_path / "run", "run")
    (tmp_path / "run/result.json").write_text("{}")
    with pytest.raises(FileExistsError, match="--resume"): train_policy(config())


# Samples while training runs

def batches_of(blocks, pad, workers): return list(in_order(Batches(blocks, partial(collate, pad_token_id=pad), workers)))


@pytest.mark.parametrize("source", ["generated", "file", "several variables"])
def test_samples_are_the_same_for_every_number_of_workers(config, tmp_path, source):
    tokenizer, more = load_tokenizer("compact_multi"), dict(degrees=["2_2", "3_2"], coefficient_bound=20)
    if source == "file": more = dict(problems=str(write_problems(tmp_path / "p.txt", generate_problems(150, 2, 2))))
    if source == "several variables": more |= dict(kind="multivariate", degrees=["2_2"])
    blocks, _ = make_samples(config(max_steps=100, per_device_train_batch_size=4, **more), tokenizer)
    one, *others = (batches_of(blocks, tokenizer.pad_token_id, workers) for workers in (0, 1, 2, 8))
    assert len(one) == 100 and all(len(batch["input_ids"]) == 4 for batch in one)
    for other in others:
        assert all(torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a)
    assert not multiprocessing.active_children(), "workers end with their iterator"


def test_a_block_follows_from_its_number(config):
    "Whatever was made before, and however long the run is"
    tokenizer = load_tokenizer("single")
    long, _ = make_samples(config(max_steps=200, per_device_train_batch_size=4), tokenizer)
    short, _ = make_samples(config(max_steps=96, per_device_train_batch_size=4), tokenizer)
    other, _ = make_samples(config(max_steps=96, per_device_train_batch_size=4, seed=1), tokenizer)
    third, rows = long[2].rows, [[row.tolist() for row in block.rows] for block in short]
    assert [row.tolist() for row in third] == rows[2] and rows[0] != rows[1] != rows[2]
    assert [row.tolist() for row in other[2].rows] != rows[2]


def test_processes_share_the_blocks(config):
    "Two processes see twice the samples of one, none of them twice, and their batches have like lengths"
    tokenizer, run = load_tokenizer("single"), config(max_steps=32, degrees=["2_2", "4_2"], coefficient_bound=20)
    blocks, _ = make_samples(run, tokenizer)
    parts = [SampleBlocks(blocks.problems, tokenizer, 32, 16, 0, process, 2)[0].rows for process in (0, 1)]
    assert not {row.tobytes() for row in parts[0]} & {row.tobytes() for row in parts[1]}
    widths = [[max(map(len, rows[i:i + 16])) for i in range(0, 512, 16)] for rows in parts]
    assert np.corrcoef(widths)[0, 1] > 0.95


def test_degrees_have_equal_shares(config):
    "Over any part of a run up to one, with blocks that the number of degrees does not divide"
    degrees = ["2_2", "3_2", "2_3", "3_2"]
    source = make_samples(config(max_steps=9, degrees=degrees, coefficient_bound=20), load_tokenizer("single"))[0].problems
    counts = {pair: sum(source.share(start, 10, pair) for start in range(0, 100, 10)) for pair in source.apart}
    assert counts == {(2, 2): 25, (3, 2): 50, (2, 3): 25}


def test_a_file_is_repeated_in_another_order(config, tmp_path):
    path = write_problems(tmp_path / "p.txt", generate_problems(30, 2, 2, canonical=True, descending=True))
    source = make_samples(config(problems=str(path), held_out=10), load_tokenizer("single"))[0].problems
    passes = [source(20 * i, 20) for i in range(3)]
    assert passes[0] != passes[1] != passes[2] and all(sorted(p) == sorted(passes[0]) for p in passes)
    assert source(13, 31) == (passes[0] + passes[1] + passes[2])[13:44]


def test_words_are_looked_up_as_the_tokenizer_splits_them():
    "All at once, also at odd white space; a word that is not in the vocabulary is left to the tokenizer"
    import random

    from bgrpo_nb.policy import model
    for name in ("single", "multi"):
        tokenizer, rng = load_tokenizer(name), random.Random(0)
        words, spaces = list(tokenizer.get_vocab()), [" ", "  ", "\t", "\n", "\x0b"]
        texts = ["".join(rng.choice(spaces) + rng.choice(words) for _ in range(rng.randrange(9))) for _ in range(300)]
        found = model._by_table(tokenizer.get_vocab(), texts)
        assert model._is_a_lookup(tokenizer) and found == tokenizer(texts, add_special_tokens=False).input_ids
        for odd in ("zz", "a\u00a0a", "a\x1ca", "a\x00", "\x00", "averylongword", "⁇⁇"):
            assert model._by_table(tokenizer.get_vocab(), ["P 1", odd]) is None, repr(odd)
        assert model._by_table(tokenizer.get_vocab(), ["", "P", ""]) == [[], [tokenizer.get_vocab()["P"]], []]


class Broken:
    def __init__(self, at): self.at = at
    def __call__(self, start, n):
        if start >= self.at: raise ValueError("there is no problem here")
        return generate_problems(n, 2, 2, seed=start)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_worker_is_one_line(workers):
    tokenizer = load_tokenizer("single")
    blocks = SampleBlocks(Broken(128), tokenizer, 64, 4)
    seen = iter(in_order(Batches(blocks, partial(collate, pad_token_id=0), workers)))
    for _ in range(32): next(seen)
    with pytest.raises(ValueError) as error: next(seen)
    assert str(error.value) == "there is no problem here" and not multiprocessing.active_children()


def test_a_run_outlives_its_workers():
    tokenizer = load_tokenizer("single")
    blocks, finish = SampleBlocks(Broken(10**9), tokenizer, 200, 4), partial(collate, pad_token_id=0)
    batches, expected = Batches(blocks, finish, 2), batches_of(blocks, 0, 0)
    seen = [batches[0]]
    for worker in multiprocessing.active_children(): worker.terminate()
    with pytest.warns(UserWarning, match="without workers from here on"):
        seen += [batches[k] for k in range(1, 200)]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(seen, expected, strict=True))


TIED = """
import os, signal, sys, time
from bgrpo_nb.base.processes import tie_to_parent
parent, ended = os.getpid(), sys.argv[1] == "ended"
if ended:
    parent = os.fork()
    if not parent: os._exit(0)
    if sys.argv[2] == "reaped": os.waitpid(parent, 0)
    else: time.sleep(0.2)
server = os.fork()
if not server:                                      # as multiprocessing's fork server, the default of Python 3.14
    worker = os.fork()
    if not worker:
        tie_to_parent(parent, signal.SIGKILL)
        os._exit(7)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) % 256)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(server, 0)[1]))
"""


@pytest.mark.parametrize("words, status", [(["runs", ""], 7), (["ended", "reaped"], 247), (["ended", "zombie"], 247)])
def test_a_worker_of_a_fork_server_lives_as_long_as_the_parent(words, status):
    assert subprocess.run([sys.executable, "-c", TIED, *words]).returncode == status


def test_the_default_number_of_workers(config, monkeypatch):
    from bgrpo_nb.recipes import samples
    assert config().dataloader_num_workers == 0 == default_workers(False), "on a CPU the cores train the policy"
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for cores, workers in ((1, 0), (2, 1), (8, 7), (64, 8)):
        monkeypatch.setattr(samples, "usable_cores", lambda: cores)
        assert default_workers(True) == workers
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert default_workers(True) == 3


def test_more_problems_than_there_are(config):
    "18 outer and 18 inner polynomials make 324 pairs"
    with pytest.raises(ValueError, match="at most 324 distinct problems .* the run asks for 400"):
        make_samples(config(coefficient_bound=1, max_steps=24), load_tokenizer("single"))


def test_waiting_is_logged_and_workers_are_obeyed(config, monkeypatch):
    started = []
    class Watched(Batches):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append((self.workers, self.how["prefetch_factor"]))
    monkeypatch.setattr(sft, "Batches", Watched)
    run = config(max_steps=4, dataloader_num_workers=2, dataloader_prefetch_factor=3)
    train_policy(run)
    rows = [row for row in read_metrics(f"{run.output_dir}/metrics.jsonl") if "loss" in row]
    assert started == [(2, 3)] and len(rows) == 4 and all(0 <= row["data/wait_share"] <= 1 for row in rows)


# The real command, killed

def sft_command(start, folder, *more):
    flags = dict(model=start, output_dir=folder, max_steps=60, coefficient_bound=3, per_device_train_batch_size=4,
                 held_out=8, logging_steps=1, eval_steps=40, save_steps=10, warmup_steps=4, bf16="false", use_cpu="true",
                 disable_tqdm="true")
    return [sys.executable, "-m", "bgrpo_nb", "sft", *(f"--{k}={v}" for k, v in flags.items()), *more]


def after_step(running, folder, step):
    path, end = Path(folder) / "metrics.jsonl", time.time() + 900
    def reached(): return path.exists() and any(row["step"] >= step for row in read_metrics(path) if "loss" in row)
    while time.time() < end and running.poll() is None and not reached(): time.sleep(0.02)
    assert running.poll() is None, running.communicate()


def workers_of(pid):
    found = [int(p) for task in Path(f"/proc/{pid}/task").glob("*/children") for p in task.read_text().split()]
    assert found
    return found


def gone(pids, seconds=900):
    def runs(pid):
        try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError: return False
    end = time.time() + seconds
    while time.time() < end and any(map(runs, pids)): time.sleep(0.05)
    return not any(map(runs, pids))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds workers in /proc")
def test_killed_and_continued_with_other_workers(start, tmp_path):
    "kill -9 with two workers, Ctrl-C of the whole group with one, the end with three: as without a break and with none"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    def begin(*more):
        return subprocess.Popen(sft_command(start, tmp_path / "cut", *more), env=env, text=True, start_new_session=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    straight = subprocess.run(sft_command(start, tmp_path / "straight", "--dataloader_num_workers=0"), env=env, text=True,
                              capture_output=True)
    assert straight.returncode == 0, straight.stderr[-2000:]
    first = begin("--dataloader_num_workers=2")
    after_step(first, tmp_path / "cut", 12)
    workers = workers_of(first.pid)
    first.kill()
    first.communicate()
    assert len(workers) == 2 and gone(workers), "workers end with the training that was killed"
    second = begin("--dataloader_num_workers=1", "--resume")
    after_step(second, tmp_path / "cut", 24)
    workers = workers_of(second.pid)
    os.killpg(second.pid, signal.SIGINT)
    said, errors = second.communicate(timeout=900)
    assert second.returncode == 130 and "resume with: bgrpo sft" in said and "Traceback" not in errors, errors[-2000:]
    assert gone(workers)
    third = begin("--dataloader_num_workers=3", "--resume")
    said, errors = third.communicate(timeout=900)
    assert third.returncode == 0, errors[-2000:]
    assert figures(tmp_path / "cut") == figures(tmp_path / "straight")
    a, b = ((tmp_path / name / "policy/model.safetensors").read_bytes() for name in ("cut", "straight"))
    assert a == b


# A step

@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_a_step_computes_the_columns_of_the_answers_alone(position):
    "The same loss and gradients as with a mask and all logits"
    tokenizer = load_tokenizer("single")
    problems = [p for d in ((2, 2), (3, 2)) for p in generate_problems(4, *d, seed=1, canonical=True)]
    batch = collate(list(ProblemStream(problems, tokenizer)), tokenizer.pad_token_id)
    ids = batch["input_ids"]
    model = new_model("tiny", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, position=position)
    def gradients(inputs):
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])
    lengths = torch.tensor([len(s["ids"]) for s in ProblemStream(problems, tokenizer)])
    masked = batch | dict(attention_mask=(torch.arange(ids.shape[1]) < lengths[:, None]).long())
    (a, ga), (b, gb) = gradients(masked), gradients(for_last_columns(batch))
    assert lengths.min() < ids.shape[1] and for_last_columns(batch)["logits_to_keep"] < ids.shape[1] - 20
    torch.testing.assert_close(a, b)
    assert (ga - gb).norm() / ga.norm() < 1e-5


def host_reads(config, monkeypatch, later):
    "How often a step reads a number of a tensor"
    from torch.utils._python_dispatch import TorchDispatchMode
    reads = []
    class Counts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            reads[-1] += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **kwargs or {})
    step = sft._Trainer.training_step
    def counted(self, *args, **kwargs):
        reads.append(0)
        return step(self, *args, **kwargs)
    monkeypatch.setattr(sft._Trainer, "training_step", counted)
    monkeypatch.setattr(sft._Trainer, "looks_later", later)
    reads.append(0)
    with Counts(): train_policy(config)
    return reads[2:-1]    # from the first step's end to the start of the last one


def test_a_step_waits_for_no_number(config, monkeypatch):
    "On a device each number that is read is a wait until all work is done; here the same code is counted on a CPU"
    how = dict(max_steps=8, logging_steps=100, eval_strategy="no", save_strategy="no")
    counts = host_reads(config("late", **how), monkeypatch, True)
    assert len(counts) == 6 and not any(counts), counts
    assert min(host_reads(config("at_once", **how), monkeypatch, False)) > 2, "the count sees reads where there are some"
    a, b = (weights(f"{config(name).output_dir}/policy") for name in ("late", "at_once"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_compiled_policy_learns_the_same(config, optimizer, monkeypatch):
    "And is not compiled again for each length"
    from torch._dynamo.utils import counters
    monkeypatch.setattr(os, "environ", os.environ.copy())    # Transformers hands this setting on by the environment
    plain = train_policy(config("plain", max_steps=12, optimizer=optimizer, bf16=False))
    torch._dynamo.reset()
    counters.clear()
    how = dict(torch_compile=True, torch_compile_backend="aot_eager")
    compiled = train_policy(config("compiled", max_steps=12, optimizer=optimizer, bf16=False, **how))
    assert 0 < counters["stats"]["unique_graphs"] <= 6, dict(counters["stats"])
    assert compiled["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-3)
    losses = [[row["loss"] for row in figures(config(name).output_dir) if "loss" in row] for name in ("plain", "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.cuda
def test_a_step_on_a_device_waits_for_nothing(start, tmp_path, monkeypatch):
    "PyTorch raises where a step would wait for the device"
    step = sft._Trainer.training_step
    def strict(self, *args, **kwargs):
        torch.cuda.set_sync_debug_mode("error" if self.state.global_step >= 3 else "default")
        try: return step(self, *args, **kwargs)
        finally: torch.cuda.set_sync_debug_mode("default")
    monkeypatch.setattr(sft._Trainer, "training_step", strict)
    run = SupervisedConfig(str(tmp_path), model=str(start), max_steps=40, coefficient_bound=3, held_out=16,
                           per_device_train_batch_size=16, logging_steps=20, eval_steps=40, disable_tqdm=True)
    assert run.bf16 and run.dataloader_num_workers > 0 and train_policy(run)["step"] == 40
