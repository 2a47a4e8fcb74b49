"""Beam Group Relative Policy Optimization: GRPO whose group is the ranked beams of a beam search, in notebooks

Modules:

- `bgrpo_nb.algebra.notation`: What people type, what SymPy computes with, what papers and pages print: each from prefix notation, and back.
- `bgrpo_nb.algebra.polynomial`: Prefix notation, and the algebra that says whether an answer decomposes a polynomial.
- `bgrpo_nb.algebra.problems`: Make, read, write, filter, mix and split decomposition problems.
- `bgrpo_nb.base.files`: Files that are written whole or not at all, and files that are read while another process writes them.
- `bgrpo_nb.base.processes`: Child processes that end together with the process that started them.
- `bgrpo_nb.base.run_folder`: The folder of a run: what was asked (`config.yaml`), what happened (`metrics.jsonl`), how it ended (`result.json`), and checkpoints in the format of Hugging Face.
- `bgrpo_nb.cli`: `bgrpo demo | generate | sft | filter | train | evaluate | plot | sweep | analyze | convert`
- `bgrpo_nb.learn.exact_resume`: A `GRPOTrainer` that was killed goes on as it would have gone on: the same prompts, the same completions, the same loss.
- `bgrpo_nb.learn.rewards`: What a right answer is worth in place k of a beam search, and how a group of rewards becomes a group of advantages.
- `bgrpo_nb.learn.trainer`: TRL's `GRPOTrainer` with ranked beams for a group: what BGRPO changes, and nothing else.
- `bgrpo_nb.learn.trl_batching`: From rows that repeat a prompt to one beam search a prompt; from K full rows back to one forward over their trie.
- `bgrpo_nb.recipes.wandb_logging`: A run at Weights & Biases (W&B): started, continued after a resume, given panels, and ended.
- `bgrpo_nb.search.beam_tree`: All beams of a prompt as one tree of tokens: the prompt read once, each token written once, for any Hugging Face causal model.
- `bgrpo_nb.search.generation`: Greedy decoding, sampling and beam search that read a prompt once, for any Hugging Face causal model; and a guide to the key-value cache.
- `bgrpo_nb.search.packed_weights`: Linear layers whose weights lie as the processor wants them, for as long as a search runs.
- `bgrpo_nb.show.run_explorers`: Start a training and watch it, ask a sweep which setting mattered; every picture is a plain function's, too.
- `bgrpo_nb.show.widgets`: Move a slider and see what a search finds and what a training step teaches; every picture is a plain function's, too.
- `bgrpo_nb.solve.beam_filter`: Keep the problems whose answer is among the top beams: hard enough to teach, not too hard to find.
- `bgrpo_nb.solve.evaluation`: What a policy can do greedily, with beams and with samples; every figure with its interval, every difference with its own.
- `bgrpo_nb.solve.result_store`: What an evaluation has found, kept as it comes: one line a problem, one file for each policy, problems and settings.
- `bgrpo_nb.study.analysis`: From finished runs to one table, and from the table to what may be said: which setting is better, by how much, and whether chance would do the same.
- `bgrpo_nb.study.launcher`: Starts, watches and ends the processes of a sweep: Optuna workers, or W&B agents and the trials they ask for.
- `bgrpo_nb.study.sweeps`: One sweep file in W&B's schema, read strictly: what it means, what is wrong with it, and the plan that it makes.
- `bgrpo_nb.study.trials`: A plan is carried out: each point claimed by one worker, run as a process, judged, and run again where its worker died. Nothing planned is lost."""

__version__ = "0.1.0"

_PUBLIC = { # module -> names that can be imported from here; a module is loaded when one of its names is asked for
    "algebra.polynomial": "PrefixError Verdict canonical_inner decompose_exact same_inner verify verify_batch",
    "algebra.problems": "Problem filter_by_degree generate_multivariate generate_on_singlets generate_problems mix "
                        "read_problems write_problems",
    "search.generation": "Beams beam_search greedy sample",
    "policy.model": "PRESETS load_model load_tokenizer save_model",
    "policy.checkpoints": "convert_checkpoint",
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
