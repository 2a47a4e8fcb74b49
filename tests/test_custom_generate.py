"""`generate(custom_generate=tree_generate)`: the search, and every setting obeyed or refused by name."""
import pytest
import torch
from transformers import (
    EosTokenCriteria, GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MaxLengthCriteria, WatermarkingConfig)

from bgrpo_nb.search.allowed_sequences import AllowedSequences
from bgrpo_nb.search.custom_generate import PREPARED, REFUSED, UNUSED, tree_generate
from bgrpo_nb.search.generation import beam_search, greedy

V, PAD = 13, 0
IDS = torch.tensor([[0, 0, 5, 3, 8], [2, 7, 1, 4, 9]])
MASK = (IDS != PAD).long()


def llama():
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, initializer_range=0.6)
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, pad_token_id=PAD, eos_token_id=None, bos_token_id=None, **shape))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, initializer_range=0.6, n_positions=64,
                                      pad_token_id=PAD, eos_token_id=None, bos_token_id=None))


@pytest.fixture(params=[llama, gpt2], ids=["llama", "gpt2"])
def model(request):
    torch.manual_seed(0)
    return request.param().eval()


def by_tree(model, ids=IDS, mask=MASK, **how):
    return model.generate(ids, attention_mask=mask, custom_generate=tree_generate, **how)


BEAMS = dict(num_beams=4, num_return_sequences=4, max_new_tokens=5, length_penalty=0.0)


def test_rows_are_those_of_generate(model):
    "Padded prompts: a mask that got lost would change them"
    theirs = model.generate(IDS, attention_mask=MASK, do_sample=False, **BEAMS)
    assert by_tree(model, **BEAMS).tolist() == theirs.tolist()
    unmasked = by_tree(model, mask=torch.ones_like(MASK), **BEAMS)
    assert unmasked[:4].tolist() != theirs[:4].tolist()


@pytest.mark.parametrize("settings", [dict(repetition_penalty=1.5), dict(no_repeat_ngram_size=1), dict(bad_words_ids=[[3]]),
                                      dict(suppress_tokens=[1, 2]), dict(forced_eos_token_id=6)], ids=lambda s: next(iter(s)))
def test_processors_are_those_of_generate(model, settings):
    theirs = model.generate(IDS, attention_mask=MASK, do_sample=False, **BEAMS, **settings)
    assert by_tree(model, **BEAMS, **settings).tolist() == theirs.tolist()
    assert by_tree(model, **BEAMS).tolist() != theirs.tolist()


def test_end_tokens_and_padding(model):
    found = beam_search(model, IDS, MASK, num_beams=4, max_new_tokens=5, eos_token_id=[3, 4], pad_token_id=PAD)
    out = by_tree(model, **BEAMS, eos_token_id=[3, 4], pad_token_id=PAD, return_dict_in_generate=True)
    assert out.sequences[:, 5:].tolist() == found.sequences.flatten(0, 1).tolist()
    assert torch.allclose(out.sequences_scores, found.scores.flatten(), atol=1e-5)
    assert (found.lengths < 5).any()


def test_greedy_and_fewer_rows_than_beams(model):
    how = dict(max_new_tokens=5, eos_token_id=None, pad_token_id=PAD)
    assert by_tree(model, max_new_tokens=5)[:, 5:].tolist() == greedy(model, IDS, MASK, **how).sequences[:, 0].tolist()
    best_two = beam_search(model, IDS, MASK, num_beams=4, **how).sequences[:, :2].flatten(0, 1)
    assert by_tree(model, **BEAMS | dict(num_return_sequences=2))[:, 5:].tolist() == best_two.tolist()


def test_samples_are_those_of_generate(model):
    how = dict(do_sample=True, num_return_sequences=3, max_new_tokens=4, top_k=5, temperature=0.8)
    torch.manual_seed(1)
    theirs = model.generate(IDS, attention_mask=MASK, **how)
    torch.manual_seed(1)
    assert by_tree(model, **how).tolist() == theirs.tolist()
    drawn = [by_tree(model, **how, generator=torch.Generator().manual_seed(2)).tolist() for _ in range(2)]
    assert drawn[0] == drawn[1] != theirs.tolist()


def test_a_constraint_as_argument_or_as_processor(model):
    items = AllowedSequences.from_ids([[1, 4, 5], [1, 6, 2], [7, 4, 3], [2, 2, 2], [9, 9, 1]])
    how = dict(num_beams=4, num_return_sequences=4, max_new_tokens=3, length_penalty=0.0)
    found = beam_search(model, IDS, MASK, num_beams=4, max_new_tokens=3, eos_token_id=None, pad_token_id=PAD, constraint=items)
    expected = found.sequences.flatten(0, 1).tolist()
    assert by_tree(model, constraint=items, **how)[:, 5:].tolist() == expected
    assert by_tree(model, logits_processor=[items.after(5)], **how)[:, 5:].tolist() == expected
    with pytest.raises(ValueError, match="one constraint"): by_tree(model, constraint=items, logits_processor=[items], **how)


def test_fewer_sequences_than_rows(model):
    two = AllowedSequences.from_ids([[1, 4], [7, 4]])
    out = by_tree(model, constraint=two, **BEAMS, return_dict_in_generate=True)
    scores = out.sequences_scores.view(2, 4)
    assert out.sequences.shape == (8, 7) and torch.isinf(scores[:, 2:]).all() and not torch.isinf(scores[:, :2]).any()
    assert (out.sequences.view(2, 4, 7)[:, 2:, 5:] == PAD).all()


def test_every_field_is_in_one_list():
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    lists = [*PREPARED, *UNUSED, *REFUSED]
    assert len(lists) == len(set(lists))
    assert fields <= set(lists), f"a setting that nobody decided on: {sorted(fields - set(lists))}"


OTHERS = dict(length_penalty=1.0, early_stopping=True, use_cache=False, max_cache_len=64, output_scores=True, output_logits=True,
              output_attentions=True, output_hidden_states=True, encoder_repetition_penalty=1.2, encoder_no_repeat_ngram_size=2,
              guidance_scale=1.5, prefill_chunk_size=4, watermarking_config=WatermarkingConfig())


@pytest.mark.parametrize("name", OTHERS)
def test_a_setting_that_cannot_be_obeyed_is_named(name):
    torch.manual_seed(0)
    how = BEAMS | dict(return_dict_in_generate=True) | {name: OTHERS[name]}
    with pytest.raises(ValueError, match=f"^{name}=.* is not obeyed"): by_tree(llama().eval(), **how)


def test_criteria_of_the_caller_count(model):
    "Another length, or another end token, than the settings have"
    assert by_tree(model, **BEAMS, stopping_criteria=[MaxLengthCriteria(7)]).tolist() == by_tree(model, **BEAMS | dict(max_new_tokens=2)).tolist()
    ended = by_tree(model, **BEAMS, eos_token_id=3, stopping_criteria=[EosTokenCriteria([3, 4])])
    assert ended.tolist() == by_tree(model, **BEAMS, eos_token_id=[3, 4]).tolist() != by_tree(model, **BEAMS, eos_token_id=3).tolist()


def test_what_generate_makes_of_defaults_is_accepted(model):
    "No setting at all: greedy, twenty tokens"
    assert by_tree(model).shape == (2, 25)


@pytest.mark.parametrize("more, message", [
    (dict(do_sample=True), "draws beams"), (dict(cache_implementation="offloaded"), "is no cache of a search"),
    (dict(token_type_ids=torch.zeros_like(IDS)), "token_type_ids"), (dict(position_ids=MASK.cumsum(1) + 3), "position_ids")])
def test_refused(more, message):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=message): by_tree(gpt2().eval(), **BEAMS, **more)


def test_static_shapes(model):
    theirs = by_tree(model, **BEAMS)
    assert by_tree(model, **BEAMS, static=True).tolist() == by_tree(model, **BEAMS, cache_implementation="static").tolist()
    assert by_tree(model, **BEAMS, static=True).tolist() == theirs.tolist()


def test_an_adapter_is_searched_too():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    theirs = adapted.generate(IDS, attention_mask=MASK, do_sample=False, **BEAMS)
    ours = adapted.generate(IDS, attention_mask=MASK, custom_generate=tree_generate, **BEAMS)
    assert ours.tolist() == theirs.tolist()
