"Fixtures that every test file may use."
import os
import shutil
import signal
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # models are small; threads of several processes would wait for one another
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
signal.signal(signal.SIGHUP, signal.SIG_DFL)   # under nohup it is ignored, by the children of tests too
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # and this one behind an `&`
    signal.signal(signal.SIGINT, signal.default_int_handler)


def session_temp():
    """A folder for the temporary files of this session and its processes: those that are killed leave theirs behind.

    What pytest itself keeps for three sessions, and what torch compiles for longer, stay where they were."""
    usual = tempfile.gettempdir()
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", usual)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{usual}/torchinductor_bgrpo_nb")
    folder = os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="bgrpo_tests_")
    os.chmod(folder, 0o755)  # servers of tests may run as another user
    return folder


TEMP = None if "PYTEST_XDIST_WORKER" in os.environ else session_temp()

import pytest

from acted_out import stage  # noqa: F401  (a fixture)
from browser import browser, page, phone  # noqa: F401  (fixtures)

REPO = Path(__file__).parent.parent


def shared_dir():
    "The folder with the authors' data: `$BGRPO_SHARED`, by default `../shared` beside the repository"
    return Path(os.environ.get("BGRPO_SHARED", REPO.parent / "shared"))


@pytest.fixture(scope="session")
def shared():
    "The authors' data, or a skip that says where it was looked for"
    folder = shared_dir() / "data"
    if not folder.is_dir(): pytest.skip(f"the authors' data is not at {folder}; set BGRPO_SHARED to the folder that holds data/")
    return folder


@pytest.fixture(scope="module")
def one_thread():
    "Small matrices gain nothing from more threads, and on a busy machine threads wait for each other"
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    "The folder of a policy of two layers with random weights"
    from bgrpo_nb.policy.model import load_tokenizer, new_model, save_model
    model = new_model("tiny", initializer_range=0.5, **SMALL)
    return save_model(model, load_tokenizer("single"), tmp_path_factory.mktemp("policy"))


def pytest_unconfigure():
    if TEMP: shutil.rmtree(TEMP, ignore_errors=True)


# The files with most work, largest first: each worker takes whole files, and a long one begun last keeps one alone
LONGEST = ["test_" + name for name in ("site sweeps trainer resume generation cli loading widgets constrained_training "
                                       "trl_contract across_machines trust").split()]


def pytest_configure(config):
    "Values here are a CPU's, of the processes of tests too: a device in sight is seen by `-m cuda` alone"
    asked = (config.getoption("-m") or "").replace("not cuda", "")
    if "cuda" not in asked: os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config, items):
    "Long files first; tests marked `slow` run on request, `cuda` where there is a device"
    import torch
    asked = config.getoption("-m") or ""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    for item in items:
        if "slow" in item.keywords and "slow" not in asked: item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
        if "cuda" in item.keywords and not torch.cuda.is_available(): item.add_marker(pytest.mark.skip(reason="no CUDA device"))
