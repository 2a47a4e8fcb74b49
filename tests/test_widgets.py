"The explorers as people meet them: in a browser, with a kernel behind the page. Their logic is tested in the chapters."
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from browser import open_page

REPO = Path(__file__).parent.parent
SECONDS = 240   # the machine may be busy


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def server(folder, *words, path="/"):
    "A Jupyter server as a child process; yields its address, and ends it and its kernels"
    port, log = free_port(), folder / "server.txt"
    env = os.environ | {"PYTHONPATH": str(REPO), "JUPYTER_CONFIG_DIR": str(folder / "config"), "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
                        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"), "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")}
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", *words, f"--port={port}"], env=env, stdout=out, stderr=subprocess.STDOUT, cwd=folder)
    try:
        end = time.monotonic() + SECONDS
        while True:
            assert process.poll() is None and time.monotonic() < end, f"no server:\n{log.read_text()[-3000:]}"
            try: urlopen(f"http://127.0.0.1:{port}{path}", timeout=5).close(); break
            except (URLError, OSError): time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        try: process.wait(30)
        except subprocess.TimeoutExpired: process.kill(); process.wait()


@contextmanager
def chapter(name, last, browser, folder):
    "The page that `voila nbs/NAME.ipynb` makes, once every cell has run and its last explorer is there"
    with server(folder, "voila", str(REPO / f"nbs/{name}.ipynb"), "--no-browser", "--Voila.ip=127.0.0.1", "--show_tracebacks=True",
                f"--VoilaExecutor.timeout={SECONDS}", path="/voila/static/favicon.ico") as address, open_page(browser) as page:
        page.set_default_timeout(SECONDS * 1000)
        page.goto(address)
        page.locator(last).or_(page.get_by_text("Traceback (most recent call last)")).first.wait_for()
        page.folder = folder
        yield page


@pytest.fixture(scope="module")
def explorers(browser, tmp_path_factory):
    with chapter("12_widgets", ".bgrpo-show-group", browser, tmp_path_factory.mktemp("voila")) as page: yield page


@pytest.fixture(scope="module")
def run_explorers(browser, tmp_path_factory):
    with chapter("12a_run_explorers", ".bgrpo-sweep", browser, tmp_path_factory.mktemp("voila")) as page: yield page


def reads(place, text):
    "Wait until a place of the page says a text, or what a pattern matches"
    place.filter(has_text=text).first.wait_for()


def slide(explorer, which, key):
    "Move a slider by a key, as a person does who has clicked its handle"
    handle = explorer.locator(".widget-slider .noUi-handle").nth(which)
    handle.focus()
    handle.press(key)


def type_in(explorer, label, text):
    box = explorer.get_by_label(label, exact=True)
    box.fill(text)
    box.press("Enter")


@pytest.mark.parametrize("chapter_of", ["explorers", "run_explorers"])
def test_no_cell_of_the_notebook_failed(chapter_of, request):
    explorers = request.getfixturevalue(chapter_of)
    assert "Traceback" not in explorers.locator("body").inner_text()
    theirs = ("request to another host: https://cdn.jsdelivr.net/npm/@fortawesome", "console: Failed to load resource: net::ERR_FAILED")    # of Voila's own page
    assert not [f for f in explorers.faults if not f.startswith(theirs)], explorers.faults


def test_equivalence_explorer(explorers):
    explorer = explorers.locator(".bgrpo-explain")
    reads(explorer, "g = b2 − 4 b + 4")
    type_in(explorer, "h", "x**2 + x")
    reads(explorer, "not_a_decomposition")
    reads(explorer, "is no constant")
    type_in(explorer, "h", "x**2 +")
    reads(explorer.get_by_role("alert"), "h: 'x**2 +' cannot be read")
    type_in(explorer, "h", "2x^2")
    reads(explorer, "b2/4 + b + 1")
    explorer.locator("select").select_option("ZZ")
    reads(explorer, "not_integral")
    assert "Traceback" not in explorer.inner_text()


def test_beam_explorer(explorers):
    "The problem's right answer is the fourth beam: at width 4 it is there, at width 3 it is not"
    explorer = explorers.locator(".bgrpo-show-beams")
    reads(explorer, "width 4: 4 beams, the first valid one in place 4")
    picture = explorer.locator("img").get_attribute("src")
    slide(explorer, 0, "ArrowLeft")
    reads(explorer, "width 3: 3 beams, none valid")
    assert explorer.locator("img").get_attribute("src") != picture
    assert explorer.locator("table tbody tr").count() == 3
    slide(explorer, 0, "ArrowRight")
    reads(explorer, "place 4 (beam rank 3)")
    row = explorer.locator("table tbody tr").nth(3).inner_text().split("\t")
    assert row[0].strip() == "4" and "✓ ok" in row[3] and float(row[4]) == pytest.approx(0.911, abs=1e-3)      # exp(-3/32)
    type_in(explorer, "f", "a7*a8 + a7^2")
    reads(explorer.get_by_role("alert"), "several variables need")
    type_in(explorer, "f", "x**4 + 2*x**2 + 1")
    reads(explorer, "the first valid one in place 1")


def test_group_explorer(explorers):
    explorer = explorers.locator(".bgrpo-show-group")
    reads(explorer, "1 of 6 completions above the mean: +")
    slide(explorer, 0, "ArrowLeft")
    reads(explorer, "1 of 5 completions above the mean: +")
    assert explorer.locator("span[title$=nats]").count() > 15
    type_in(explorer, "after", "tiny")
    reads(explorer, "0 tokens gained, 0 lost")


def test_run_monitor(run_explorers):
    "A run is started by its button, drawn while it trains, stopped by the other button, and its folder can go on"
    explorer, run = run_explorers.locator(".bgrpo-run-monitor"), run_explorers.folder / "run"
    start, stop = explorer.get_by_role("button", name="Start"), explorer.get_by_role("button", name="Stop")
    reads(explorer, "absent")
    type_in(explorer, "folder", str(run))
    type_in(explorer, "flags", "--lerning_rate 1")
    start.click()
    reads(explorer, "failed: bgrpo train: --lerning_rate is not known, did you mean --learning_rate?")
    type_in(explorer, "flags", "--max_steps 5000 --num_problems 60 --held_out 6 --prompts_per_step 4 --num_generations 4 --num_samples 2 --wide_beams 4 "
                               "--eval_steps 1000 --save_steps 5000 --use_cpu true")
    start.click()
    try:
        reads(explorer, re.compile(r"running: step [2-9]"))
        first = explorer.locator("img").get_attribute("src")
        assert start.is_disabled() and "Traceback" not in explorer.inner_text()
        run_explorers.wait_for_function("old => document.querySelector('.bgrpo-run-monitor img').src != old", arg=first)
    finally: stop.click()
    reads(explorer, re.compile(r"stopped: step \d+; start goes on from the newest checkpoint"))
    assert list(run.glob("checkpoint-*/trainer_state.json")) and not (run / "result.json").exists()


def test_sweep_explorer(run_explorers):
    explorer = run_explorers.locator(".bgrpo-sweep")
    reads(explorer, "24 runs")
    reads(explorer, "n = 12 pairs: a difference")
    type_in(explorer, "where", "seed < 2")
    reads(explorer, "undecided: 4 pairs cannot reach p = 0.05")
    explorer.locator("select").nth(1).select_option("learning_rate")
    reads(explorer, "learning_rate 3e-05 − 1e-05")
    type_in(explorer, "where", "seed <")
    reads(explorer.get_by_role("alert"), "is no condition on the columns")


def test_jupyterlab_once(browser, tmp_path):
    "The same widget in a notebook that a person runs in JupyterLab"
    source = "from bgrpo_nb.show.widgets import equivalence_explorer\nequivalence_explorer()"
    cell = dict(cell_type="code", execution_count=None, id="a1b2c3d4", metadata={}, outputs=[], source=source)
    (tmp_path / "try.ipynb").write_text(json.dumps(dict(cells=[cell], metadata=dict(kernelspec=dict(display_name="Python 3", language="python", name="python3")),
                                                        nbformat=4, nbformat_minor=5)))
    with server(tmp_path, "jupyterlab", "--no-browser", "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token=", "--allow-root", f"--ServerApp.root_dir={tmp_path}",
                path="/api") as address, open_page(browser) as page:
        page.set_default_timeout(SECONDS * 1000)
        def accept(dialog):                                                                     # as a person would; on a busy machine one may come up
            print("JupyterLab asks:", dialog.first.inner_text())
            dialog.locator("button.jp-mod-accept").first.click()
        page.add_locator_handler(page.locator("dialog.jp-Dialog"), accept)
        page.goto(f"{address}/lab/tree/try.ipynb")
        page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()            # the kernel is there
        prompt, end = page.locator(".jp-CodeCell .jp-InputPrompt").first, time.monotonic() + SECONDS
        while not re.search(r"[*\d]", prompt.inner_text()) and time.monotonic() < end:          # a page that is still being laid out loses a key
            page.locator(".jp-CodeCell .cm-content").first.click()
            page.keyboard.press("Shift+Enter")
            page.wait_for_timeout(2000)
        explorer = page.locator(".bgrpo-explain")
        reads(explorer, "ok")
        type_in(explorer, "h", "x")
        reads(explorer, "trivial")


def test_the_group_explorers_step_is_the_trainers(tmp_path):
    "One step of BGRPOTrainer on one group, and `step_on`: the same weights"
    import torch
    from datasets import Dataset

    from bgrpo_nb.solve.beam_filter import answer_tokens
    from bgrpo_nb.algebra.problems import Problem, generate_problems
    from bgrpo_nb.policy.model import load_model, load_tokenizer
    from bgrpo_nb.learn.trainer import BGRPOConfig, BGRPOTrainer
    from bgrpo_nb.show.widgets import _search_group, step_on
    from bgrpo_nb.solve.decomposition_reward import decomposition_reward

    problem = Problem(generate_problems(40, 3, 2, seed=32, canonical=True)[11].expanded, "")
    tokenizer, model = load_tokenizer("tiny"), load_model("tiny", device="cpu")
    ours = step_on(model, _search_group(model, tokenizer, problem, 6, "rank"), 2e-5)
    config = BGRPOConfig(output_dir=str(tmp_path), num_generations=6, prompts_per_step=1, max_steps=1, learning_rate=2e-5, warmup_steps=0, use_cpu=True, disable_tqdm=True,
                         max_completion_length=min(64, max(16, answer_tokens([problem]))), save_strategy="no")
    trainer = BGRPOTrainer(model, decomposition_reward(tokenizer), config, Dataset.from_dict({"prompt": [problem.prompt]}), processing_class=tokenizer)
    trainer.train()
    before, moved = load_model("tiny", device="cpu").state_dict(), 0.0
    for name, theirs in trainer.model.state_dict().items():
        moved = max(moved, (theirs - before[name]).abs().max().item())
        off = ((theirs - ours.state_dict()[name]).abs() > 2e-6).float().mean().item()
        assert off < 0.01, f"{name}: {off:.1%} of the weights differ"
    assert moved > 1e-5
