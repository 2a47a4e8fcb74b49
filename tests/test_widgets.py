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

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
NotebookClient = nbclient.NotebookClient
REPO = Path(__file__).parent.parent
SECONDS = 900   # the machine may be busy


def test_each_figure_of_a_notebook_is_shown():
    drawn = "with use_style() as plt: plt.subplots()[1].plot([1, 2])"
    cells = ["from bgrpo_nb.base.plotting import use_style", drawn, drawn, drawn]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(nb, timeout=SECONDS).execute()
    assert ["image/png" in output.data for cell in nb.cells[1:] for output in cell.outputs] == [True] * 3


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def answers(address):
    try: urlopen(address, timeout=5).close()
    except (URLError, OSError): return False
    return True


@contextmanager
def server(folder, *words, path="/"):
    "A Jupyter server as a child process; yields its address, and ends it and its kernels"
    port, log = free_port(), folder / "server.txt"
    env = os.environ | {"PYTHONPATH": str(REPO), "JUPYTER_CONFIG_DIR": str(folder / "config"),
                        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
                        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
                        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")}
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", *words, f"--port={port}"], env=env, stdout=out,
                                   stderr=subprocess.STDOUT, cwd=folder)
    try:
        end = time.monotonic() + SECONDS
        while not answers(f"http://127.0.0.1:{port}{path}"):
            assert process.poll() is None and time.monotonic() < end, f"no server:\n{log.read_text()[-3000:]}"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        try: process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


PAGES = {"equivalence": ".bgrpo-explain", "beams": ".bgrpo-show-beams", "group": ".bgrpo-show-group",
         "run": ".bgrpo-run-monitor", "sweep": ".bgrpo-sweep"}   # page -> its explorer


@pytest.fixture(scope="module")
def voila(tmp_path_factory):
    "The address of what `voila nbs/_explorers` serves, and the server's folder"
    folder = tmp_path_factory.mktemp("voila")
    words = ["voila", str(REPO / "nbs/_explorers"), "--no-browser", "--Voila.ip=127.0.0.1", "--show_tracebacks=True",
             f"--VoilaExecutor.timeout={SECONDS}"]
    with server(folder, *words, path="/voila/static/favicon.ico") as address: yield address, folder


@contextmanager
def explorer_page(name, browser, voila):
    "An explorer on its page, once it is there; the page is `explorer.page`"
    address, folder = voila
    with open_page(browser) as page:
        page.set_default_timeout(SECONDS * 1000)
        page.goto(f"{address}/voila/render/{name}.ipynb")
        page.locator(PAGES[name]).or_(page.get_by_text("Traceback (most recent call last)")).first.wait_for()
        page.folder = folder
        yield page.locator(PAGES[name])
        assert "Traceback" not in page.locator("body").inner_text()
        theirs = ("request to another host: https://cdn.jsdelivr.net/npm/@fortawesome",     # of Voila's own page
                  "console: Failed to load resource: net::ERR_FAILED")
        assert not [fault for fault in page.faults if not fault.startswith(theirs)], page.faults


@pytest.fixture
def explorer(request, browser, voila):
    "The explorer that a test is named for: test_PAGE_explorer"
    name = request.node.name.split("[")[0].removeprefix("test_").removesuffix("_explorer")
    with explorer_page(name, browser, voila) as explorer: yield explorer


def reads(place, text):
    "Wait until a part of the page contains a text, or a match of a pattern"
    place.filter(has_text=text).first.wait_for()


def slide(explorer, which, key):
    "Move a slider by a key, as after a click on its handle"
    handle = explorer.locator(".widget-slider .noUi-handle").nth(which)
    handle.focus()
    handle.press(key)


def type_in(explorer, label, text):
    box = explorer.get_by_label(label, exact=True)
    box.fill(text)
    box.press("Enter")


def test_there_is_a_page_for_each_explorer():
    pages = {path.stem: json.loads(path.read_text())["cells"] for path in (REPO / "nbs/_explorers").glob("*.ipynb")}
    assert set(pages) == set(PAGES)
    for name, cells in pages.items():
        assert [cell["cell_type"] for cell in cells] == ["markdown", "code"], name
        assert not cells[1]["outputs"], f"{name}: pages are stored without outputs"


def test_equivalence_explorer(explorer):
    reads(explorer, "g = b2 − 4 b + 4")
    lines = explorer.page.locator("body").inner_text().split("\n")
    assert [line for line in lines if line][:2] == [
        "Is h an inner polynomial of f?", "Type f and h: the division of f by h, step by step, decides it."]
    type_in(explorer, "h", "x**2 + x")
    reads(explorer, "not_a_decomposition")
    reads(explorer, "is not a constant")
    type_in(explorer, "h", "x**2 +")
    reads(explorer.get_by_role("alert"), "h: 'x**2 +' cannot be read")
    type_in(explorer, "h", "2x^2")
    reads(explorer, "b2/4 + b + 1")
    explorer.locator("select").select_option("ZZ")
    reads(explorer, "not_integral")


def test_beams_explorer(explorer):
    "The problem's right answer is the fourth beam: at width 4 it is there, at width 3 it is not"
    beams, samples = explorer.locator("section").nth(0), explorer.locator("section").nth(1)
    reads(beams, "width 4: 4 beams, the first valid one at place 4")
    reads(samples, "4 samples at temperature 1")
    hover = beams.locator("svg g.right .token title").all_text_contents()
    assert any(re.match(r"\* N: probability 0\.002\d*; score up to here -6\.37 nats", text) for text in hover), hover
    assert "4 ✓ −6.37" in beams.locator("svg .right .label").all_text_contents()
    width, policy, seed = range(3)
    slide(explorer, width, "ArrowLeft")
    reads(beams, "width 3: 3 beams, none valid")
    assert beams.locator("svg .right").count() == 0 and beams.locator("table tbody tr").count() == 3
    slide(explorer, width, "ArrowRight")
    reads(beams, "place 4 (beam rank 3, beam rank score 0.741)")
    row = beams.locator("table tbody tr").nth(3).inner_text().split("\t")
    assert row[0].strip() == "4" and "✓ ok" in row[3]
    assert float(row[4]) == pytest.approx(0.911, abs=1e-3)                          # exp(-3/32)
    slide(explorer, policy, "ArrowRight")                                           # from tiny to small
    reads(beams, "the first valid one at place 1")
    slide(explorer, seed, "ArrowRight")
    reads(samples, "4 right")
    slide(explorer, width, "End")
    reads(beams, "width 25: 25 beams")
    assert not list(overlaps(beams.locator("svg")))
    type_in(explorer, "f", "a7*a8 + a7^2")
    reads(explorer.get_by_role("alert"), "several variables need")


def overlaps(svg):
    "Pairs of texts that are drawn over each other, with the pixels across and down"
    boxes = svg.evaluate("""svg => [...svg.querySelectorAll("text")].map(text => {
        const {left, right, top, bottom} = text.getBoundingClientRect(); return [left, right, top, bottom]; })""")
    assert len(boxes) > 100
    for i, (left, right, top, bottom) in enumerate(boxes):
        for other_left, other_right, other_top, other_bottom in boxes[:i]:
            across = min(right, other_right) - max(left, other_left)
            down = min(bottom, other_bottom) - max(top, other_top)
            if across > 1 and down > 4: yield boxes[i], across, down                # line boxes include some leading


def test_group_explorer(explorer):
    reads(explorer, "1 of 6 completions above the mean: +")
    slide(explorer, 0, "ArrowLeft")
    reads(explorer, "1 of 5 completions above the mean: +")
    assert explorer.locator("span[title$=nats]").count() > 15
    type_in(explorer, "after", "tiny")
    reads(explorer, "0 tokens gained, 0 lost")


def test_run_explorer(explorer):
    "The page opens on a recorded run; buttons start a run and stop it, and it can continue"
    page = explorer.page
    run = page.folder / "run"
    start, stop = explorer.get_by_role("button", name="Start"), explorer.get_by_role("button", name="Stop")
    reads(explorer, "recorded: bgrpo train --max_steps 40 --prompts_per_step 12")
    assert explorer.locator("img").get_attribute("alt") == "recorded run"
    type_in(explorer, "folder", str(run))
    type_in(explorer, "flags", "--lerning_rate 1")
    start.click()
    reads(explorer, "failed: bgrpo train: --lerning_rate is not known, did you mean --learning_rate?")
    type_in(explorer, "flags", "--max_steps 5000 --num_problems 60 --held_out 6 --prompts_per_step 4 --use_cpu true "
                               "--num_generations 4 --num_samples 2 --wide_beams 4 --eval_steps 1000 --save_steps 5000")
    start.click()
    try:
        reads(explorer, re.compile(r"running: step [2-9]"))
        first = explorer.locator("img").get_attribute("src")
        assert start.is_disabled()
        page.wait_for_function("old => document.querySelector('.bgrpo-run-monitor img').src != old", arg=first)
    finally: stop.click()
    reads(explorer, re.compile(r"stopped: step \d+; Start continues from the newest checkpoint"))
    assert list(run.glob("checkpoint-*/trainer_state.json")) and not (run / "result.json").exists()


def test_sweep_explorer(explorer):
    reads(explorer, "24 runs")
    reads(explorer, "n = 12 pairs: difference found")
    type_in(explorer, "where", "seed < 2")
    reads(explorer, "undecided, since 4 pairs can at best give p = 0.12")
    explorer.locator("select").nth(1).select_option("learning_rate")
    reads(explorer, "learning_rate 3e-05 − 1e-05")
    type_in(explorer, "where", "seed <")
    reads(explorer.get_by_role("alert"), "is not a condition on the columns")


def test_jupyterlab_once(browser, tmp_path):
    "The same widget in a notebook that a person runs in JupyterLab"
    source = "from bgrpo_nb.show import equivalence_explorer\nequivalence_explorer()"
    cell = dict(cell_type="code", execution_count=None, id="a1b2c3d4", metadata={}, outputs=[], source=source)
    kernel = dict(display_name="Python 3", language="python", name="python3")
    notebook = dict(cells=[cell], metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
    (tmp_path / "try.ipynb").write_text(json.dumps(notebook))
    words = ["jupyterlab", "--no-browser", "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token=", "--allow-root",
             f"--ServerApp.root_dir={tmp_path}"]
    with server(tmp_path, *words, path="/api") as address, open_page(browser) as page:
        page.set_default_timeout(SECONDS * 1000)
        def accept(dialog):                                    # as a person would; on a busy machine one may come up
            print("JupyterLab asks:", dialog.first.inner_text())
            dialog.locator("button.jp-mod-accept").first.click()
        page.add_locator_handler(page.locator("dialog.jp-Dialog"), accept)
        page.goto(f"{address}/lab/tree/try.ipynb")
        page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()     # the kernel is there
        prompt, end = page.locator(".jp-CodeCell .jp-InputPrompt").first, time.monotonic() + SECONDS
        while not re.search(r"[*\d]", prompt.inner_text()) and time.monotonic() < end:  # the page may still lose a key
            page.locator(".jp-CodeCell .cm-content").first.click()
            page.keyboard.press("Shift+Enter")
            page.wait_for_timeout(2000)
        explorer = page.locator(".bgrpo-explain")
        reads(explorer, "ok")
        type_in(explorer, "h", "x")
        reads(explorer, "trivial")


def test_the_group_explorers_step_is_the_trainers(tmp_path):
    "One step of BGRPOTrainer on one group, and `step_on`: the same weights"
    from datasets import Dataset

    from bgrpo_nb.solve.beam_filter import answer_tokens
    from bgrpo_nb.algebra.problems import Problem, generate_problems
    from bgrpo_nb.policy.model import load_model, load_tokenizer
    from bgrpo_nb.learn.config import BGRPOConfig
    from bgrpo_nb.learn.trainer import BGRPOTrainer
    from bgrpo_nb.show.groups import search_group, step_on
    from bgrpo_nb.solve.decomposition_reward import decomposition_reward

    problem = Problem(generate_problems(40, 3, 2, seed=32, canonical=True)[11].expanded, "")
    tokenizer, model = load_tokenizer("tiny"), load_model("tiny", device="cpu")
    ours = step_on(model, search_group(model, tokenizer, problem, 6, "rank"), 2e-5)
    config = BGRPOConfig(output_dir=str(tmp_path), num_generations=6, prompts_per_step=1, max_steps=1,
                         learning_rate=2e-5, save_strategy="no",
                         max_completion_length=min(64, max(16, answer_tokens([problem]))),
                         warmup_steps=0, use_cpu=True, disable_tqdm=True)
    prompts = Dataset.from_dict({"prompt": [problem.prompt]})
    trainer = BGRPOTrainer(model, decomposition_reward(tokenizer), config, prompts, processing_class=tokenizer)
    trainer.train()
    before, moved = load_model("tiny", device="cpu").state_dict(), 0.0
    for name, theirs in trainer.model.state_dict().items():
        moved = max(moved, (theirs - before[name]).abs().max().item())
        off = ((theirs - ours.state_dict()[name]).abs() > 2e-6).float().mean().item()
        assert off < 0.01, f"{name}: {off:.1%} of the weights differ"
    assert moved > 1e-5
