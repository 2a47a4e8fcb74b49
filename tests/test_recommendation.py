"Recommendation: files, worlds, what may be learned, lists and what they are worth."
import os
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from bgrpo_nb.recommend.catalogue import (
    Catalogue, History, constraint_of, prompt_batch, read_catalogue, read_histories, sequences_of, without)
from bgrpo_nb.recommend.latent_factors import (
    LatentWorld, best_ndcg, draw_histories, id_probabilities, semantic_ids)
from bgrpo_nb.recommend.recommender import (
    ListwiseReward, SharedWordsReward, gains, learn_sequences, measure_lists, new_recommender, next_item_loss, paired_interval,
    recommend, target_ranks, training_batches)

SHARED = Path(os.environ.get("BGRPO_SHARED", Path(__file__).parents[1] / "../shared")) / "data/recommendation"
real_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the real catalogue is not here")


@pytest.fixture(scope="module")
def world(): return LatentWorld(items=40, kinds=6, factors=4)


@pytest.fixture(scope="module")
def catalogue(world): return semantic_ids(world.factors, codes=4)


@pytest.fixture(scope="module")
def policy(catalogue):
    return new_recommender(catalogue, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                           initializer_range=0.5)


# Files

@pytest.mark.parametrize("text,says", [
    ("0\ta b\n2\tc d\n", "line 2: item 2 where 1 comes next"),
    ("0\ta b\n1\tc\n", "item 1 has an ID of 1 words, and item 0 one of 2"),
    ("0\ta b\n1 c d\n", "line 2: 1 columns; write item, semantic ID"),
    ("0\ta b\nx\tc d\n", "line 2: 'x' is not a number"),
    ("0\t\n", "item 0 has an ID of 0 words"),
    ("", "a catalogue needs an item"),
])
def test_a_bad_catalogue_is_refused_in_one_line(tmp_path, text, says):
    (tmp_path / "catalogue.tsv").write_text(text)
    with pytest.raises(ValueError, match=says) as found: read_catalogue(tmp_path / "catalogue.tsv")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("line,says", [
    ("3\t0 1", "line 2: 2 columns; write user, history, next item"),
    ("3\t0 x\t1", "line 2: 'x' is not a number"),
    ("u\t0\t1", "line 2: 'u' is not a number"),
    ("3\t0 -1\t1", "line 2: '-1' is not a number"),
    ("3\t0 2\t1", "line 2: item 2 is not in the catalogue of 2 items"),
    ("3\t0\t7", "line 2: item 7 is not in the catalogue of 2 items"),
    ("", "line 2: 1 columns"),
])
def test_a_bad_row_is_refused_by_its_number(tmp_path, line, says):
    (tmp_path / "rows.tsv").write_text(f"3\t0\t1\n{line}\n3\t0\t1\n")
    with pytest.raises(ValueError, match=says): read_histories(tmp_path / "rows.tsv", Catalogue(["ab", "cd"]))


def test_rows_are_read_as_they_are_written(tmp_path):
    (tmp_path / "rows.tsv").write_text("3\t0 1\t1\n4\t\t0\n")
    assert read_histories(tmp_path / "rows.tsv", Catalogue(["ab", "cd"])) == [History(3, (0, 1), 1), History(4, (), 0)]


# What may be learned

def rows_of(users, first): # user -> items; rows from position `first` on, in order of time
    return [History(user, tuple(items[max(0, n - 10):n]), items[n])
            for user, items in users.items() for n in range(first, len(items))]


def test_no_answer_of_a_later_row_is_learned():
    "Every purchase is a different number, so a purchase that leaked would be seen"
    users = {u: list(range(100 * u, 100 * u + 15)) for u in range(6)}
    rows = rows_of(users, first=4)
    for learned in (0, 1, 13, len(rows) - 1, len(rows)):
        seen = {item for items in sequences_of(rows, learned) for item in items}
        held_out = {row.next_item for row in rows[learned:]}
        assert not seen & held_out
        before = {item for items in users.values() for item in items[:4]}
        assert seen == before | {row.next_item for row in rows[:learned]}


@real_data
def test_the_real_rows_give_what_the_split_promises():
    catalogue = read_catalogue(SHARED / "catalogue.tsv")
    rows = read_histories(SHARED / "valid.tsv", catalogue)
    assert (len(catalogue), len(set(catalogue.ids)), len(rows)) == (3686, 3670, 4532)
    answers = [sum(len(items) - 1 for items in sequences_of(rows, learned)) for learned in (0, 3000, None)]
    first_rows = {row.user: row for row in reversed(rows)}.values()
    assert answers[0] == sum(len(row.items) - 1 for row in first_rows)
    assert answers[2] == answers[0] + len(rows) and answers[0] < answers[1] < answers[2]


def test_training_batches_hold_pieces_of_the_sequences():
    sequences = [tuple(range(10 * n, 10 * n + 3 + n)) for n in range(5)]
    batches = training_batches(sequences, batch_size=8, window=4, item_dropout=0.5)
    for batch, _ in zip(batches, range(20)):
        assert len(batch) == 8
        for items in batch:
            assert 2 <= len(items) <= 4 and items == sorted(items) and len({item // 10 for item in items}) == 1


# The world

def test_the_best_list_is_best_of_all_orders():
    "Brute force over the orders of IDs, where two items share one"
    world, catalogue = LatentWorld(items=6, kinds=2, factors=2), Catalogue(["a", "b", "c", "d", "e", "e"])
    for history in ((0,), (5, 1)):
        p = world.probabilities(history)
        of_id = {("a",): p[0], ("b",): p[1], ("c",): p[2], ("d",): p[3], ("e",): p[4] + p[5]}
        every = [sum(of_id[words] / np.log2(r + 2) for r, words in enumerate(order[:3])) for order in permutations(of_id)]
        assert best_ndcg(world, catalogue, [History(0, history, 2)], k=3) == pytest.approx(max(every))
        assert id_probabilities(world, catalogue, history) == pytest.approx(of_id)


def test_the_best_score_is_what_the_best_lists_get(world, catalogue):
    rows = draw_histories(world, users=3000, seed=3)
    best = {items: list(id_probabilities(world, catalogue, items)) for items in {row.items for row in rows}}
    got = gains(target_ranks(catalogue, rows, [best[row.items] for row in rows]))
    low, high = paired_interval(got - best_ndcg(world, catalogue, rows))
    assert low < 0 < high and high - low < 0.05


def test_drawn_rows_chain_and_repeat_nothing(world):
    rows = draw_histories(world, users=50, length=7, answers=6)
    assert len(rows) == 300 and sequences_of(rows)
    assert all(row.next_item not in row.items and len(set(row.items)) == len(row.items) for row in rows)
    assert rows == draw_histories(world, users=50, length=7, answers=6)
    assert rows != draw_histories(world, users=50, length=7, answers=6, seed=1)


# Lists

def test_metrics_by_hand():
    catalogue = Catalogue([(str(i),) for i in range(30)])
    words = [(str(i),) for i in range(29)]
    rows = [History(0, (1,), target) for target in (0, 2, 7, 15, 29)]         # ranks 0, 2, 7, 15 and none
    found = measure_lists(catalogue, rows, [words] * 4 + [[None] * 29])
    def worth(*ranks): return sum(1 / np.log2(r + 2) for r in ranks) / 5
    expected = {"hr@5": 2 / 5, "hr@10": 3 / 5, "hr@20": 4 / 5, "ndcg@5": worth(0, 2), "ndcg@10": worth(0, 2, 7),
                "ndcg@20": worth(0, 2, 7, 15), "invalid": 1 / 5}
    assert found == pytest.approx(expected)


def test_an_id_that_two_items_share_is_right_for_both():
    catalogue = Catalogue(["ab", "cd", "cd"])
    rows = [History(0, (0,), 1), History(0, (0,), 2)]
    assert target_ranks(catalogue, rows, [[("a", "b"), ("c", "d")]] * 2) == [1, 1]


def test_a_list_as_long_as_the_catalogue_is_in_the_order_of_probability(catalogue, policy):
    histories = [(3, 5, 8), (1,)]
    lists = recommend(policy, catalogue, histories, num_beams=200, constraint=constraint_of(catalogue))
    ids = torch.tensor(sorted(set(map(tuple, catalogue.token_ids.tolist()))))
    words = dict(zip(map(tuple, catalogue.token_ids.tolist()), catalogue.ids))
    for items, found in zip(histories, lists):
        prompt = prompt_batch(catalogue, [items]).input_ids.expand(len(ids), -1)
        with torch.no_grad(): logp = policy(torch.cat([prompt, ids], 1)).logits.log_softmax(-1)
        score = logp[:, -4:-1].gather(2, ids[..., None]).sum((1, 2))
        assert found == [words[tuple(ids[i].tolist())] for i in score.argsort(descending=True)]


def test_what_somebody_has_is_in_no_list(catalogue, policy):
    histories, everything = [(3, 5, 8), (1,), (2, 4)], constraint_of(catalogue)
    def own(histories): return without(everything, catalogue, histories)
    with pytest.raises(ValueError, match="must come as a function"):
        recommend(policy, catalogue, histories, constraint=own(histories))
    lists = recommend(policy, catalogue, histories, num_beams=200, constraint=own, at_once=2)
    for items, found in zip(histories, lists):
        assert set(found) == set(catalogue.ids) - {catalogue.ids[item] for item in items}


def test_without_a_constraint_what_is_no_id_keeps_its_place(catalogue, policy):
    found = recommend(policy, catalogue, [(3,)], num_beams=1000)[0]
    assert None in found and any(found) and len(found) == 1000


def test_supervised_training_learns_and_repeats_itself(world, catalogue):
    sequences = sequences_of(draw_histories(world, users=40))
    losses = []
    for _ in range(2):
        model = new_recommender(catalogue, hidden_size=32, num_hidden_layers=1, intermediate_size=64)
        first = next_item_loss(model, catalogue, sequences).item()
        losses.append(learn_sequences(model, catalogue, sequences, steps=30, seed=4))
    assert losses[0] == losses[1] < first - 0.1
    assert not model.training


def test_the_reward_counts_right_first_words():
    catalogue = Catalogue([("a", "x", "1"), ("a", "x", "2"), ("a", "y", "1"), ("b", "y", "1")])
    right, *others = catalogue.token_ids.tolist()
    logged = {}
    written = [right, *others, right[:2], [*right[:2], 0]]                    # the last two are no items
    rewards = SharedWordsReward(catalogue)([""] * 6, written, target=[right] * 6, log_metric=logged.__setitem__)
    assert rewards == [1.0, 0.1, 0.03, 0.0, 0.0, 0.0] and logged == {"invalid": 2 / 6}


def test_a_policy_whose_beliefs_are_true_is_left_alone(catalogue):
    "The mean over what comes next, weighted by the policy's own probabilities, is zero for every beam"
    ids, scores = catalogue.token_ids[:4].tolist(), [-0.5, -1.3, -2.0, -4.1]
    q = np.exp(scores) / np.exp(scores).sum()
    mean = sum(p * np.array(ListwiseReward()([""] * 4, ids, [right] * 4, beam_rank=[0, 1, 2, 3], beam_score=scores))
               for p, right in zip(q, ids))
    assert mean == pytest.approx(np.zeros(4), abs=1e-12)


def test_the_listwise_reward_is_the_gradient_of_the_log_probability_within_the_list(catalogue):
    ids, scores = catalogue.token_ids[:3].tolist(), torch.tensor([-0.5, -1.3, -2.0], requires_grad=True)
    scores.log_softmax(0)[1].backward()
    rewards = ListwiseReward()([""] * 3, ids, [ids[1]] * 3, beam_rank=[0, 1, 2], beam_score=scores.tolist())
    assert rewards == pytest.approx(scores.grad.tolist())


@pytest.mark.parametrize("ranks", [None, [0, 0, 0, 0], [1, 2, 0, 1], [0, 1, 1, 2]])
def test_a_listwise_reward_of_half_a_list_is_refused(catalogue, ranks):
    ids = catalogue.token_ids[:4].tolist()
    with pytest.raises(ValueError, match="whole list"):
        ListwiseReward()([""] * 4, ids, [ids[0]] * 4, beam_rank=ranks, beam_score=[-1.0] * 4)


# The recorded experiment

@pytest.fixture
def record(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "nbs/experiments/recommendation")
    import record
    monkeypatch.setattr(record, "RUNS", tmp_path)
    return record


def test_no_arm_of_the_record_learns_from_test_rows(record, monkeypatch, tmp_path, catalogue):
    "Users of the test rows have items of their own, and no training sees any of them"
    rows = rows_of({user: list(range(user, user + 8)) for user in range(12)}, first=4)
    test = rows_of({user: list(range(25, 35)) for user in range(4)}, first=6)
    seen = []
    def learn(model, catalogue, sequences, **settings): seen.append({item for items in sequences for item in items})
    def reinforce(model, catalogue, rows, *args, **how):
        seen.append({item for row in rows for item in (*row.items, row.next_item)})
        return model, []
    def small(catalogue, seed): return new_recommender(catalogue, seed, hidden_size=16, num_hidden_layers=1)
    monkeypatch.setattr(record, "learn_sequences", learn)
    monkeypatch.setattr(record, "reinforce", reinforce)
    monkeypatch.setattr(record, "new_recommender", small)
    monkeypatch.setattr(record, "steps_of_equal_time", lambda folder: 3)
    for arm in sorted(record.ARMS, key=lambda arm: arm not in record.STARTS):
        record.run(arm, 0, catalogue, rows, test, tmp_path)
    assert len(seen) == len(record.ARMS) and all(items <= set(range(19)) for items in seen)
    assert {path.stem for path in tmp_path.glob("*.json")} == set(record.ARMS)
