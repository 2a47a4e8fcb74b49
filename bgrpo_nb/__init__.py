"""Beam Group Relative Policy Optimization: GRPO whose group is the ranked beams of a beam search, in notebooks

Modules:

- `bgrpo_nb.analysis`: From finished runs to one table, and from the table to what may be said: which setting is better, by how much, and whether chance would do the same.
- `bgrpo_nb.beam_filter`: Keep the problems whose answer is among the top beams: hard enough to teach, not too hard to find.
- `bgrpo_nb.beam_tree`: All beams of a prompt as one tree of tokens: the prompt read once, each token written once, for any Hugging Face causal model.
- `bgrpo_nb.cli`: `bgrpo demo | generate | sft | filter | train | evaluate | plot | sweep | analyze | convert`
- `bgrpo_nb.data`: Make, read, write, filter, mix and split decomposition problems.
- `bgrpo_nb.evaluation`: What a policy can do greedily, with beams and with samples; every figure with its interval, every difference with its own.
- `bgrpo_nb.exact_resume`: A `GRPOTrainer` that was killed goes on as it would have gone on: the same prompts, the same completions, the same loss.
- `bgrpo_nb.generation`: Greedy decoding, sampling and beam search that read a prompt once, for any Hugging Face causal model; and a guide to the key-value cache.
- `bgrpo_nb.kept`: What an evaluation has found, kept as it comes: one line a problem, one file for each policy, problems and settings.
- `bgrpo_nb.model`: Four vocabularies, three sizes, and a door for the authors' checkpoints.
- `bgrpo_nb.notation`: What people type, what SymPy computes with, what papers and pages print: each from prefix notation, and back.
- `bgrpo_nb.packed`: Linear layers whose weights lie as the processor wants them, for as long as a search runs.
- `bgrpo_nb.polynomial`: Prefix notation, and the algebra that says whether an answer decomposes a polynomial.
- `bgrpo_nb.rewards`: What a right answer is worth in place k of a beam search, and how a group of rewards becomes a group of advantages.
- `bgrpo_nb.run_explorers`: Start a training and watch it, ask a sweep which setting mattered; every picture is a plain function's, too.
- `bgrpo_nb.sft`: A policy learns to write the canonical inner polynomial, from problems that are never shown twice.
- `bgrpo_nb.sweep_launcher`: Starts, watches and ends the processes of a sweep: Optuna workers, or W&B agents and the trials they ask for.
- `bgrpo_nb.sweeps`: One sweep file in W&B's schema, read strictly: what it means, what is wrong with it, and the plan that it makes.
- `bgrpo_nb.trainer`: TRL's `GRPOTrainer` with ranked beams for a group: what BGRPO changes, and nothing else.
- `bgrpo_nb.trials`: A plan is carried out: each point claimed by one worker, run as a process, judged, and run again where its worker died. Nothing planned is lost.
- `bgrpo_nb.trl_batching`: From rows that repeat a prompt to one beam search a prompt; from K full rows back to one forward over their trie.
- `bgrpo_nb.widgets`: Move a slider and see what a search finds and what a training step teaches; every picture is a plain function's, too."""

__version__ = "0.1.0"


def __getattr__(name):
    "`bgrpo_nb.decompose` is found when it is asked for, so that `import bgrpo_nb.polynomial` loads no torch."
    if name == "decompose":
        from bgrpo_nb.evaluation import decompose
        return decompose
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
