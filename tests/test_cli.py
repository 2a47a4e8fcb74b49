"`bgrpo` as a person types it: in a process of its own."
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from bgrpo_nb.cli import main
from bgrpo_nb.algebra.problems import generate_problems, polynomial_key, read_problems, write_problems
from bgrpo_nb.solve.evaluation import Report
from bgrpo_nb.base.ownership import claim_folder, locked
from bgrpo_nb.base.run_folder import read_metrics

COMMANDS = ["demo", "generate", "sft", "filter", "train", "evaluate", "plot", "sweep", "analyze", "convert"]


def bgrpo(*words, cwd=None):
    "As typed by somebody who has set nothing up: WANDB_MODE would be announced on stdout"
    plain = {k: v for k, v in os.environ.items() if k != "WANDB_MODE"}
    return subprocess.run([sys.executable, "-m", "bgrpo_nb", *map(str, words)], cwd=cwd, capture_output=True, text=True, env=plain)


@pytest.mark.parametrize("words", [[], *([c] for c in COMMANDS)], ids=["bgrpo", *COMMANDS])
def test_help_comes_without_loading_anything_heavy(words):
    code = f"import sys; from bgrpo_nb.cli import main; s = main({[*words, '--help']!r}); print(sorted({{'torch', 'transformers', 'trl', 'sympy', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code.replace("s = main", "\ntry: main").replace("; print", "\nexcept SystemExit: pass\nprint")], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().splitlines()[-1] == "[]", done.stdout + done.stderr
    assert "usage: bgrpo" in done.stdout


@pytest.fixture
def place(tmp_path, monkeypatch):
    write_problems(tmp_path / "good.txt", generate_problems(8, 2, 2, seed=3))
    (tmp_path / "bad.txt").write_text("^ a P 4 ⁇ ^ a P 2\n+ a\n")
    (tmp_path / "many.txt").write_text("* a7 a8 ⁇ a7\n")
    (tmp_path / "bad.yaml").write_text("learnig_rate: 1e-4\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_MODE")


def is_one_line(out, err, says):
    lines = [row for row in err.splitlines() if row.strip()]
    return not out and len(lines) == 1 and lines[0].startswith("bgrpo") and says in lines[0]


@pytest.mark.parametrize("line,says", [
    ("evaluate --problems nowhere.txt", "no file nowhere.txt"), ("train --objective best", "one of paper, original"), ("sft --preset huge", "tiny, small, paper")])
def test_a_process_that_cannot_do_it_says_so_in_one_line(line, says, place):
    "Nor do the libraries that it loads say anything"
    done = bgrpo(*line.split())
    assert done.returncode == 2 and is_one_line(done.stdout, done.stderr, says), done.stdout + done.stderr


HIDDEN = DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning # Python shows none of them


@pytest.mark.parametrize("line,says", [
    ("trian", "did you mean train"), ("generate", "required: out"), ("generate x --degrees 1_2", "both 2 or more"), ("generate x --n many", "no whole number"),
    ("evaluate --problems nowhere.txt", "no file nowhere.txt"), ("evaluate --model nowhere --problems good.txt", "no model at nowhere"),
    ("evaluate --problems bad.txt", "bad.txt, line 2"), ("evaluate --problems many.txt", "vocabulary='multi'"), ("filter --problems good.txt --out x --lowest 30", "1 to num_beams=25"),
    ("train --objective best", "one of paper, original"), ("train --lerning_rate 1", "did you mean --learning_rate"), ("train --problems nowhere.txt", "no file"),
    ("train --config nowhere.yaml", "no file"), ("train --config bad.yaml", "did you mean learning_rate"), ("train --temperature 0.7", "no meaning for beams"),
    ("train --problems good.txt --resume --prompts_per_step 2", "no whole checkpoint"), ("train --problems good.txt", "lower prompts_per_step"), ("train --output_dir good.txt/run --num_problems 90", "output_dir"),
    ("sft --preset huge", "tiny, small, paper"), ("sft --problems good.txt", "lower --held_out"), ("analyze nowhere", "there is no nowhere; give a"), ("analyze .", "holds no run"), ("plot .", "no metrics.jsonl"), ("convert nowhere.pt out", "no checkpoint"),
    ("demo --output_dir .", "choose another"),
    ("generate x --variables 7", "--variables means nothing for --kind univariate; leave it out"), ("generate x --kind multivariate --answer inner", "--answer means nothing"),
    ("generate x --kind multivariate --descending", "--descending means nothing"), ("generate x --kind on_singlets --canonical", "--canonical means nothing"),
    ("generate x --kind on_singlets --degrees 2_4", "the inner degree of --kind on_singlets is 2; write --degrees 2_2"),
    ("generate x --n 10 --degrees 2_2,3_2,2x2", "--degrees names 2_2 twice, and would make the same problems; keep one"),
    ("evaluate --model tiny --model small --problems good.txt", "evaluate: --model is given twice and the last would win silently; keep one, with all values after it"),
    ("generate x --n 2 --n=3", "--n is given twice and the last would win silently; keep one; see"), ("demo --quick --steps 2 --quick", "--quick is given twice"),
    ("sweep s.yaml --agents 2 --workers 3", "--agents and --workers set the same; keep one"), ("train --seed 1 --max_steps 2 --seed=1", "train: --seed is given twice"),
    ("train --num_generations 4 --beam_width 6", "--num_generations and --beam_width set the same"), ("train --use_beam false --rollout beam", "--use_beam and --rollout set the same"),
    ("train --max-steps 4 --max_steps 6", "--max-steps and --max_steps set the same"), ("train --config bad.yaml --config c.yaml", "--config is given twice"),
    ("sft --degrees 2_2 --degrees 3_2", "--degrees is given twice and the last would win silently; keep one, with all values after it"),
])
def test_what_cannot_be_done_is_one_line_and_status_2(line, says, place, capfd):
    "In this process, which has loaded the libraries"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main(line.split()) == 2
    assert is_one_line(*(said := capfd.readouterr()), says), said
    assert not [w for w in caught if not issubclass(w.category, HIDDEN)]


def test_flags_that_a_program_adds_do_not_repeat_those_that_were_typed(tmp_path, monkeypatch):
    "The monitor's of a notebook, an agent's of W&B, and the check of a sweep"
    from bgrpo_nb.recipes.flags import override
    from bgrpo_nb.show import run_explorers
    started = []
    monkeypatch.setattr(run_explorers.subprocess, "Popen", lambda command, **how: started.append(command[3:]))
    for typed, added in (("--seed 1", ["--disable_tqdm", "true"]), ("--disable-tqdm false", [])):
        run_explorers.start_training(tmp_path / "run", typed)
        assert started.pop() == ["--output_dir", str(tmp_path / "run"), *added, *typed.split()]
    agent = override(["--output_dir=trial", "--known_problems=0"], ["--known-problems", "3", "--beam_width=4", "--degrees", "2_2", "3_2"])
    assert agent == ["--output_dir=trial", "--known-problems", "3", "--beam_width=4", "--degrees", "2_2", "3_2"]
    assert override(agent, ["--num_generations=6", "--degrees=4_2"]) == ["--output_dir=trial", "--known-problems", "3", "--num_generations=6", "--degrees=4_2"]
    sweep = "method: grid\nmetric: {name: eval_beam_rank_score, goal: maximize}\nparameters: {use_cpu: {value: true}, seed: {values: [1, 2]}}\n"
    (tmp_path / "s.yaml").write_text(sweep)
    from bgrpo_nb import cli
    from bgrpo_nb.study.sweeps import read_sweep
    cli._check_trials(read_sweep(tmp_path / "s.yaml"), 0)


@pytest.mark.parametrize("path", sorted(p for p in (Path(__file__).parent.parent / "configs").glob("*/*.yaml") if p.parent.name in ("sft", "train")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_config_of_the_repository_is_read(path):
    "configs/COMMAND/*.yaml, each by its command; sweeps in test_sweeps.py, accelerate in test_trainer.py"
    from bgrpo_nb.cli import read_config
    from bgrpo_nb.recipes.sft import SupervisedConfig
    from bgrpo_nb.recipes.train import TrainConfig
    config = read_config({"sft": SupervisedConfig, "train": TrainConfig}[path.parent.name], ["--config", str(path), "--use_cpu", "true"], "bgrpo")
    assert str(config.output_dir).startswith("runs/") and (path.name != "original.yaml" or (config.scale_rewards, config.num_iterations, config.beta) == ("group", 5, 0.01))


def test_generate_filter_evaluate_train_plot(tmp_path):
    "A user's own file through every command"
    def ok(*words):
        done = bgrpo(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout
    ok("generate", "p.txt", "--n", 60, "--degrees", "2_2", "--seed", 77)
    assert read_problems(tmp_path / "p.txt") == generate_problems(60, 2, 2, seed=77)
    ok("generate", "mixed.txt", "--n", 11, "--degrees", "2_2,3_2", "--seed", 77)
    mixed = read_problems(tmp_path / "mixed.txt")
    assert mixed[:6] != generate_problems(6, 2, 2, seed=77) and set(mixed) == {*generate_problems(6, 2, 2, seed=77), *generate_problems(5, 3, 2, seed=77)}
    assert "kept" in ok("filter", "--problems", "p.txt", "--out", "kept.txt", "--num_beams", 8, "--limit", 40)
    kept = read_problems(tmp_path / "kept.txt")
    assert 20 < len(kept) <= 40 and set(kept) <= set(read_problems(tmp_path / "p.txt"))
    assert "beam rank score" in ok("evaluate", "--problems", "p.txt", "--limit", 10, "--out", "report.json", "--wide_beams", 12, "--num_samples", 2)
    report = Report.from_json(tmp_path / "report.json")
    assert len(report) == 10 and report.metrics["beam_accuracy"] > 0.5
    (tmp_path / "c.yaml").write_text("beam_width: 4\nuse_beam: true\nmax_steps: 5\nlearning_rate: 1e-5\n")
    said = ok("train", "--config", "c.yaml", "--problems", "kept.txt", "--output_dir", "run", "--prompts_per_step", 4, "--max_steps", 2, "--eval_steps", 2, "--held_out", 6)
    assert said.count("6 problems") == 2
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [r["step"] for r in rows if "eval_beam_rank_score" in r] == [0, 2]
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["step"] == 2 and result["versions"]["torch"] and result["seed"] == 42
    assert "learning_rate: 1.0e-05" in (tmp_path / "run/config.yaml").read_text()
    (tmp_path / "run/plots/history.png").unlink()
    ok("plot", "run")
    assert (tmp_path / "run/plots/history.png").stat().st_size > 5000


def test_multivariate_and_on_singlets_are_made(tmp_path):
    for kind in ("multivariate", "on_singlets"):
        assert bgrpo("generate", f"{kind}.txt", "--n", 20, "--kind", kind, cwd=tmp_path).returncode == 0
        assert len(read_problems(tmp_path / f"{kind}.txt")) == 20


def here(*words): # the status, in this process, which has loaded the libraries
    return main([str(w) for w in words])


def test_a_published_file_is_evaluated(shared, tmp_path):
    "The authors' 19 M model solves 147 of the first 300 greedily, by the integer rule; here the first 60"
    status = here("evaluate", "--model", "tiny", "--problems", shared / "published/test_dataset_2_2.txt", "--limit", 60, "--domain", "ZZ", "--out", tmp_path / "r.json",
                  "--wide_beams", 12, "--num_samples", 2)
    assert status == 0
    metrics = Report.from_json(tmp_path / "r.json").metrics
    assert metrics["greedy_accuracy"] > 147 / 300 and metrics["beam_accuracy"] > 0.9


def test_a_published_file_is_trained_on(shared, tmp_path):
    done = bgrpo("train", "--model", "tiny", "--problems", shared / "published/test_dataset_2_2.txt", "--output_dir", "run", "--max_steps", 1, "--prompts_per_step", 4,
                 "--num_generations", 4, "--held_out", 4, "--known_problems", 0, "--num_samples", 2, "--wide_beams", 4, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "run/policy/model.safetensors").exists(), done.stderr[-2000:]


def test_convert_there_and_back(shared, tmp_path):
    assert here("convert", shared / "reference_checkpoint/model.pt", tmp_path / "hf") == 0
    assert here("convert", tmp_path / "hf", tmp_path / "back.pt") == 0
    assert (tmp_path / "back.pt").exists()


def test_the_demo_in_miniature(tmp_path):
    done = bgrpo("demo", "--steps", 2, "--pool", 150, "--held_out", 12, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for title in ("3∘2, learnt here (12 held-out problems)", "2∘2, known before (12 held-out problems)", "beam rank score", "difference"): assert title in done.stdout
    folder = tmp_path / "runs/demo"
    for name in ("config.yaml", "metrics.jsonl", "result.json", "plots/history.png", "policy/config.json", "checkpoint-2/trainer_state.json", "reports/3_2_before.json"):
        assert (folder / name).exists(), name
    before, after = (Report.from_json(folder / f"reports/3_2_{when}.json") for when in ("before", "after"))
    assert [r.expanded for r in before.rows] == [r.expanded for r in after.rows]
    assert bgrpo("demo", "--steps", 1, "--pool", 150, "--held_out", 4, cwd=tmp_path).returncode == 0  # an earlier demo is replaced


def test_a_demo_that_cannot_train_leaves_the_earlier_one(tmp_path, capsys):
    claim_folder(tmp_path / "demo", "demo")
    (tmp_path / "demo/policy").mkdir()
    for name in ("metrics.jsonl", "policy/config.json"): (tmp_path / "demo" / name).write_text("earlier")
    assert here("demo", "--output_dir", tmp_path / "demo", "--pool", 1, "--held_out", 2, "--steps", 1) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "bgrpo: the beam filter kept none of pool=1 problems; use a larger --pool"
    with locked(tmp_path / "demo"): assert here("demo", "--output_dir", tmp_path / "demo", "--pool", 60, "--held_out", 2, "--steps", 1) == 2
    assert "another process is at work" in capsys.readouterr().err
    assert {p.read_text() for p in (tmp_path / "demo").rglob("*") if p.name in ("metrics.jsonl", "config.json")} == {"earlier"}


def test_the_demo_measures_on_problems_that_the_policy_never_saw():
    "tiny was trained on 256,000 problems of seed 0 (configs/sft/tiny.yaml)"
    demo = {polynomial_key(p.expanded) for p in generate_problems(150, 2, 2, seed=10_000)}
    trained = generate_problems(4000 * 64, 2, 2, seed=0, canonical=True)
    texts = {p.expanded for p in generate_problems(150, 2, 2, seed=10_000)}
    assert len(demo) == len(texts) == 150 and not texts & {p.expanded for p in trained}


def test_a_runs_config_makes_the_same_run(tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    assert not here("train", "--output_dir", first, "--num_problems", "40", "--held_out", "4", "--max_steps", "2", "--prompts_per_step", "4",
                    "--num_generations", "4", "--eval_on_start", "false", "--wide_beams", "10", "--num_samples", "2", "--report_to", "none", "--use_cpu", "true")
    assert not here("train", "--config", first / "config.yaml", "--output_dir", again)
    timed = {"runtime", "step_time", "eval_seconds", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
    rows = [[{k: v for k, v in row.items() if k not in timed} for row in read_metrics(run / "metrics.jsonl")] for run in (first, again)]
    assert rows[0] == rows[1] and len(rows[0]) > 2
