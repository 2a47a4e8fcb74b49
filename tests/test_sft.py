"Supervised training: it learns, a resumed run ends like an unbroken one, and a wrong setting is one clear error."
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bgrpo_nb.recipes import sft
from bgrpo_nb.algebra.problems import (
    Problem, generate_multivariate, generate_problems, highest_first, polynomial_key, write_problems)
from bgrpo_nb.search.generation import greedy
from bgrpo_nb.policy.model import decode_completions, encode, load_model, load_tokenizer, new_model, save_model
from bgrpo_nb.algebra.polynomial import canonical_inner, verify
from bgrpo_nb.base.ownership import claim_folder
from bgrpo_nb.base.run_folder import checkpoints, read_metrics, newest_checkpoint
from bgrpo_nb.recipes.callbacks import StopCleanly
from bgrpo_nb.recipes.sft import ProblemStream, SupervisedConfig, bucketed_order, collate, make_samples, train_policy


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Small matrices gain nothing from more threads, and on a busy machine threads wait for each other"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    "A new policy of two layers"
    model = new_model("tiny", seed=0, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    return save_model(model, load_tokenizer("single"), tmp_path_factory.mktemp("start"))


@pytest.fixture
def config(start, tmp_path):
    "Settings of a run of seconds; a call changes some"
    def make(name="run", **changes):
        common = dict(model=str(start), max_steps=24, coefficient_bound=2, per_device_train_batch_size=16, held_out=16,
                      warmup_steps=4, learning_rate=4e-3, logging_steps=1, eval_steps=12, save_steps=8,
                      disable_tqdm=True, bf16=False)
        return SupervisedConfig(str(tmp_path / name), **common | changes)
    return make


def weights(folder): return load_model(folder, device="cpu").state_dict()


def figures(folder):
    "Logged rows, without what a clock decides"
    rows = [row for row in read_metrics(f"{folder}/metrics.jsonl") if "train_runtime" not in row]
    return [{k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k} for row in rows]


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
    samples = list(make_samples(whole, tokenizer)[0])
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


def read_back(stream, tokenizer):
    "Problems of a stream"
    texts = [" ".join(tokenizer.convert_ids_to_tokens(row.tolist())) for row in stream.rows]
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
    run = config(max_steps=4, kind="multivariate", degrees=["2_2"], vocabulary="compact_multi")
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


def test_a_folder_that_is_taken(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="another --output_dir"): train_policy(config("file/run"))
    claim_folder(tmp_path / "run", "run")
    (tmp_path / "run/result.json").write_text("{}")
    with pytest.raises(FileExistsError, match="--resume"): train_policy(config())
