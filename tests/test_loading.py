"From a name to a policy: what Transformers loads by name, and what is refused in one line before it can do harm"
import json
import os
import re
import shutil
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
import transformers as T
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from bgrpo_nb import BGRPOConfig, BGRPOTrainer, decompose, evaluate, filter_by_beams, generate_problems
from bgrpo_nb.algebra.notation import from_sympy
from bgrpo_nb.policy.checkpoints import convert_checkpoint
from bgrpo_nb.policy.loading import check_finite, describe_policy, find_policy, load_model, read_tokenizer, save_model
from bgrpo_nb.policy.model import decode_completions, encode, load_tokenizer, new_model, tokenize
from bgrpo_nb.recipes.sft import ProblemStream
from bgrpo_nb.search.generation import beam_search
from bgrpo_nb.show.beams import trace_beams, trace_samples
from bgrpo_nb.solve.grammar import PrefixGrammar

WORDS = dict(vocab_size=31, pad_token_id=0, eos_token_id=9, bos_token_id=None)
SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
GROUPED = SHAPE | dict(num_key_value_heads=2, head_dim=8, intermediate_size=48)
FAMILIES = {
    "llama": T.LlamaConfig(**WORDS, **SHAPE, intermediate_size=48),
    "qwen3": T.Qwen3Config(**WORDS, **GROUPED),
    "gpt2": T.GPT2Config(**WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "opt": T.OPTConfig(**WORDS, **SHAPE, ffn_dim=48, word_embed_proj_dim=32),
    "mixtral": T.MixtralConfig(**WORDS, **SHAPE, num_key_value_heads=2, intermediate_size=48, num_local_experts=4),
    "gemma2": T.Gemma2Config(**WORDS, **GROUPED),
    "gpt_oss": T.GptOssConfig(**WORDS, **GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "gptj": T.GPTJConfig(**WORDS, n_embd=32, n_layer=2, n_head=4, rotary_dim=8, n_positions=128),
    "bloom": T.BloomConfig(**WORDS, hidden_size=32, n_layer=2, n_head=4),
    "mpt": T.MptConfig(**WORDS, d_model=32, n_layers=2, n_heads=4, max_seq_len=128),
    "mamba": T.MambaConfig(**WORDS, hidden_size=32, num_hidden_layers=2, state_size=8),
}
EAGER = {"gemma2", "gpt_oss", "gptj", "bloom", "mpt", "mamba"}    # Transformers gives them no sdpa


def saved(folder, config, tokenizer="single", **weights):
    "A policy with random weights, as a folder"
    torch.manual_seed(0)
    return save_model(T.AutoModelForCausalLM.from_config(config, **weights), load_tokenizer(tokenizer), folder)


@pytest.fixture
def llama(tmp_path): return saved(tmp_path / "llama", FAMILIES["llama"])


@pytest.fixture(scope="module")
def problems(): return generate_problems(4, 2, 2, seed=3, canonical=True)


# Families and attention

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:.*has no sdpa")
def test_every_family_loads_as_it_was_saved(tmp_path, family):
    folder = saved(tmp_path / family, FAMILIES[family])
    found = load_model(folder, device="cpu")
    stock = T.AutoModelForCausalLM.from_pretrained(folder)
    assert type(found) is type(stock) and not found.training and found.dtype == torch.float32
    for a, b in zip(found.state_dict().values(), stock.state_dict().values(), strict=True): assert torch.equal(a, b)
    assert found.config._attn_implementation == ("eager" if family in EAGER else "sdpa")


def test_auto_says_that_it_chose_eager(tmp_path):
    folder = saved(tmp_path / "mpt", FAMILIES["mpt"])
    with pytest.warns(UserWarning, match="MptForCausalLM has no sdpa"): load_model(folder, device="cpu")
    with pytest.raises(ValueError, match="scaled_dot_product"): load_model(folder, "cpu", attn_implementation="sdpa")


def test_an_encoder_decoder_is_refused(tmp_path):
    config = T.T5Config(d_model=32, num_layers=2, num_heads=4, d_ff=48, d_kv=8, vocab_size=31)
    T.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="encoder-decoder"): load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("asked, found", [(None, "float32"), ("bfloat16", "bfloat16"), (torch.bfloat16, "bfloat16"),
                                          ("float16", "float16"), ("auto", "bfloat16")], ids=str)
def test_precision(tmp_path, asked, found):
    folder = saved(tmp_path, FAMILIES["llama"], dtype=torch.bfloat16)
    assert load_model(folder, device="cpu", dtype=asked).dtype == getattr(torch, found)


# Names

def test_bundled_before_folder_before_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "Qwen/mine", "empty"): Path(name).mkdir(parents=True)
    assert (find_policy("tiny") / "training.json").is_file()                 # the bundled one, not the folder here
    assert find_policy("Qwen/mine") == Path("Qwen/mine") and find_policy("./tiny") == Path("tiny")
    assert find_policy("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    for name in ("nowhere", "gpt2", "a/b/c", "/no/such", "../x", "runs/model.pt", "x" * 5000, "a\0b"):
        assert find_policy(name) is None, name


@pytest.mark.parametrize("name", ["nowhere", "x" * 5000, "a\0b", "loop", "loop/deeper", "file", "empty"])
def test_a_name_that_leads_nowhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.symlink("loop", "loop")
    Path("file").write_text("{}")
    Path("empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no model at|cannot be reached") as error: load_model(name)
    assert "\n" not in str(error.value)
    with pytest.raises((FileNotFoundError, ValueError)) as error: load_tokenizer(name)
    assert "\n" not in str(error.value)


def in_new_process(code, cwd, **env):
    "Run Python code in a process of its own, which would say yes to every question"
    env = os.environ | dict(PYTHONPATH=str(Path(__file__).parent.parent), HF_HOME=str(cwd / "hf")) | env
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, input="y\n" * 50, text=True,
                          capture_output=True, timeout=900)


HUB_LOAD = """
import time
from bgrpo_nb.policy.model import load_model, load_tokenizer
slept = []
time.sleep = slept.append
for load in (load_model, load_tokenizer):
    try: print(type(load("someone/policy")).__name__)
    except FileNotFoundError as e: print(str(e).replace(chr(10), "NEWLINE"))
print(sum(slept) < 10)
"""


@pytest.mark.parametrize("offline", ["0", "1"])
def test_an_unreachable_hub_is_one_line_without_long_waits(tmp_path, offline):
    done = in_new_process(HUB_LOAD, tmp_path, HF_HUB_OFFLINE=offline, HF_ENDPOINT="http://127.0.0.1:9")
    model, tokenizer, short = done.stdout.splitlines()
    assert short == "True" and model == tokenizer and "NEWLINE" not in model
    assert model.startswith("no model at someone/policy: no such folder, the hub cannot be reached")
    assert "Retrying" not in done.stderr


class Hub(BaseHTTPRequestHandler):
    "The part of the hub that serves files of one model"
    folder = None

    def do_HEAD(self): self.answer(False)
    def do_GET(self): self.answer(True)

    def answer(self, body):
        found = re.fullmatch(r"/someone/policy/resolve/[^/]+/(\S+)", self.path)
        file = self.folder / found[1] if found else None
        content = file.read_bytes() if file and file.is_file() else b""
        self.send_response(200 if content else 404)
        if content: self.send_header("ETag", f'"{file.name}-{len(content)}"')
        else: self.send_header("X-Error-Code", "EntryNotFound" if found else "RepoNotFound")
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body: self.wfile.write(content)

    def log_message(self, *_): pass


def test_a_hub_id_is_passed_on_and_kept(tmp_path, llama):
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Ours", (Hub,), dict(folder=llama)))
    Thread(target=server.serve_forever, daemon=True).start()
    hub = dict(HF_HUB_OFFLINE="0", HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_DISABLE_XET="1")
    try:
        other = in_new_process(HUB_LOAD.replace("someone/policy", "someone/else"), tmp_path, **hub)
        assert other.stdout.count("the hub gives no model 'someone/else'") == 2, other.stdout + other.stderr[-2000:]
        online = in_new_process(HUB_LOAD, tmp_path, **hub)
    finally: server.shutdown(), server.server_close()
    assert online.stdout.split()[:1] == ["LlamaForCausalLM"], online.stdout + online.stderr[-2000:]
    without = in_new_process(HUB_LOAD, tmp_path, **hub)               # the server is gone, its files are in the cache
    assert without.stdout == online.stdout, without.stderr[-2000:]


# Weights that do not fit

def with_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.mark.parametrize("fields", [
    dict(num_hidden_layers=1), dict(num_hidden_layers=3), dict(num_hidden_layers=10**6), dict(num_hidden_layers=-1),
    dict(num_hidden_layers="2"), dict(hidden_size=64), dict(hidden_size=10**6), dict(hidden_size=10**30),
    dict(vocab_size=32), dict(vocab_size=10**12), dict(intermediate_size=49), dict(num_attention_heads=0),
    dict(num_attention_heads="2"), dict(num_attention_heads=-2), dict(num_key_value_heads=2), dict(model_type="own"),
    dict(model_type="gpt2", architectures=["GPT2LMHeadModel"]), dict(model_type=["llama"]), dict(hidden_size=None),
    dict(architectures=["Trainer"], model_type="nothing"),
], ids=str)
def test_a_config_that_does_not_fit_is_one_line_and_takes_no_memory(llama, fields):
    started = time.process_time()
    with pytest.raises(ValueError, match="do not fit|can be loaded") as error:
        load_model(with_config(llama, **fields), device="cpu")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert time.process_time() - started < 10


def test_a_million_layers_take_no_memory(llama):
    code = f"""
import resource, torch
from bgrpo_nb.policy.model import load_model
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for folder in {[str(with_config(Path(shutil.copytree(llama, llama / name)), **fields)) for name, fields in
                [("deep", dict(num_hidden_layers=10**6)), ("wide", dict(intermediate_size=10**9))]]}:
    try: load_model(folder, "cpu")
    except ValueError as e: print(e)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000)
"""
    done = in_new_process(code, llama)
    assert done.stdout.count("asks for") == 2 and done.stdout.endswith("True\n"), done.stdout + done.stderr[-500:]


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "gone", "foreign", "deep", "list"])
def test_damaged_files_are_one_line(llama, damage):
    weights, config = llama / "model.safetensors", llama / "config.json"
    if damage == "cut": weights.write_bytes(weights.read_bytes()[:5000])
    if damage == "empty": weights.write_bytes(b"")
    if damage == "text": weights.write_text("no weights")
    if damage == "gone": weights.unlink()
    if damage == "foreign": shutil.copy(saved(llama / "x", FAMILIES["gpt2"]) / "model.safetensors", weights)
    if damage == "deep": config.write_text("[" * 100_000)
    if damage == "list": config.write_text("[]")
    with pytest.raises(ValueError, match="do not fit|can be loaded") as error: load_model(llama, device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{}", "[]", "", "null", '{"model": {"type": "BPE"}}', "[" * 100_000])
def test_a_tokenizer_file_without_a_tokenizer(llama, content):
    (llama / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="holds no tokenizer") as error: load_tokenizer(llama)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_are_no_numbers(tmp_path, problems, value, dtype):
    model, tokenizer = new_model("tiny", num_hidden_layers=1), load_tokenizer("single")
    check_finite(model)
    model.model.layers[0].mlp.up_proj.weight.data[3, 4] = value
    with pytest.raises(ValueError, match="no finite numbers.*up_proj"): evaluate(model, tokenizer, problems)
    save_model(model, tokenizer, tmp_path, dtype=dtype)
    with pytest.raises(ValueError, match="no finite numbers.*up_proj"): load_model(tmp_path, device="cpu")


# No code from files

# Adapters, which need the policy that they were trained on

@pytest.fixture
def adapters(tmp_path, llama):
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(load_model(llama, device="cpu"), LoraConfig(r=2, target_modules=["q_proj"]))
    return save_model(model, load_tokenizer("single"), tmp_path / "adapters")


def test_adapters_are_another_policy_where_their_base_is(llama, adapters):
    "A resumed run compares its start by this"
    before, content = describe_policy(adapters), (llama / "model.safetensors").read_bytes()
    assert describe_policy(adapters) == before and before["sha256"] != describe_policy(llama)["sha256"]
    (llama / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert describe_policy(adapters)["sha256"] != before["sha256"]


@pytest.mark.parametrize("base,says", [*zip(("", None, "itself"), ["name no whole model"] * 3),
                                       ("somewhere/gone/long ago", "no model at")])
def test_adapters_without_their_base_are_one_line(adapters, base, says):
    path = adapters / "adapter_config.json"
    named = str(adapters) if base == "itself" else base
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(base_model_name_or_path=named)))
    with pytest.raises((FileNotFoundError, ValueError), match=says) as error: load_model(adapters, device="cpu")
    assert "\n" not in str(error.value)
    for torn in ("{", "{}", "[]"):
        path.write_text(torn)
        for read in (load_model, describe_policy):
            with pytest.raises(ValueError, match="can be loaded") as error: read(adapters)
            assert "\n" not in str(error.value)


OWN_CODE = "open('MARK', 'w')\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M, LlamaTokenizer as K\n"


@pytest.mark.parametrize("kind", ["own", "llama"])
def test_a_folder_does_not_run_its_code(tmp_path, llama, kind):
    (llama / "code.py").write_text(OWN_CODE)
    with_config(llama, model_type=kind, auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    path = llama / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(tokenizer_class="K",
                                                                   auto_map={"AutoTokenizer": ["code.K", None]})))
    code = f"""
from bgrpo_nb import BGRPOTrainer, BGRPOConfig, evaluate, decompose
from bgrpo_nb.policy.model import load_model, load_tokenizer
def train(folder):
    return BGRPOTrainer(folder, lambda **k: [1.0], BGRPOConfig("out", use_cpu=True, beta=0.1))
for load in (load_model, load_tokenizer, train, lambda f: decompose("x**4", f)):
    try: load({str(llama)!r})
    except Exception as e: print(type(e).__name__, e)
"""
    done = in_new_process(code, tmp_path)
    assert not list(tmp_path.rglob("MARK")) and "Do you wish" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if kind == "own": assert done.stdout.count("trust_remote_code=True") == 4, done.stdout


def test_code_runs_where_the_caller_asks(tmp_path, llama):
    (llama / "code.py").write_text(OWN_CODE.replace("'MARK'", repr(str(tmp_path / "MARK"))))
    with_config(llama, model_type="own", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    code = f"from bgrpo_nb.policy.model import *; load_model({str(llama)!r}, 'cpu', trust_remote_code=True)"
    done = in_new_process(code, tmp_path)
    assert (tmp_path / "MARK").exists(), done.stderr[-1000:]


class Hostile:
    "A pickle that makes a file when it is read"
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return os.mkdir, (str(self.mark),)


def test_a_pickle_is_not_run(tmp_path, llama):
    mark = tmp_path / "MARK"
    torch.save({"tok_emb.weight": Hostile(mark)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        convert_checkpoint(tmp_path / "model.pt", tmp_path / "out", {"n_head": 2})
    (llama / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Hostile(mark), "more": torch.ones(99_999)}, llama / "pytorch_model.bin")
    with pytest.raises(ValueError, match="can be loaded"): load_model(llama, device="cpu")
    assert not mark.exists()
    with pytest.raises(Exception): torch.load(tmp_path / "model.pt", weights_only=True)
    torch.load(tmp_path / "model.pt", weights_only=False)                 # the same file, read without care
    assert mark.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pending_0_of_1.pt", "training_args.bin"])
def test_a_checkpoint_does_not_run_code(tmp_path, llama, name):
    def trainer(steps):
        args = BGRPOConfig(str(tmp_path / "run"), use_cpu=True, prompts_per_step=2, num_generations=2, max_steps=steps,
                           max_completion_length=3, save_steps=1, disable_tqdm=True, save_total_limit=5)
        return BGRPOTrainer(llama, lambda completion_ids, **_: [float(len(c)) for c in completion_ids], args,
                            Dataset.from_dict({"prompt": ["a ⁇", "^ a P 2 ⁇"]}))
    trainer(1).train()
    checkpoint = tmp_path / "run/checkpoint-1"
    if name != "pending_0_of_1.pt": assert (checkpoint / name).is_file()
    torch.save(Hostile(tmp_path / "MARK"), checkpoint / name)
    try: trainer(2).train(resume_from_checkpoint=str(checkpoint))
    except Exception: pass                                                # refused, or the file is not read
    assert not (tmp_path / "MARK").exists()


def expression(mark): return f"__import__('os').mkdir({str(mark)!r})"


@pytest.mark.parametrize("wrap", [list, tuple, set, frozenset, lambda x: {x[0]: 1}, lambda x: {1: x[0]}, lambda x: [x],
                                  lambda x: __import__("numpy").array(x, dtype=object),
                                  lambda x: __import__("numpy").array(x[0], dtype=object),
                                  lambda x: __import__("numpy").array(x), lambda x: x[0], lambda x: x[0].encode()])
def test_text_inside_of_a_value_is_not_evaluated(tmp_path, wrap):
    mark = tmp_path / "MARK"
    value = wrap([expression(mark)])
    for read in (from_sympy, decompose):
        with pytest.raises(ValueError) as error: read(value)              # PrefixError is a ValueError
        assert "\n" not in str(error.value)
    assert not mark.exists()


@pytest.mark.parametrize("file, command", [
    ("data.csv", "analyze data.csv"), ("data.json", "analyze data.json"), ("data.yaml", "sweep data.yaml --dry-run"),
    ("data.yaml", "train --config data.yaml"), ("data.txt", "evaluate --problems data.txt"),
    ("data.txt", "filter --problems data.txt --output kept.txt"), ("run/config.yaml", "analyze run"),
])
def test_files_do_not_run_code(tmp_path, monkeypatch, file, command):
    from bgrpo_nb.cli import main
    mark = tmp_path / "MARK"
    monkeypatch.chdir(tmp_path)
    call = expression(mark)
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "run" / "metrics.jsonl").parent.mkdir(exist_ok=True)
    contents = {
        ".csv": f'State,learning_rate,config\nfinished,"{call}","{call}"\nfinished,1,"[{call}]"\n',
        ".json": json.dumps([dict(state="finished", config={"lr": call}, summary={"metric": call})]),
        ".txt": f"{call} ⁇\n+ P 1 {call} : a ⁇\n",
    }
    yaml = [f"learning_rate: !!python/object/apply:os.mkdir ['{mark}']\n", f'learning_rate: "{call}"\n']
    for content in [contents[path.suffix]] if path.suffix in contents else yaml:
        path.write_text(content)
        try: main(command.split())
        except SystemExit: pass                                           # with whatever status
        assert not mark.exists()


def test_these_texts_would_run(tmp_path):
    "What the two tests above give to this package does harm where it is read without care"
    import sympy
    import yaml
    sympy.sympify([expression(tmp_path / "a")])
    yaml.unsafe_load(f"learning_rate: !!python/object/apply:os.mkdir ['{tmp_path / 'b'}']")
    assert (tmp_path / "a").is_dir() and (tmp_path / "b").is_dir()


def test_no_reader_evaluates():
    "Nothing in the package unpickles, runs text as Python, or reads YAML that may build objects"
    package = Path(__file__).parent.parent / "bgrpo_nb"
    forbidden = re.compile(r"(?<![\w.])(eval|exec|compile)\(|pickle|joblib|yaml\.(unsafe_|full_)?load\((?!.*_[lL]oader)|"
                           r"weights_only=False|allow_pickle=True|sympify\((?!.*strict=True)|parse_expr|\.(query|eval)\(['\"]|"
                           r"trust_remote_code=True[^\")]*\)|os\.system|shell=True")
    found = [f"{path.name}: {line.strip()}" for path in package.rglob("*.py") if path.name != "_modidx.py"
             for line in path.read_text(encoding="utf-8").splitlines() if forbidden.search(line)]
    assert not found, found
    loads = [line for path in package.rglob("*.py") for line in path.read_text().splitlines() if "torch.load(" in line]
    assert loads and all("weights_only=True" in line for line in loads)


# The authors' checkpoints

def authors(folder, **changes):
    "A small state dict in the authors' format, with some tensors replaced (None: left out)"
    model = new_model("paper", position="learned", hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
                      max_position_embeddings=16)
    convert_checkpoint(save_model(model, load_tokenizer("single"), folder / "hf"), folder / "model.pt")
    state = torch.load(folder / "model.pt", weights_only=True) | changes
    torch.save({name: x for name, x in state.items() if x is not None}, folder / "model.pt")
    return folder / "model.pt"


@pytest.mark.parametrize("heads", [0, "2", -2, 3, True, 2.0, None, [2]], ids=str)
def test_heads_that_cannot_be(tmp_path, heads):
    with pytest.raises(ValueError, match="n_head=.*does not divide a width of 8"):
        convert_checkpoint(authors(tmp_path), tmp_path / "out", {"n_head": heads})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "[]", "3", "{}", "[" * 100_000])
def test_a_configuration_beside_the_file_that_says_nothing(tmp_path, content):
    source = authors(tmp_path)
    (tmp_path / "model_configuration.json").write_text(content)
    with pytest.raises(ValueError, match="n_head"): convert_checkpoint(source, tmp_path / "out")


@pytest.mark.parametrize("changes, message", [
    ({"blocks.999999999.ln1.weight": torch.ones(8)}, "has a block of number 999999999"),
    ({"blocks.2.ln1.weight": torch.ones(8)}, "lacks blocks.2"),
    ({"blocks.1.ln1.weight": None}, "lacks blocks.1.ln1.weight"),
    ({"more.weight": torch.ones(8)}, "has surplus more.weight"),
    ({"tok_emb.weight": torch.zeros(1).expand(31, 10**10)}, "larger tensors than a file"),
    ({"pos_emb": torch.ones(8)}, "pos_emb of shape"), ({"pos_emb": torch.ones(())}, "pos_emb of shape"),
    ({"head.weight": torch.full((31, 8), torch.nan)}, "no finite numbers"),
    ({"head.weight": torch.ones(31, 8, dtype=torch.long)}, "floating-point"), ({"head.weight": "text"}, "something else"),
    ({"head.weight": torch.ones(31, 9)}, "does not fit its configuration"),
], ids=str)
def test_state_dicts_that_are_no_model(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        convert_checkpoint(authors(tmp_path, **changes), tmp_path / "out", {"n_head": 2})
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_convert_does_not_replace_its_source(tmp_path):
    authors(tmp_path)
    for source, destination in ((tmp_path / "hf", tmp_path / "hf/model.safetensors"),):
        before = destination.read_bytes()
        with pytest.raises(ValueError, match="in the folder of its source"): convert_checkpoint(source, destination)
        assert destination.read_bytes() == before
    theirs = convert_checkpoint(tmp_path / "hf", tmp_path / "theirs/model.safetensors")
    before = theirs.read_bytes()
    with pytest.raises(ValueError, match="in the folder of its source"): convert_checkpoint(theirs, tmp_path / "theirs")
    assert theirs.read_bytes() == before


# Tokenizers

TEXTS = ["+ P 1 * N 2 ^ a P 2 ⁇", "^ a P 4 ⁇", "what is 3 + 4?", "the number after three is four"]


def trained(kind):
    "A tokenizer of each kind that AutoTokenizer reads, trained on four lines"
    if kind == "wordlevel":
        vocabulary = sorted({word for text in TEXTS for word in text.split()})
        t = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*vocabulary, "<unk>", "<s>", "</s>"])}, unk_token="<unk>"))
        t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return t
    special = ["<unk>", "<s>", "</s>"]
    if kind == "byte-level":
        t, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if kind == "bpe":
        t, trainer = Tokenizer(models.BPE(unk_token="<unk>")), trainers.BpeTrainer(vocab_size=100, special_tokens=special)
        t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    if kind == "unigram":
        t = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>")
        t.pre_tokenizer, t.decoder, t.normalizer = pre_tokenizers.Metaspace(), decoders.Metaspace(), normalizers.NFC()
    t.train_from_iterator(TEXTS * 20, trainer)
    return t


KINDS = ["wordlevel", "byte-level", "bpe", "unigram"]


def with_tokenizer(folder, kind, bos=False, **special):
    "A policy whose folder has a tokenizer of another kind, without a padding token"
    backend = trained(kind)
    if bos: backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    tokenizer = T.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>",
                                          unk_token="<unk>", padding_side="right", **special)
    size = -(-len(tokenizer) // 64) * 64                                # padded, as vocabularies are
    config = T.LlamaConfig(**SHAPE, intermediate_size=48, vocab_size=size, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    return save_model(T.LlamaForCausalLM(config), tokenizer, folder)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_one_tokenization(tmp_path, kind, bos):
    "The ids of TRL's own method are those of `encode`, of SFT's prompts, and of the search of an evaluation"
    folder = with_tokenizer(tmp_path / "policy", kind, bos)
    args = BGRPOConfig(str(tmp_path / "run"), use_cpu=True, prompts_per_step=2, num_generations=2, max_steps=1,
                       max_completion_length=3, save_strategy="no", disable_tqdm=True)
    def reward(completion_ids, **_): return [float(len(ids)) for ids in completion_ids]
    trainer = BGRPOTrainer(str(folder), reward, args, Dataset.from_dict({"prompt": TEXTS}))
    tokenizer = trainer.processing_class
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id == tokenizer.eos_token_id
    theirs = trainer._tokenize_prompts(TEXTS)[0]
    assert tokenize(tokenizer, TEXTS) == theirs and (theirs[0][0] == tokenizer.bos_token_id) == bos
    batch = encode(tokenizer, TEXTS)
    assert [row[mask.bool()].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask)] == theirs
    assert batch.attention_mask[:, -1].all()                            # padded on the left
    problem = generate_problems(1, 2, 2, seed=3)[0]._replace(expanded="^ a P 4", answer="^ a P 2")
    stream = ProblemStream([problem], tokenizer)
    prompt, row = trainer._tokenize_prompts([problem.prompt])[0][0], stream.rows[0].tolist()
    assert row[:stream.prompt_lengths[0]] == prompt and row[-1] == tokenizer.eos_token_id
    assert row.count(tokenizer.bos_token_id) == bos                     # and none inside
    assert decode_completions(tokenizer, [row[len(prompt):]])[0].split() == problem.answer.split()
    trainer.train()


@pytest.mark.parametrize("kind", KINDS)
def test_text_there_and_back(tmp_path, kind):
    tokenizer = read_tokenizer(with_tokenizer(tmp_path, kind))
    rows = [[*ids, tokenizer.eos_token_id] for ids in tokenize(tokenizer, TEXTS, special_tokens=False)]
    assert [text.split() for text in decode_completions(tokenizer, rows)] == [text.split() for text in TEXTS]
    assert decode_completions(tokenizer, [rows[0][:-1], [tokenizer.eos_token_id]]) == [None, ""]


@pytest.mark.parametrize("kind", ["wordlevel", "bpe", "unigram"])
def test_an_unknown_word_is_named_not_replaced(tmp_path, kind):
    tokenizer = read_tokenizer(with_tokenizer(tmp_path, kind))
    with pytest.raises(ValueError, match="the word 'Ж9' is not in this vocabulary"): encode(tokenizer, ["+ P Ж9 ⁇"])


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    T.PreTrainedTokenizerFast(tokenizer_object=trained("bpe"), unk_token="<unk>").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no end token"): read_tokenizer(tmp_path)


def test_the_lookup_is_the_tokenizer():
    "Word-level ids are looked up; with a template, a normalizer or another model the tokenizer decides"
    for kind in KINDS:
        tokenizer = T.PreTrainedTokenizerFast(tokenizer_object=trained(kind), unk_token="<unk>", eos_token="</s>")
        assert tokenize(tokenizer, TEXTS) == tokenizer(TEXTS).input_ids
    lower = trained("wordlevel")
    lower.normalizer = normalizers.Lowercase()
    tokenizer = T.PreTrainedTokenizerFast(tokenizer_object=lower, eos_token="</s>")
    assert tokenize(tokenizer, ["WHAT is"]) == tokenize(tokenizer, ["what is"])


# A vocabulary padded beyond the tokenizer

@pytest.fixture
def padded(tmp_path):
    "A policy of 64 ids for 31 words, which likes the ids without a word"
    torch.manual_seed(0)
    model = T.LlamaForCausalLM(T.LlamaConfig(**WORDS | dict(vocab_size=64), **SHAPE, intermediate_size=48)).eval()
    folder = save_model(model, load_tokenizer("single"), tmp_path / "padded")
    return load_model(folder, device="cpu"), load_tokenizer(folder), folder


def test_ids_without_a_word_are_never_part_of_an_answer(padded):
    _, tokenizer, _ = padded
    assert decode_completions(tokenizer, [[20, 1, 40, 16, 23, 9], [1, 9]]) == ["^ a <40> P 2", "a"]
    assert not any(verdict for verdict in [evaluate_text("^ a <40> P 2")])


def evaluate_text(text):
    from bgrpo_nb import verify
    return verify("^ a P 4", text)


def test_every_tool_works_with_a_padded_vocabulary(padded, problems):
    model, tokenizer, folder = padded
    report = evaluate(model, tokenizer, problems, num_beams=4, wide_beams=6, num_samples=3, max_new_tokens=8)
    assert len(report) == 4
    assert len(filter_by_beams(model, tokenizer, problems, num_beams=4, max_new_tokens=8).searched) == 4
    for trace in (trace_beams(model, tokenizer, problems[0], 6, max_new_tokens=8),
                  trace_samples(model, tokenizer, problems[0], 20, max_new_tokens=8)):
        from bgrpo_nb.show.beams import draw_tree
        assert any(path[-1] > 30 for path in trace.nodes if path) and draw_tree(trace).data
    assert decompose("x**4 + 2*x**2 + 1", folder)[0].exact
    assert decompose("x**4 + 2*x**2 + 1", model)[0].exact              # its folder has its tokenizer
    model.config._name_or_path = ""
    with pytest.raises(ValueError, match="policy of 64 words"): decompose("x**4 + 2*x**2 + 1", model)


def test_the_grammar_with_a_padded_vocabulary(padded, problems):
    model, tokenizer, _ = padded
    prompt = encode(tokenizer, [problems[0].prompt])
    P = prompt.input_ids.shape[1]
    how = dict(num_beams=6, max_new_tokens=8, eos_token_id=9, pad_token_id=0)
    found = beam_search(model, **prompt, logits_processor=PrefixGrammar(tokenizer, P), **how)
    free = beam_search(model, **prompt, **how)
    assert (free.sequences > 30).any() and not (found.sequences > 30).any()
    exact = PrefixGrammar(tokenizer, P)(prompt.input_ids, torch.zeros(1, 31))
    assert torch.equal(PrefixGrammar(tokenizer, P)(prompt.input_ids, torch.zeros(1, 64))[:, :31], exact)
    with pytest.raises(ValueError, match="31 tokens and the model only 20"):
        PrefixGrammar(tokenizer, P)(prompt.input_ids, torch.zeros(1, 20))


def test_the_grammar_with_other_tokenizers(tmp_path):
    for kind in ("byte-level", "bpe", "unigram"):
        tokenizer = read_tokenizer(with_tokenizer(tmp_path / kind, kind))
        with pytest.raises(ValueError, match="tokens that are whole words"): PrefixGrammar(tokenizer, 0)
    tokenizer = read_tokenizer(with_tokenizer(tmp_path / "w", "wordlevel"))
    allowed = PrefixGrammar(tokenizer, 0)(torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 64))[0] == 0
    words = {token for token, i in tokenizer.get_vocab().items() if allowed[i]}
    assert not words & {"<unk>", "<s>", "</s>"} and {"+", "^", "a", "P"} <= words


# The trainer, by name

def by_name(model, tmp_path, steps=1, beta=0.1, quantization_config=None, **settings):
    args = BGRPOConfig(str(tmp_path / "run"), use_cpu=True, prompts_per_step=2, num_generations=4, max_steps=steps,
                       max_completion_length=4, save_strategy="no", disable_tqdm=True, beta=beta, bf16=False, **settings)
    def reward(completion_ids, **_): return [float(ids[0] % 2) for ids in completion_ids]
    more = dict(quantization_config=quantization_config) if quantization_config else {}
    return BGRPOTrainer(model, reward, args, Dataset.from_dict({"prompt": ["a ⁇", "^ a P 2 ⁇"]}), **more)


@pytest.mark.parametrize("settings", [None, dict(dtype="bfloat16"), dict(dtype="auto"), dict(dtype="float32"),
                                      dict(torch_dtype="bfloat16"), dict(attn_implementation="eager"), dict(dtype="bfloat16", use_cache=False)], ids=str)
def test_policy_and_reference_are_one_model_at_the_first_step(tmp_path, settings):
    folder = saved(tmp_path / "policy", FAMILIES["llama"], dtype=torch.bfloat16)
    trainer = by_name(str(folder), tmp_path, model_init_kwargs=settings)
    policy, reference = trainer.model, trainer.ref_model
    asked = (settings or {}).get("torch_dtype") or (settings or {}).get("dtype", "float32")
    wanted = {"auto": "bfloat16"}.get(asked, asked)
    assert policy.dtype == reference.dtype == getattr(torch, wanted)
    attention = (settings or {}).get("attn_implementation", "sdpa")
    assert policy.config._attn_implementation == reference.config._attn_implementation == attention
    for a, b in zip(policy.state_dict().values(), reference.state_dict().values(), strict=True): assert torch.equal(a, b)
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == 0


@pytest.mark.parametrize("family", ["gemma2", "gptj", "bloom", "mpt", "gpt_oss"])
@pytest.mark.filterwarnings("ignore")
def test_families_without_sdpa_train_by_name(tmp_path, family):
    trainer = by_name(str(saved(tmp_path / family, FAMILIES[family])), tmp_path)
    assert trainer.model.config._attn_implementation == trainer.ref_model.config._attn_implementation == "eager"
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)


def test_settings_of_loading_reach_both_models_or_are_refused(tmp_path, llama):
    with pytest.raises(ValueError, match="dtyp"): by_name(llama, tmp_path, model_init_kwargs=dict(dtyp="bfloat16"))
    with pytest.raises(ValueError, match="dtype='int8'"): by_name(llama, tmp_path, model_init_kwargs=dict(dtype="int8"))
    model = load_model(llama, device="cpu")
    with pytest.raises(ValueError, match="asks for dtype=bfloat16, and the model in memory has float32"):
        by_name(model, tmp_path, model_init_kwargs=dict(dtype="bfloat16"))
    with pytest.raises(ValueError, match="attn_implementation=eager"):
        by_name(model, tmp_path, model_init_kwargs=dict(attn_implementation="eager"))
    by_name(model, tmp_path, model_init_kwargs=dict(dtype="float32"))
    with pytest.raises(ValueError, match="asks for dtype=bfloat16, and the model in memory has float32"):
        by_name(model, tmp_path, model_init_kwargs=dict(torch_dtype="bfloat16"))
    with pytest.raises(ValueError, match="model_init_kwargs has num_hidden_layers, which load a model"):
        by_name(model, tmp_path, model_init_kwargs=dict(num_hidden_layers=1))
    assert load_model(llama, device="cpu", torch_dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="one setting"): load_model(llama, dtype="float32", torch_dtype="bfloat16")
    with pytest.raises(ValueError, match="dtype and torch_dtype"):
        by_name(llama, tmp_path, model_init_kwargs=dict(dtype="float32", torch_dtype="bfloat16"))
    bits = T.BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match="in memory already"): by_name(model, tmp_path, quantization_config=bits)
    with pytest.raises(ValueError, match="bitsandbytes"): by_name(llama, tmp_path, quantization_config=bits)
    with pytest.raises(ValueError, match="given to the trainer and in model_init_kwargs"):
        by_name(llama, tmp_path, quantization_config=bits, model_init_kwargs=dict(quantization_config=bits))


def test_quantization_reaches_from_pretrained(tmp_path, llama, monkeypatch):
    "No package here quantizes on a CPU, so it is seen what both models would be loaded with"
    seen, original = [], T.LlamaForCausalLM.from_pretrained
    def watched(*args, quantization_config=None, **settings):
        seen.append(quantization_config)
        return original(*args, **settings)
    monkeypatch.setattr(T.LlamaForCausalLM, "from_pretrained", watched)
    bits = T.BitsAndBytesConfig(load_in_8bit=True)
    by_name(llama, tmp_path, quantization_config=bits)
    assert seen == [bits, bits]


def test_training_by_command_obeys_the_settings(tmp_path, llama):
    from bgrpo_nb import TrainConfig, train_bgrpo
    config = TrainConfig(model=str(llama), output_dir=str(tmp_path / "run"), num_problems=4, held_out=0, degrees="2_2",
                         prompts_per_step=2, num_generations=2, max_steps=1, max_completion_length=3, use_cpu=True,
                         beta=0.1, model_init_kwargs=dict(dtype="bfloat16"), disable_tqdm=True, save_strategy="no")
    train_bgrpo(config)
    saved = json.loads((tmp_path / "run/policy/config.json").read_text())
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert saved["dtype"] == "bfloat16" and first["kl"] == 0
