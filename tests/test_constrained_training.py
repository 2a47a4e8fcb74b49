"Training under a constraint: slow, obvious references with masked logits; empty places; what is refused."
import copy
import math
import warnings

import pytest
import torch
from datasets import Dataset
from test_trainer import ONE_THREAD, SMALL, assert_equal_runs, run_processes  # noqa: F401
from test_trl_contract import STEPS, TINY, TOKENS, parameters
from transformers import LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

from bgrpo_nb.learn.config import BGRPOConfig
from bgrpo_nb.learn.ranking import TargetReward
from bgrpo_nb.learn.rewards import VerifiedReward
from bgrpo_nb.learn.trainer import BGRPOTrainer
from bgrpo_nb.learn.trie import row_logps, trie_logps
from bgrpo_nb.learn.trl_batching import positions_from_mask, roll_out
from bgrpo_nb.policy.model import load_tokenizer, new_model, save_model
from bgrpo_nb.search.allowed_sequences import AllowedSequences
from bgrpo_nb.search.constraints import Constraint
from bgrpo_nb.solve.grammar import PrefixGrammar

END, PAD = TOKENS.eos_token_id, TOKENS.pad_token_id
PROMPTS = ["1 2", "3 4 5", "a P 1", "2"]
FOUR = [[12, 13], [12, 14], [13], [13, 12, 11]]                # one begins another, so an end token is written
OWN = {len(TOKENS(p)["input_ids"]): s for p, s in zip(PROMPTS, [FOUR])}


def policy(name="Llama"):
    import transformers
    torch.manual_seed(0)
    more = dict(n_positions=64) if name == "GPT2" else {}
    config = getattr(transformers, f"{name}Config")(**TINY | more)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def ids_of(prompt): return TOKENS(prompt)["input_ids"]


# --- the slow, obvious form: dictionaries, one token at a time, no code shared with the package

def next_tokens(sequences, written, end):
    "Which tokens may follow"
    n = len(written)
    found = {s[n] for s in sequences if len(s) > n and s[:n] == written}
    return sorted(found | ({end} if end is not None and written in sequences else set()))


def slow_logps(model, prompt, completion, sequences, end, renormalize, temperature=1.0):
    "Log-probabilities and entropies of a completion's tokens, from masked logits, with gradients"
    logps, entropies = [], []
    for t, token in enumerate(completion):
        logits = model(torch.tensor([prompt + completion[:t]])).logits[0, -1] / temperature
        keep = next_tokens(sequences, completion[:t], end) if renormalize else range(len(logits))
        logp = logits[list(keep)].log_softmax(-1)
        logps.append(logp[list(keep).index(token)])
        entropies.append(-(logp.exp() * logp).sum())
    return torch.stack(logps), torch.stack(entropies)


def whole(sequence, end): return sequence if end is None else [*sequence, end]


def padded(prompts, completions):
    P, C = max(map(len, prompts)), max(map(len, completions))
    ids = [[PAD] * (P - len(p)) + p + c + [PAD] * (C - len(c)) for p, c in zip(prompts, completions)]
    mask = [[0] * (P - len(p)) + [1] * (len(p) + len(c)) + [0] * (C - len(c)) for p, c in zip(prompts, completions)]
    return torch.tensor(ids), torch.tensor(mask), C


SETS = [(FOUR, END), ([[12, 13, 14], [12, 13, 15], [12, 11, 14], [16, 11, 14], [16, 11, 15]], None)]


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("sequences,end", SETS, ids=["end token", "no end token"])
@pytest.mark.parametrize("rollout,temperature", [("beam", 1.0), ("sample", 1.0), ("sample", 0.6)])
def test_search_trie_and_rows_give_the_numbers_of_masked_logits(name, renormalize, sequences, end, rollout, temperature):
    model = policy(name)
    handle = positions_from_mask(model)
    constraint = AllowedSequences.from_ids(sequences, end=end, renormalize=renormalize)
    prompts = [ids_of(p) for p in PROMPTS]
    torch.manual_seed(1)
    groups = roll_out(model, prompts, 4, 5, [END], PAD, rollout, temperature, constraint=constraint)
    rows = [(p, c) for p, group in zip(prompts, groups) for c in group]
    assert len(rows) == 16
    ids, mask, C = padded([p for p, _ in rows], [c.ids for _, c in rows])
    found = [trie_logps(model, ids, mask, C, temperature, True, constraint=constraint),
             trie_logps(model, ids, mask, C, temperature, True, 1, constraint=constraint),
             row_logps(model, ids, mask, C, temperature, True, constraint=constraint),
             row_logps(model, ids, mask, C, temperature, True, constraint=constraint, batch_size=5)]
    handle.remove()
    for i, (prompt, c) in enumerate(rows):
        logps, entropies = slow_logps(model, prompt, c.ids, sequences, end, renormalize, temperature)
        for fast, fast_entropy in found:
            torch.testing.assert_close(fast[i, :len(c.ids)], logps, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(fast_entropy[i, :len(c.ids)], entropies, atol=1e-5, rtol=1e-5)
            assert fast[i, len(c.ids):].abs().sum() == 0
        at_one, _ = slow_logps(model, prompt, c.ids, sequences, end, renormalize)
        assert c.score == pytest.approx(at_one.sum().item(), abs=1e-4)
        assert c.ids in [whole(s, end) for s in sequences]
    if rollout == "beam" and len(sequences) == 4:              # all there are, in the order of their scores
        for prompt, group in zip(prompts, groups):
            best = sorted((whole(s, end) for s in sequences), reverse=True,
                          key=lambda s: slow_logps(model, prompt, s, sequences, end, renormalize)[0].sum().item())
            assert [c.ids for c in group] == best


@pytest.mark.parametrize("fast", [trie_logps, row_logps])
def test_gradients_are_those_of_masked_logits(fast):
    "Log-probabilities and entropies weighted at random; two prompts, one of them with a smaller set"
    model, sets = policy().double(), {tuple(ids_of(p)): FOUR[:n] for p, n in zip(PROMPTS, (4, 2))}
    rows = [(list(p), whole(s, END)) for p, own in sets.items() for s in own]
    ids, mask, C = padded(*zip(*rows))
    weights = torch.randn(2, len(rows), C, generator=torch.Generator().manual_seed(1), dtype=torch.double)

    def gradient(terms):
        model.zero_grad()
        sum(terms).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    logps, entropies = fast(model, ids, mask, C, 0.7, True, constraint=sets_of(sets, renormalize=True))
    found = gradient([(logps * weights[0]).sum(), (entropies * weights[1]).sum()])
    slow = [slow_logps(model, p, c, sets[tuple(p)], END, True, 0.7) for p, c in rows]
    wanted = gradient([(w[:len(x)] * x).sum() for pair, own in zip(slow, weights.transpose(0, 1)) for x, w in zip(pair, own)])
    assert (found - wanted).norm() <= 1e-5 * wanted.norm() and wanted.norm() > 0


def sets_of(sets, end=END, renormalize=False):
    "A function: prompts -> a set for each; sets: prompt as a tuple -> sequences"
    every = [list(s) for s in sorted({tuple(s) for own in sets.values() for s in own})]
    catalogue = AllowedSequences.from_ids(every, end=end, renormalize=renormalize)
    nodes = dict(zip(map(tuple, every), catalogue.find(every).tolist()))

    def of(prompts):
        keep = torch.zeros(len(prompts), catalogue.nodes, dtype=torch.bool)
        for row, prompt in zip(keep, prompts):
            for s in sets[tuple(prompt)]: row[nodes[tuple(s)]] = True
        return catalogue.restricted(keep)
    return of


# --- whole trainings, beside TRL's own trainer with slow log-probabilities and an enumeration for a search

class Slow(GRPOTrainer):
    "TRL's trainer; groups are all sequences of the prompt's set, best first; log-probabilities from masked logits"
    def __init__(self, *args, sets, end, renormalize, **kwargs):
        self.sets, self.end, self.renormalize = sets, end, renormalize
        super().__init__(*args, rollout_func=self.enumerate, **kwargs)

    def enumerate(self, prompts, trainer):
        out = dict(prompt_ids=[ids_of(p) for p in prompts], completion_ids=[], logprobs=None, beam_rank=[])
        for start in range(0, len(prompts), 4):
            prompt = ids_of(prompts[start])
            own = self.sets[tuple(prompt)]
            with torch.no_grad():
                score = {tuple(s): slow_logps(self.model, prompt, whole(s, self.end), own, self.end, self.renormalize)[0].sum().item() for s in own}
            best = sorted(own, key=lambda s: -score[tuple(s)])[:4]
            out["completion_ids"] += [whole(s, self.end) for s in best]
            out["beam_rank"] += range(4)
        return out

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        C, out = logits_to_keep, ([], [])
        for ids, mask in zip(input_ids, attention_mask.bool()):
            prompt, completion = ids[:-C][mask[:-C]].tolist(), ids[-C:][mask[-C:]].tolist()
            own = self.sets[tuple(prompt)]
            for x, found in zip(slow_logps(model, prompt, completion, own, self.end, self.renormalize, self.temperature), out):
                found.append(torch.nn.functional.pad(x, (0, C - len(x))))
        return torch.stack(out[0]), torch.stack(out[1]), None


def pay(completion_ids, beam_rank, **columns):
    return [0.37 * sum(ids) % 1 + 0.2 * len(ids) - 0.1 * r for ids, r in zip(completion_ids, beam_rank)]


AGAIN = dict(num_iterations=2, learning_rate=3.0)
CHANGES = [{}, dict(delta=1.01, **AGAIN), dict(importance_sampling_level="sequence", **AGAIN), dict(beta=0.05, **AGAIN),
           dict(top_entropy_quantile=0.5), dict(entropy_coef=0.3), dict(loss_type="dapo"), dict(off_policy_mask_threshold=1e-4, **AGAIN)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    policy().save_pretrained(folder)
    TOKENS.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def trained(kind, model, folder, more, renormalize, end=END, sequences=FOUR, share=True):
    settings = STEPS | dict(output_dir=str(folder), learning_rate=0.05) | more
    data, sets = Dataset.from_dict({"prompt": PROMPTS}), {tuple(ids_of(p)): sequences for p in PROMPTS}
    if kind == "slow":
        trainer = Slow(copy.deepcopy(model), pay, GRPOConfig(**settings), data, processing_class=TOKENS, sets=sets, end=end, renormalize=renormalize)
    else:
        trainer = BGRPOTrainer(copy.deepcopy(model), pay, BGRPOConfig(share_prefixes=share, **settings), data, processing_class=TOKENS,
                               constraint=AllowedSequences.from_ids(sequences, end=end, renormalize=renormalize))
    trainer.train()
    return parameters(trainer.model), trainer


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("more", CHANGES, ids=lambda m: " ".join(m) or "plain")
def test_two_steps_are_those_of_the_slow_form(saved, tmp_path, more, renormalize):
    "Ratios, KL, clipping, entropy masks and bonuses see the same log-probabilities; trie and full rows"
    slow, _ = trained("slow", saved, tmp_path, more, renormalize)
    start = parameters(saved)
    for share in (True, False):
        found, trainer = trained("ours", saved, tmp_path, more, renormalize, share=share)
        moved = (slow - start).norm()
        assert moved > 1e-4 and (found - slow).norm() < 2e-5 * moved + 1e-6 * start.norm()


def test_renormalizing_changes_what_is_learnt(saved, tmp_path):
    "The comparison above could not fail if the setting had no effect"
    a, b = (trained("ours", saved, tmp_path, {}, renormalize)[0] for renormalize in (True, False))
    assert (a - b).norm() > 1e-2 * (a - parameters(saved)).norm()


@pytest.mark.parametrize("rollout", ["sample", "mixed"])
@pytest.mark.parametrize("share", [True, False], ids=["trie", "full rows"])
def test_samples_and_mixed_groups_train_within_the_set(saved, tmp_path, rollout, share):
    seen = []
    def reward(completion_ids, beam_rank, beam_score, **columns):
        seen.append((completion_ids, beam_rank, beam_score))
        return [len(ids) + r for ids, r in zip(completion_ids, beam_rank)]
    temperature = 0.7 if rollout == "sample" else 1.0
    config = BGRPOConfig(**STEPS | dict(output_dir=str(tmp_path), rollout=rollout, share_prefixes=share, temperature=temperature, mask_truncated_completions=rollout == "sample"))
    constraint = AllowedSequences.from_ids(FOUR, end=END, renormalize=True)
    trainer = BGRPOTrainer(copy.deepcopy(saved), reward, config, Dataset.from_dict({"prompt": PROMPTS}), processing_class=TOKENS, constraint=constraint)
    trainer.train()
    assert len(seen) == 2 and all(ids[:-1] in FOUR for step in seen for ids in step[0])
    assert seen[0][1][:4] == ([0] * 4 if rollout == "sample" else [0, 1, 2, 2])


# --- completions that end without an end token

THREE = [[12, 13, 14], [12, 13, 15], [12, 11, 14], [16, 11, 14]]


def logs_of(trainer, name): return [row[name] for row in trainer.state.log_history if name in row]


def test_a_completion_that_the_constraint_ends_is_finished(saved, tmp_path):
    "As TRL's trainer with an end token behind each, but for that token"
    slow, _ = trained("slow", saved, tmp_path, {}, True, end=None, sequences=THREE)
    found, trainer = trained("ours", saved, tmp_path, {}, True, end=None, sequences=THREE)
    assert (found - slow).norm() < 2e-5 * (slow - parameters(saved)).norm() + 1e-6 * slow.norm()
    assert logs_of(trainer, "completions/clipped_ratio") == [0, 0]
    assert logs_of(trainer, "completions/mean_terminated_length") == [3, 3]
    for masked in (True, False):
        torch.manual_seed(2)
        kept, trainer = trained("ours", saved, tmp_path, dict(rollout="sample", temperature=4.0, mask_truncated_completions=masked), True, end=None, sequences=THREE)
        assert sum(logs_of(trainer, "grad_norm")) > 0           # nothing was masked


# --- a set for each prompt, and too few sequences

SIZES = (4, 2, 1, 3)
SMALL_SETS = {tuple(ids_of(p)): FOUR[:n] for p, n in zip(PROMPTS, SIZES)}


def with_small_sets(model, folder, rewards, renormalize=True, **more):
    data = Dataset.from_dict({"prompt": PROMPTS})
    config = BGRPOConfig(**STEPS | dict(output_dir=str(folder), learning_rate=0.05, max_grad_norm=0.0) | more)
    return BGRPOTrainer(copy.deepcopy(model), rewards, config, data, data if "eval_steps" in more else None, processing_class=TOKENS,
                        constraint=sets_of(SMALL_SETS, renormalize=renormalize))


@pytest.mark.parametrize("share", [True, False], ids=["trie", "full rows"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_empty_places_are_in_no_loss_and_no_reward(saved, tmp_path, share, renormalize):
    "One step, worked out from masked logits: 10 of 16 places hold a completion"
    seen = []
    def reward(prompts, completions, completion_ids, beam_rank, beam_score, log_extra, log_metric, **columns):
        assert len(prompts) == len(completions) == len(completion_ids) == len(beam_rank) == len(beam_score) == 10
        log_extra("length", [len(ids) for ids in completion_ids])
        log_metric("rows", len(prompts))
        seen.extend(zip(prompts, completion_ids, beam_rank))
        return pay(completion_ids, beam_rank)
    trainer = with_small_sets(saved, tmp_path, reward, renormalize, max_steps=1, share_prefixes=share)
    with pytest.warns(UserWarning, match="6 of 16 places of groups are empty"): trainer.train()
    assert logs_of(trainer, "groups/empty_places") == [6 / 16] and logs_of(trainer, "rows") == [10]
    assert list(trainer._logs["extra"]["length"]).count(None) == 6
    model, loss = copy.deepcopy(saved), 0.0
    assert len(seen) == 10 and all(c[:-1] in SMALL_SETS[tuple(ids_of(p))] for p, c, _ in seen)
    for prompt, n in zip(PROMPTS, SIZES):
        own = [(c, r) for p, c, r in seen if p == prompt]
        assert sorted(r for _, r in own) == list(range(n))
        rewards = pay([c for c, _ in own], [r for _, r in own])
        for (c, _), x in zip(own, rewards):
            logps, _ = slow_logps(model, ids_of(prompt), c, SMALL_SETS[tuple(ids_of(prompt))], END, renormalize)
            loss = loss - (x - sum(rewards) / n) * logps.mean() / 16       # the surrogate's gradient at ratio 1
    loss.backward()
    wanted = parameters(model) - 0.05 * torch.cat([p.grad.flatten() for p in model.parameters()])
    moved = (wanted - parameters(saved)).norm()
    assert moved > 0 and (parameters(trainer.model) - wanted).norm() < 2e-5 * moved + 1e-6 * wanted.norm()


@pytest.mark.parametrize("more", [
    dict(beta=0.05, num_iterations=2), dict(entropy_coef=0.1, top_entropy_quantile=0.5), dict(loss_type="vespo"), dict(loss_type="dapo"),
    dict(importance_sampling_level="sequence", loss_type="luspo"), dict(off_policy_mask_threshold=1e-4, num_iterations=2), dict(scale_rewards="group"),
    dict(baseline="leave_one_out", distinct_bonus=0.5, balance_rewards=True), dict(baseline="minimum_risk"), dict(baseline="right_only"),
    dict(rollout="mixed"), dict(gradient_accumulation_steps=2, per_device_train_batch_size=8), dict(eval_strategy="steps", eval_steps=1)],
    ids=lambda m: " ".join(m))
def test_empty_places_go_through_every_objective(saved, tmp_path, more):
    "Nothing becomes NaN, and the reward functions see completions alone"
    def reward(completion_ids, beam_rank, **columns):
        assert all(ids[:-1] in FOUR for ids in completion_ids) and None not in beam_rank
        return [1.0 if r == 1 else -0.1 for r in beam_rank]
    trainer = with_small_sets(saved, tmp_path, reward, **more)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*places of groups are empty")
        trainer.train()
    assert parameters(trainer.model).isfinite().all() and len(logs_of(trainer, "loss")) == 2
    assert all(math.isfinite(x) for row in trainer.state.log_history for name, x in row.items() if isinstance(x, float) and not name.endswith("std"))


def test_async_rewards_too_and_a_wrong_number_is_an_error(saved, tmp_path):
    async def later(completion_ids, **columns):
        assert len(completion_ids) == 10
        return [float(len(ids)) for ids in completion_ids]
    trainer = with_small_sets(saved, tmp_path, [later, pay], max_steps=1)
    with pytest.warns(UserWarning, match="are empty"): trainer.train()
    assert logs_of(trainer, "rewards/later/mean")[0] == pytest.approx(sum(len(s) + 1 for own in SMALL_SETS.values() for s in own) / 10)
    trainer = with_small_sets(saved, tmp_path, [later, pay], max_steps=1)
    trainer.reward_funcs[0] = lambda completion_ids, **columns: [1.0] * 16
    with pytest.raises(ValueError, match="returned 16 rewards for 10 completions"): trainer.train()


WAYS = {"trie": dict(constraint="small sets"), "full rows": dict(constraint="small sets", share_prefixes=False),
        "mixed": dict(constraint="grammar", rollout="mixed")}


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    "A policy trained in every way, by one process and by two"
    folder = tmp_path_factory.mktemp("processes")
    start = save_model(new_model("tiny", initializer_range=0.5, **SMALL), load_tokenizer("single"), folder / "policy")
    return [run_processes(folder, processes, {way: (start, more) for way, more in WAYS.items()}) for processes in (1, 2)]


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_equal_one(one_and_two, way):
    "Groups of 4 in slices of 6 rows: the second group, and its empty places, lie on both processes"
    one, two = (found[way] for found in one_and_two)
    if way == "mixed": assert len(one[0]) == len(two[0]) == 2     # each process draws samples of its own
    else:
        assert len(one[0][0]["ids"]) < 12
        assert_equal_runs(one, two)


# --- rewards and metrics of lists

def list_of(folder, model, reward, targets, constraint, **more):
    config = BGRPOConfig(**STEPS | dict(output_dir=str(folder), max_steps=1) | more)
    data = Dataset.from_dict({"prompt": PROMPTS, "target": targets})
    return BGRPOTrainer(copy.deepcopy(model), reward, config, data, processing_class=TOKENS, constraint=constraint)


def test_penalties_and_metrics_by_rank(saved, tmp_path):
    "Every target's rank is known from the enumeration; one target is not in the set"
    sets = AllowedSequences.from_ids(FOUR, end=END)
    targets = [FOUR[0], FOUR[2], FOUR[3], [11]]
    ranks = []
    for prompt, target in zip(PROMPTS, targets):
        best = sorted(FOUR, key=lambda s: -slow_logps(saved, ids_of(prompt), whole(s, END), FOUR, END, False)[0].sum().item())
        ranks.append(best.index(target) if target in best else None)
    trainer = list_of(tmp_path, saved, TargetReward("rank_penalty", end_token_id=END, catalogue=sets), targets, sets)
    trainer.train()
    weights = [1 / math.log2(k + 2) for k in range(4)]
    wanted = {p: [0.0] * 4 if r is None else [1.0 if k == r else -w / sum(weights) for k, w in enumerate(weights)] for p, r in zip(PROMPTS, ranks)}
    logs = trainer._logs
    table = zip(logs["prompt"], logs["rewards"]["rank_penalty_reward"], logs["extra"]["beam_rank"])
    for prompt, found, k in table: assert found == pytest.approx(wanted[prompt][k], abs=1e-6)
    row = next(row for row in trainer.state.log_history if "loss" in row)
    hits = [r for r in ranks if r is not None]
    assert row["beams/hit_rate@1"] == hits.count(0) / 4 and row["beams/ndcg@1"] == hits.count(0) / 4
    assert row["invalid"] == 0 and row["groups/none_valid"] == 0.25 and "beams/hit_rate@5" not in row
    trainer = list_of(tmp_path, saved, TargetReward("ndcg", end_token_id=END, catalogue=sets), targets, None, num_generations=16, per_device_train_batch_size=64)
    trainer.train()
    row = next(row for row in trainer.state.log_history if "loss" in row)
    assert row["invalid"] > 0.5 and {"beams/hit_rate@10", "beams/ndcg@10"} <= set(row) and "beams/hit_rate@20" not in row


def test_penalties_by_rank_are_refused_for_samples(saved, tmp_path):
    sets = AllowedSequences.from_ids(FOUR, end=END)
    with pytest.raises(ValueError, match="pays by rank, and samples have none; use reward='hit'"):
        list_of(tmp_path, saved, TargetReward("rank_penalty", end_token_id=END), [FOUR[0]] * 4, sets, rollout="sample")
    trainer = list_of(tmp_path, saved, TargetReward("hit", end_token_id=END), [FOUR[0]] * 4, sets, rollout="sample")
    trainer.train()
    assert not any(name.startswith("beams/") for row in trainer.state.log_history for name in row)


def test_a_rollout_func_without_ranks_cannot_pay_by_rank(saved, tmp_path):
    def own(prompts, trainer): return dict(prompt_ids=[ids_of(p) for p in prompts], completion_ids=[[12, END]] * len(prompts), logprobs=None)
    right = VerifiedReward(lambda prompts, ids: [True] * len(ids), reward="rank_penalty")
    config = BGRPOConfig(**STEPS | dict(output_dir=str(tmp_path)))
    trainer = BGRPOTrainer(copy.deepcopy(saved), right, config, Dataset.from_dict({"prompt": PROMPTS}), processing_class=TOKENS, rollout_func=own)
    with pytest.raises(ValueError, match="needs beam ranks"): trainer.train()


def test_validation_by_reward_obeys_the_constraint(saved, tmp_path):
    seen = []
    def reward(completion_ids, **columns):
        seen.extend(completion_ids)
        return [float(len(ids)) for ids in completion_ids]
    config = BGRPOConfig(**STEPS | dict(output_dir=str(tmp_path), num_generations_eval=2))
    data = Dataset.from_dict({"prompt": PROMPTS})
    trainer = BGRPOTrainer(copy.deepcopy(saved), reward, config, data, data, processing_class=TOKENS, constraint=AllowedSequences.from_ids(FOUR, end=END))
    metrics = trainer.evaluate()
    assert metrics["eval_reward"] > 0 and len(seen) == 8 and all(ids[:-1] in FOUR for ids in seen)


def test_a_grammar_is_a_constraint_like_any_other(saved, tmp_path):
    "Without a longest completion: a completion may be cut, and counts as cut"
    trainer = BGRPOTrainer(copy.deepcopy(saved), pay, BGRPOConfig(**STEPS | dict(output_dir=str(tmp_path), max_steps=1)),
                           Dataset.from_dict({"prompt": PROMPTS}), processing_class=TOKENS, constraint=PrefixGrammar(TOKENS, renormalize=True))
    trainer.train()
    assert logs_of(trainer, "loss")


# --- what is refused

class Endless(Constraint):
    def start(self, rows): return torch.zeros(rows, dtype=torch.long)
    def allowed(self, state, V): return torch.ones(*state.shape, V, dtype=torch.bool)
    def advance(self, state, tokens): return state


@pytest.mark.parametrize("constraint,more,says", [
    (AllowedSequences.from_ids(FOUR[:3], end=END), {}, "3 sequences, fewer than the 4 beams of a group; lower num_generations"),
    (AllowedSequences.from_ids(FOUR, end=END), dict(num_generations_eval=8), "lower num_generations_eval"),
    (AllowedSequences.from_ids(FOUR, end=END), dict(max_completion_length=3), "max_completion_length=3 would cut"),
    (AllowedSequences.from_ids(FOUR, end=END), dict(generation_kwargs=dict(max_new_tokens=3)), "max_new_tokens=3 would cut"),
    (AllowedSequences.from_ids([[12], [13], [14], [15]], end=11), {}, "token 11, which is not in eos_token_id"),
    (AllowedSequences.from_ids([[12, END, 13], [13, 13], [14], [15]]), {}, "occur inside of allowed sequences"),
    (AllowedSequences.from_ids([[12], [13], [14], [99]]), {}, "vocabulary of"),
    (Endless(), {}, "neither an end token nor a longest completion"),
    (AllowedSequences.from_ids([[12], [13]]).restricted(torch.ones(4, 3, dtype=torch.bool)), {}, "give a function instead"),
    (lambda prompts: AllowedSequences.from_ids([[12], [13]]).restricted(torch.ones(7, 3, dtype=torch.bool)), {}, "7 sets for 1 prompts"),
], ids=range(10))
def test_a_constraint_that_cannot_be_obeyed_is_refused_before_training(saved, tmp_path, constraint, more, says):
    config = BGRPOConfig(**STEPS | dict(output_dir=str(tmp_path)) | more)
    with pytest.raises(ValueError, match=says):
        BGRPOTrainer(copy.deepcopy(saved), pay, config, Dataset.from_dict({"prompt": PROMPTS}), processing_class=TOKENS, constraint=constraint)


def test_what_would_ignore_the_constraint_is_refused(saved, tmp_path):
    config, data = BGRPOConfig(**STEPS | dict(output_dir=str(tmp_path))), Dataset.from_dict({"prompt": PROMPTS})
    sets = AllowedSequences.from_ids(FOUR, end=END, renormalize=True)
    def make(model=saved, data=data, constraint=sets, **more): return BGRPOTrainer(copy.deepcopy(model), pay, config, data, processing_class=TOKENS, constraint=constraint, **more)
    with pytest.raises(ValueError, match="a rollout_func of your own replaces"): make(rollout_func=print)
    with pytest.raises(TypeError, match="constraint is a list"): make(constraint=FOUR)
    with pytest.raises(ValueError, match="prompts with images"): make(data=Dataset.from_dict({"prompt": PROMPTS, "image": ["x"] * 4}))
    from transformers import AutoModelForCausalLM, MixtralConfig
    experts = dict(num_local_experts=2, num_experts_per_tok=1, output_router_logits=True, router_aux_loss_coef=0.1)
    with pytest.raises(ValueError, match="auxiliary loss"): make(AutoModelForCausalLM.from_config(MixtralConfig(**TINY | experts)))


# --- checkpoints

@pytest.mark.parametrize("other,same", [(None, False), ("set", False), ("renormalize", False), ("equal", True)])
def test_a_checkpoint_knows_its_constraint(saved, tmp_path, other, same):
    def make(constraint, steps):
        config = BGRPOConfig(**STEPS | dict(output_dir=str(tmp_path), save_strategy="steps", save_steps=1, max_steps=steps))
        return BGRPOTrainer(copy.deepcopy(saved), pay, config, Dataset.from_dict({"prompt": PROMPTS}), processing_class=TOKENS, constraint=constraint)
    first = AllowedSequences.from_ids(FOUR, end=END)
    make(first, 1).train()
    new = {None: None, "set": AllowedSequences.from_ids([[15], *FOUR[1:]], end=END), "renormalize": AllowedSequences.from_ids(FOUR, end=END, renormalize=True),
           "equal": AllowedSequences.from_ids(FOUR[::-1], end=END)}[other]
    trainer = make(new, 2)
    if same: trainer.train(resume_from_checkpoint=True)
    else:
        with pytest.raises(ValueError, match="was written with another constraint"): trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == (2 if same else 1)
