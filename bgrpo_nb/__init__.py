"""Beam Group Relative Policy Optimization: GRPO whose group is the ranked beams of a beam search, in notebooks

Modules:

- `bgrpo_nb.base.files`: Files that are written whole or not at all, and files that are read while another process writes them.
- `bgrpo_nb.base.processes`: Child processes that end together with the process that started them.
- `bgrpo_nb.base.run_folder`: The folder of a run: what was asked (`config.yaml`), what happened (`metrics.jsonl`), how it ended (`result.json`), and checkpoints in the format of Hugging Face.
- `bgrpo_nb.recipes.wandb_logging`: A run at Weights & Biases (W&B): started, continued after a resume, given panels, and ended.
- `bgrpo_nb.search.beam_tree`: All beams of a prompt as one tree of tokens: the prompt read once, each token written once, for any Hugging Face causal model.
- `bgrpo_nb.search.generation`: Greedy decoding, sampling and beam search that read a prompt once, for any Hugging Face causal model; and a guide to the key-value cache.
- `bgrpo_nb.search.packed_weights`: Linear layers whose weights lie as the processor wants them, for as long as a search runs.
- `bgrpo_nb.solve.result_store`: The result store: files in which an evaluation stores results as they come; a killed process loses one batch at most.
- `bgrpo_nb.study.analysis_figures`: The figures of a table of runs.
- `bgrpo_nb.study.analysis_report`: One HTML file of a table of runs, and beside it the numbers of every table and figure."""

__version__ = "0.1.0"

_PUBLIC = { # module -> names that can be imported from here; a module is loaded when one of its names is asked for
    "algebra.polynomial": "PrefixError Verdict canonical_inner same_inner verify verify_batch",
    "algebra.exact_decomposition": "decompose_exact",
    "algebra.problems": "Problem filter_by_degree generate_multivariate generate_on_singlets generate_problems mix "
                        "read_problems write_problems",
    "search.generation": "Beams beam_search greedy sample",
    "policy.checkpoints": "convert_checkpoint",
    "policy.model": "PRESETS load_model load_tokenizer save_model",
    "learn.rewards": "VerifiedReward",
    "learn.trl_batching": "roll_out trie_logps",
    "learn.trainer": "BGRPOConfig BGRPOTrainer",
    "solve.beam_filter": "filter_by_beams search_problems",
    "solve.decomposition": "Decomposition decompose",
    "solve.decomposition_reward": "decomposition_reward",
    "solve.evaluation": "Report compare evaluate",
    "recipes.train": "TrainConfig train_bgrpo",
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names.split()}

__all__ = sorted(_MODULE_OF)


def __getattr__(name):
    "A public name, imported when it is first asked for: `import bgrpo_nb` alone loads no torch"
    if name not in _MODULE_OF: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__(): return sorted({*globals(), *__all__})
