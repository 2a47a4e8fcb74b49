"""Beam Group Relative Policy Optimization: GRPO whose group is the ranked beams of a beam search, in notebooks

Folders and modules, from the ground up:

`bgrpo_nb.base`: What every floor may use: files, folders, processes, signals, settings, the style of figures.
- `base.checkpoints`: Checkpoints of Hugging Face trainers in a run's folder: which are whole, and which one a run
  resumes from.
- `base.extras`: Packages that only some uses need: asked for with the exact command where one is missing.
- `base.files`: Files that are written whole or not at all, and files that are read while another process writes
  them.
- `base.network`: With whom the package speaks over the network: with nobody, unless somebody is logged in to W&B
  or asked for it.
- `base.ownership`: Which files and folders this package may write to: new ones, empty folders, and folders that
  carry its mark.
- `base.plotting`: One style for all figures of the package.
- `base.processes`: Child processes that end together with the process that started them.
- `base.run_folder`: The folder of a run: what was asked (`config.yaml`), what happened (`metrics.jsonl`), how it
  ended (`result.json`), and checkpoints in the format of Hugging Face.
- `base.settings`: Fields of a config dataclass, each with its help text, its type and the range of its values.
- `base.signals`: Signals that ask a program to stop: Ctrl-C, SIGTERM, and SIGHUP of a terminal that was closed.
- `base.strict_yaml`: YAML files of settings, read as their author means them.

`bgrpo_nb.algebra`: The task: polynomials in prefix notation, verified by exact algebra; no torch.
- `algebra.exact_decomposition`: Every decomposition of a polynomial in one variable, by the root of a power series
  and one division per degree.
- `algebra.notation`: What people type, what SymPy computes with, what papers and pages print: each from prefix
  notation, and back.
- `algebra.polynomial`: Prefix notation, and the algebra that decides whether an answer decomposes a polynomial.
- `algebra.problems`: Make, read, write, filter, mix and split decomposition problems.

`bgrpo_nb.search`: Token ids in, ranked completions out, for any causal model.
- `search.allowed_sequences`: A finite set of sequences, up to tens of millions, as a constraint that costs a
  search next to nothing.
- `search.beam_rows`: Each beam as a row of a batch with a cache of its own, for models that cannot grow a tree.
- `search.beam_tree`: All beams of a prompt as one tree of tokens: the prompt is read once, each token is stored
  once.
- `search.captured`: The step of a search, recorded once as a CUDA graph and replayed by every search of like
  shape: by default on a GPU.
- `search.constraints`: Searches that can write nothing else: one interface for grammars and finite sets, in
  search, sampling and training.
- `search.custom_generate`: The search as Transformers' own plug-in: `model.generate(...,
  custom_generate=tree_generate)`.
- `search.decoding`: What the beams of a search have written, and the loop that beam search, sampling and greedy
  decoding share.
- `search.generation`: Greedy decoding, sampling and beam search that read a prompt once, for any causal model of
  Transformers.
- `search.generation_settings`: The names of `generate`, such as top_p and stop_strings, for searches: each is
  obeyed, or refused in one line.
- `search.memory`: What does not fit in memory is halved and tried again, with one warning that names the setting
  to lower.
- `search.packed_weights`: A guide to the key-value cache; then packed weights, compiled steps and static shapes,
  and what each of them costs.

`bgrpo_nb.policy`: Vocabularies, sizes and checkpoints of a policy.
- `policy.checkpoints`: The authors' state dicts become Hugging Face folders, and folders become state dicts again,
  exactly.
- `policy.loading`: A name, a folder or a hub id becomes a model and a tokenizer; what does not fit is refused in
  one line.
- `policy.model`: Four vocabularies, three sizes: ordinary Hugging Face objects.

`bgrpo_nb.learn`: Groups, advantages, the trie and the trainer, for any task.
- `learn.arguments`: What a trainer is given beside its settings: rewards, prompts, a tokenizer, a rollout. Each is
  used, or refused.
- `learn.config`: `BGRPOConfig`: TRL's `GRPOConfig` with the settings of beams; each is obeyed, or refused in one
  line.
- `learn.exact_resume`: A GRPO training that was interrupted continues exactly: the same prompts, the same
  completions, the same loss.
- `learn.finite`: A training stops at the first loss, gradient or weight that is not finite; the last good
  checkpoint stays.
- `learn.gradients`: Log-probabilities over each group's trie, gradients where they are not zero, and fewer rows at
  once where memory ends.
- `learn.group_rewards`: What depends on all completions of a prompt: right answers, bonus, balance, baselines, and
  metrics by rank.
- `learn.optimizer_warmup`: Adam sees a few batches before it takes its first step, so that its first steps are no
  guesses.
- `learn.output_head`: Log-probabilities of a large vocabulary without the logits of all tokens at once, forward
  and backward.
- `learn.ranking`: Hits, NDCG and penalties by rank, as rewards and as metrics, where each prompt has a target and
  the beams are a list.
- `learn.rewards`: What a right answer is worth at each beam rank, and how the rewards of a group become
  advantages.
- `learn.siblings`: An advantage for each token: what the choice at a fork of the trie was worth, compared with the
  other choices there.
- `learn.trainer`: TRL's `GRPOTrainer` with the ranked beams of a search as its group: any model, any task with a
  verifier.
- `learn.trie`: The completions of a group are a trie; each distinct beginning is forwarded once, with the
  log-probabilities of all.
- `learn.trie_attention`: In depth-first order a trie needs one integer a node; three forms of attention read it,
  and the fitting one is chosen.
- `learn.trl_batching`: From rows that repeat a prompt to one beam search per prompt, whichever process the rows
  are on.
- `learn.weight_averages`: The policy that is measured and saved is an average of weights: along the run, or
  between its start and its end.

`bgrpo_nb.solve`: Policies meet polynomials: search, verify, filter, evaluate, decompose.
- `solve.beam_filter`: Keep the problems whose answer is among the top beams: hard enough to teach, not too hard to
  find.
- `solve.decomposition`: One function: a polynomial as you type it goes in, its verified decompositions come out.
- `solve.decomposition_reward`: Exact algebra says whether an answer is right, and a canonical form says whether
  two answers are the same.
- `solve.evaluation`: What one policy can do on one list of problems: greedily, with beams, with samples; each
  value with its interval.
- `solve.evaluation_figures`: The figures of an evaluation and of a training run, drawn from plain numbers in the
  package's one style.
- `solve.evaluation_report`: What an evaluation of test sets writes, made from its summary alone: CSV, Markdown and
  figures.
- `solve.grammar`: A constraint that leaves only tokens which can still become well-formed prefix notation.
- `solve.result_store`: The result store: files in which an evaluation stores results as they come; a killed
  process loses one batch at most.
- `solve.test_sets`: Many policies on many files: each measured, beside the exact algorithm and the authors'
  figures, and written down.

`bgrpo_nb.recommend`: Policies recommend: items as semantic IDs, histories as prompts, beams as ranked lists; no
polynomials.
- `recommend.catalogue`: Items as short sequences of words, histories as prompts: what a recommender needs to be a
  language model.
- `recommend.latent_factors`: Catalogues and histories whose probabilities are known, so that a recommender can be
  compared with the best there is.
- `recommend.recommender`: A small policy over semantic IDs: supervised on histories, ready for BGRPO, and measured
  by its lists.

`bgrpo_nb.recipes`: The training runs that commands start.
- `recipes.callbacks`: What a training does besides its steps: it logs, draws, shows progress, and stops cleanly at
  a signal.
- `recipes.demo`: A policy that knows degree 2∘2 learns 3∘2 from its own beams, and is measured before and after.
- `recipes.flags`: What somebody typed or wrote in a YAML file becomes a config, read as it was meant, or refused
  in one line.
- `recipes.samples`: Worker processes make the problems of a training while it runs: the same ones for every number
  of workers.
- `recipes.sft`: A policy learns to write the canonical inner polynomial, from problems that are made while it
  learns.
- `recipes.train`: Problems are chosen, a policy is trained by its beams, validated and saved: what `bgrpo train`
  does.
- `recipes.trainer_settings`: Settings of Transformers' trainer that it looks at only when it starts, checked when
  a config is made.
- `recipes.validation`: A policy is measured before, during and after a run, on new problems and on what it knew;
  the best one is saved.
- `recipes.wandb_logging`: A run at Weights & Biases (W&B): started, continued after a resume, given panels, and
  ended.

`bgrpo_nb.study`: Many runs: planned, carried out, read, compared, reported.
- `study.analysis`: Is one setting better than another, by how much, and could chance do the same?
- `study.analysis_figures`: The figures of a table of runs.
- `study.analysis_report`: One HTML file of a table of runs, and beside it the numbers of every table and figure.
- `study.launcher`: Starts, watches and ends the processes of a sweep: workers of our own with Optuna, or agents of
  W&B.
- `study.permutation_tests`: Could chance do the same? Permutation tests for two arms, for several, and for few
  seeds.
- `study.run_readers`: Run folders, an Optuna storage, W&B and its exports end in one list of runs.
- `study.run_table`: Every run a row: what was tried, how it ended, what it reached, and what is missing.
- `study.sweeps`: One sweep file in the format of Weights & Biases: what it means, what is wrong with it, and its
  plan.
- `study.trials`: Workers carry out a plan: each claims a point, runs it, judges it; a point whose worker died runs
  again.

`bgrpo_nb.show`: Explorers: a search, a training step, a run or a sweep, with controls to move.
- `show.beams`: What a beam search keeps and drops, token by token, and what the same number of samples finds.
- `show.explorer`: A figure with controls, and the first example: is h an inner polynomial of f?
- `show.groups`: One training step on one group, token by token: what became more probable, what less.
- `show.run_explorers`: Start a training and watch it; ask a sweep which setting mattered.

`bgrpo_nb.cli`: `bgrpo` and its ten commands: what the chapters do, from a terminal."""

__version__ = "0.1.0"

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)    # of __init__.pyi
