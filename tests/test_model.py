"The authors' checkpoint, converted: their logits, their greedy continuations, their beams."
import json

import pytest
import torch

from bgrpo_nb.search.generation import beam_search, greedy
from bgrpo_nb.policy.checkpoints import convert_checkpoint
from bgrpo_nb.policy.model import decode_completions, encode, load_model, load_tokenizer, vocabularies


@pytest.fixture(scope="module")
def reference(shared): return json.loads((shared / "reference_checkpoint/reference.json").read_text())


@pytest.fixture(scope="module")
def converted(shared, tmp_path_factory):
    folder = convert_checkpoint(shared / "reference_checkpoint/model.pt", tmp_path_factory.mktemp("model") / "hf")
    return load_model(folder, device="cpu"), load_tokenizer(folder), folder


def test_bundled_vocabularies_are_the_authors(shared):
    assert json.loads((shared / "vocabularies.json").read_text()) == vocabularies()


def test_tokens_and_logits(reference, converted):
    model, tokenizer, _ = converted
    for record in reference["records"]:
        ids = encode(tokenizer, [record["prompt"]]).input_ids
        assert ids[0].tolist() == record["input_ids"]
        with torch.no_grad(): logits = model(ids).logits[0]
        torch.testing.assert_close(logits[-1], torch.tensor(record["last_logits"]), atol=1e-4, rtol=0)
        torch.testing.assert_close(logits[0], torch.tensor(record["first_logits"]), atol=1e-4, rtol=0)


def words(tokenizer, beams, b, k):
    "A completion as the reference file writes it: the end token and all that follows it are pads"
    found = tokenizer.convert_ids_to_tokens(beams.sequences[b, k, :beams.lengths[b, k]])
    return ["□" if w == "⁇" else w for w in found]


@pytest.mark.parametrize("width", [5, 25])
def test_beams_token_for_token(reference, converted, width):
    model, tokenizer, _ = converted
    enc = encode(tokenizer, [r["prompt"] for r in reference["records"]])
    beams = beam_search(model, enc.input_ids, enc.attention_mask, num_beams=width, max_new_tokens=12,
                        eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    for b, record in enumerate(reference["records"]):
        expected = record["beams"][str(width)]
        assert len(expected) == width
        for k, beam in enumerate(expected):
            P = len(record["input_ids"])
            assert words(tokenizer, beams, b, k) == beam["tokens"][P:beam["length"]]
            assert abs(beams.scores[b, k].item() - beam["logprob"]) < 1e-3


def test_greedy_token_for_token(reference, converted):
    model, tokenizer, _ = converted
    for record in reference["records"]:
        ids = torch.tensor([record["input_ids"]])
        expected = record["greedy"]
        expected = expected[len(record["input_ids"]):] if len(expected) > 12 else expected
        found = greedy(model, ids, max_new_tokens=12, eos_token_id=None, pad_token_id=0).sequences[0, 0].tolist()
        if isinstance(expected[0], str): found = tokenizer.convert_ids_to_tokens(found)
        assert found[:len(expected)] == list(expected)


def test_there_and_back(shared, converted, tmp_path):
    _, _, folder = converted
    original = torch.load(shared / "reference_checkpoint/model.pt", weights_only=True)
    original = {k.removeprefix("module."): v for k, v in original.items() if not k.endswith("attn.mask")}
    for name in ("back.pt", "back.safetensors"):
        path = convert_checkpoint(folder, tmp_path / name)
        again = convert_checkpoint(path, tmp_path / f"again_{name}")
        a, b = load_model(folder, device="cpu").state_dict(), load_model(again, device="cpu").state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == original.keys() and all(torch.equal(back[k], original[k]) for k in back)


def test_a_truncated_or_foreign_file_is_one_clear_error(shared, tmp_path):
    whole = (shared / "reference_checkpoint/model.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "foreign.pt")
    torch.save({"tok_emb.weight": print}, tmp_path / "code.pt")
    for name in ("cut", "text", "foreign", "code"):
        with pytest.raises(ValueError, match=name):
            convert_checkpoint(tmp_path / f"{name}.pt", tmp_path / "out", config={"n_head": 2})
    with pytest.raises(FileNotFoundError): convert_checkpoint(tmp_path / "nowhere.pt", tmp_path / "out")


def test_an_unfinished_completion_is_none():
    tokenizer = load_tokenizer("single")
    ids = encode(tokenizer, ["a ⁇", "^ a"]).input_ids
    assert decode_completions(tokenizer, ids) == ["□ a", None] or decode_completions(tokenizer, ids) == ["a", None]


def test_a_completion_ends_at_the_first_of_several_end_tokens():
    tokenizer = load_tokenizer("single")
    rows = [[3, 5, 4, 9], [3, 4, 5, 9], [3, 3, 3, 3]]
    assert decode_completions(tokenizer, rows, [5, 4]) == [tokenizer.decode([3])] * 2 + [None]
    assert decode_completions(tokenizer, torch.tensor(rows), 5) == [tokenizer.decode([3]), tokenizer.decode([3, 4]), None]
