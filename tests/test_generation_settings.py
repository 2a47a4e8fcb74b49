"Settings of `generate` in searches: the values of Transformers itself, or a refusal by name."
import warnings

import pytest
import torch
import transformers as T
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.generation import configuration_utils
from trl import GRPOConfig, GRPOTrainer

from bgrpo_nb.learn.config import BGRPOConfig
from bgrpo_nb.learn.trainer import BGRPOTrainer
from bgrpo_nb.learn.trl_batching import roll_out
from bgrpo_nb.policy.model import load_tokenizer, new_model
from bgrpo_nb.search import generation
from bgrpo_nb.search.generation import beam_search, greedy, sample
from bgrpo_nb.search.generation_settings import (EVERY_SEARCH, INSTEAD, ONLY_SAMPLES, StopStrings, faults_of,
                                                 search_arguments)

V = 13
SHAPE = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=48, max_position_embeddings=64, pad_token_id=0, eos_token_id=None, bos_token_id=None,
             initializer_range=0.6)
torch.manual_seed(0)
LLAMA = T.AutoModelForCausalLM.from_config(T.LlamaConfig(**SHAPE)).eval()
MAMBA = T.AutoModelForCausalLM.from_config(T.MambaConfig(
    vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=None, initializer_range=0.6)).eval()
for model in (LLAMA, MAMBA): model.generation_config.eos_token_id = None
PROMPTS = torch.tensor([[0, 0, 5, 3, 8, 2], [3, 7, 2, 9, 11, 4]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])

FOR_ALL = [dict(repetition_penalty=1.8), dict(repetition_penalty=0.6), dict(no_repeat_ngram_size=2),
           dict(sequence_bias=[[[2, 3], 5.0], [[4], -3.0]]), dict(bad_words_ids=[[5], [2, 6]]), dict(min_new_tokens=4),
           dict(suppress_tokens=[2, 3, 4]), dict(begin_suppress_tokens=[2, 5, 7]), dict(forced_eos_token_id=1),
           dict(exponential_decay_length_penalty=(2, 1.5)), dict(remove_invalid_values=True),
           dict(renormalize_logits=True, suppress_tokens=[2, 3])]
FOR_SAMPLES = [dict(temperature=0.4), dict(top_k=2), dict(top_p=0.4), dict(min_p=0.3), dict(top_h=0.3),
               dict(typical_p=0.3), dict(epsilon_cutoff=0.08), dict(eta_cutoff=0.2),
               dict(repetition_penalty=1.6, temperature=0.5, top_k=8, top_p=0.8, min_p=0.05, suppress_tokens=[3])]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(before)


def by_generate(model, K, C, eos, **settings):
    out = model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=C, pad_token_id=0, eos_token_id=eos,
                         num_return_sequences=K, return_dict_in_generate=True, output_logits=True, output_scores=True, **settings)
    return out, out.sequences[:, 6:].view(2, K, -1)


@pytest.mark.parametrize("settings", FOR_ALL + FOR_SAMPLES, ids=str)
@pytest.mark.parametrize("model", [LLAMA, MAMBA], ids=["tree", "rows"])
def test_samples_are_those_that_generate_draws(model, settings):
    "With equal seeds the same tokens, so every probability is the same; some texts end early"
    K, C, eos = 8, 7, [1, 6]
    arguments = search_arguments(settings, PROMPTS, MASK, K, C, eos, samples=True)
    torch.manual_seed(3)
    ours = sample(model, PROMPTS, MASK, num_return_sequences=K, pad_token_id=0, **arguments | dict(static=True))
    torch.manual_seed(3)
    out, theirs = by_generate(model, K, C, eos, do_sample=True, **dict(top_k=0) | settings)
    assert ours.sequences.tolist() == theirs[..., :ours.sequences.shape[2]].tolist()
    torch.manual_seed(3)
    plain = sample(model, PROMPTS, MASK, num_return_sequences=K, pad_token_id=0, max_new_tokens=C, eos_token_id=eos,
                   static=True)
    changes = "remove_invalid_values" not in settings
    assert (ours.sequences.tolist() != plain.sequences.tolist()) == changes     # each setting can be seen to act
    logp = torch.stack(out.logits, 1).log_softmax(-1)                            # of the policy, at temperature 1
    own = logp.gather(2, theirs.flatten(0, 1)[..., None]).view(2, K, -1)
    written = torch.arange(own.shape[2]) < ours.lengths[..., None]
    torch.testing.assert_close(ours.scores, (own * written).sum(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", FOR_ALL, ids=str)
@pytest.mark.parametrize("model", [LLAMA, MAMBA], ids=["tree", "rows"])
def test_beams_are_those_of_generate(model, settings):
    "Without early ends the two searches are one; where a setting speaks of ends, greedy decoding is"
    ends = {"min_new_tokens", "forced_eos_token_id", "exponential_decay_length_penalty"} & set(settings)
    K, C, eos = (1, 7, [1, 6]) if ends else (5, 6, None)
    arguments = search_arguments(settings, PROMPTS, MASK, K, C, eos)
    ours = beam_search(model, PROMPTS, MASK, num_beams=K, pad_token_id=0, **arguments)
    how = dict(do_sample=False, length_penalty=0.0, num_beams=K)
    out, theirs = by_generate(model, K, C, eos, **how, **settings)
    assert ours.sequences.tolist() == theirs[..., :ours.sequences.shape[2]].tolist()
    if K > 1: torch.testing.assert_close(ours.scores, out.sequences_scores.view(2, K), atol=1e-4, rtol=0)


def test_processors_come_before_the_temperature_as_in_generate():
    penalty, cut = T.RepetitionPenaltyLogitsProcessor(2.5), T.TopPLogitsWarper(0.6)
    def drawn(model, processors, temperature):
        torch.manual_seed(0)
        return sample(model, PROMPTS, MASK, num_return_sequences=9, temperature=temperature, max_new_tokens=6,
                      eos_token_id=None, pad_token_id=0, logits_processor=processors).sequences.tolist()
    for model in (LLAMA, MAMBA):
        for processors in ([penalty, cut], [cut, penalty]):
            torch.manual_seed(0)
            _, theirs = by_generate(model, 9, 6, None, do_sample=True, top_k=0, temperature=3.0,
                                    logits_processor=T.LogitsProcessorList(processors))
            assert drawn(model, processors, 3.0) == theirs.tolist()
        warm = T.TemperatureLogitsWarper(3.0)
        orders = [drawn(model, [penalty, cut], 3.0), drawn(model, [cut, penalty], 3.0),
                  drawn(model, [penalty, warm, cut], 1.0)]
        assert len({str(order) for order in orders}) == 3                       # the test can tell orders apart


@pytest.mark.parametrize("settings", [dict(top_k=3, temperature=0.5), dict(repetition_penalty=1.7, top_p=0.7)], ids=str)
def test_tree_and_rows_are_one_search(settings, monkeypatch):
    "The same model on both, with texts that end early: beams, greedy, samples"
    def searches():
        found = []
        for name, K in (("beams", 5), ("greedy", 1), ("samples", 6)):
            samples = name == "samples"
            chosen = {k: x for k, x in settings.items() if samples or k in EVERY_SEARCH}
            how = search_arguments(chosen, PROMPTS, MASK, K, 8, [1, 6], samples=samples) | dict(static=True)
            seeded = torch.Generator().manual_seed(4)
            if samples: found.append(sample(LLAMA, PROMPTS, MASK, num_return_sequences=K, generator=seeded,
                                            pad_token_id=0, **how))
            else: found.append(beam_search(LLAMA, PROMPTS, MASK, num_beams=K, pad_token_id=0, **how))
        return found
    by_tree = searches()
    monkeypatch.setattr(generation, "why_no_tree", lambda *args: "a test")
    for a, b in zip(by_tree, searches(), strict=True):
        assert torch.equal(a.sequences, b.sequences) and torch.equal(a.lengths, b.lengths)
        torch.testing.assert_close(a.scores, b.scores, atol=1e-4, rtol=0)
    assert min(int(b.lengths.min()) for b in by_tree) < 8


@pytest.mark.parametrize("model", [LLAMA, MAMBA], ids=["tree", "rows"])
def test_a_generator_alone_decides_what_is_drawn(model):
    def drawn(seed):
        return sample(model, PROMPTS, MASK, num_return_sequences=6, max_new_tokens=6, eos_token_id=None, pad_token_id=0,
                      generator=torch.Generator().manual_seed(seed)).sequences.tolist()
    torch.manual_seed(0)
    first, before = drawn(1), torch.get_rng_state()
    torch.manual_seed(1)
    again = drawn(1)
    assert first == again != drawn(2)
    torch.manual_seed(0)
    assert torch.equal(before, torch.get_rng_state())                           # the global numbers are left alone
    one = torch.Generator().manual_seed(1)
    twice = [sample(model, PROMPTS, MASK, num_return_sequences=6, max_new_tokens=6, eos_token_id=None, pad_token_id=0,
                    generator=one).sequences.tolist() for _ in range(2)]
    assert twice[0] == first != twice[1]                                        # the generator advances


WORDS = ["[UNK]", "end", "a", "b", "c", "st", "op", "stop", "!", "d", "e", "f", "g"]


@pytest.fixture(scope="module")
def tokenizer():
    "13 words, which are joined without spaces"
    raw = Tokenizer(models.WordPiece({w if i < 2 else "##" + w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.decoder = decoders.WordPiece(cleanup=False)
    return T.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", pad_token="[UNK]")


@pytest.mark.parametrize("strings", ["stop", ["a", "opst"], ["!"], "bc"])
@pytest.mark.parametrize("model", [LLAMA, MAMBA], ids=["tree", "rows"])
def test_a_completion_ends_where_it_has_written_a_stop_string(model, strings, tokenizer):
    "Samples are those without a stop string, cut at it; beams are those of a naive loop"
    K, C = 40, 8
    how = search_arguments(dict(stop_strings=strings), PROMPTS, MASK, K, C, None, samples=True, tokenizer=tokenizer)
    wanted = [strings] if isinstance(strings, str) else strings
    def stops(ids): return any(s in tokenizer.decode(ids) for s in wanted)
    torch.manual_seed(0)
    found = sample(model, PROMPTS, MASK, num_return_sequences=K, pad_token_id=0, **how | dict(static=True))
    torch.manual_seed(0)
    whole = sample(model, PROMPTS, MASK, num_return_sequences=K, pad_token_id=0, max_new_tokens=C, eos_token_id=None,
                   static=True)
    for b in range(2):
        for ids, n, full in zip(found.sequences[b].tolist(), found.lengths[b].tolist(), whole.sequences[b].tolist()):
            end = next((t for t in range(1, C + 1) if stops(full[:t])), C)
            assert n == end and ids[:n] == full[:n] and not any(ids[n:])
    assert len(set(found.lengths.flatten().tolist())) > 1
    beams = beam_search(model, PROMPTS[1:], num_beams=5, pad_token_id=0, max_new_tokens=6, eos_token_id=None,
                        stopping_criteria=StopStrings(strings, tokenizer, 6))
    expected = naive(model, PROMPTS[1].tolist(), 5, 6, stops)
    assert [ids[:n] for ids, n in zip(beams.sequences[0].tolist(), beams.lengths[0].tolist())] == [t for t, _ in expected]
    torch.testing.assert_close(beams.scores[0], torch.tensor([s for _, s in expected]), atol=1e-4, rtol=0)


@torch.no_grad()
def naive(model, prompt, K, C, ended):
    beams = [([], 0.0)]
    for _ in range(C):
        found = [b for b in beams if ended(b[0])]
        for tokens, score in (b for b in beams if not ended(b[0])):
            logp = model(torch.tensor([prompt + tokens])).logits[0, -1].log_softmax(-1).tolist()
            found += [(tokens + [v], score + x) for v, x in enumerate(logp)]
        beams = sorted(found, key=lambda b: -b[1])[:K]
    return beams


def test_beams_that_end_compete_on_rows_too():
    for eos in ({1}, {1, 4, 6}):
        found = beam_search(MAMBA, PROMPTS[1:], num_beams=6, max_new_tokens=7, eos_token_id=list(eos), pad_token_id=0)
        expected = naive(MAMBA, PROMPTS[1].tolist(), 6, 7, lambda t: bool(t) and t[-1] in eos)
        rows = zip(found.sequences[0].tolist(), found.lengths[0].tolist())
        assert [ids[:n] for ids, n in rows] == [tokens for tokens, _ in expected]
        torch.testing.assert_close(found.scores[0], torch.tensor([s for _, s in expected]), atol=1e-4, rtol=0)


def test_every_name_of_generate_is_obeyed_or_refused():
    names = set(T.GenerationConfig().to_dict()) | set(vars(T.GenerationConfig()))
    obeyed = {n for n in names if not n.startswith("_") and not list(faults_of({n: None}, samples=True))}
    assert obeyed == {*EVERY_SEARCH, *ONLY_SAMPLES}                             # all of them exist; all others are named
    for name in names - obeyed:
        message, = faults_of({name: None}, samples=True)
        assert name in message and (name not in INSTEAD or INSTEAD[name] in message)
    for name, off in ONLY_SAMPLES.items(): assert not list(faults_of({name: off}))
    assert "spelling" in next(faults_of(dict(topk=3)))
    for wrong in (dict(top_k=-1), dict(top_p=7.0), dict(repetition_penalty=0.0), dict(bad_words_ids=[]),
                  dict(cache_implementation="quantized")):
        assert list(faults_of(wrong, samples=True)), wrong
    tried = {name for settings in FOR_ALL + FOR_SAMPLES for name in settings}
    assert {*EVERY_SEARCH, *ONLY_SAMPLES} - tried == {"stop_strings", "max_time", "max_new_tokens", "cache_implementation"}


@pytest.mark.parametrize("settings", FOR_SAMPLES, ids=lambda s: "-".join(s))
def test_transformers_does_not_call_an_obeyed_setting_ignored(settings, monkeypatch):
    "It takes settings of samples for ignored while nothing is drawn, and says so once in the life of a process"
    said = []
    monkeypatch.setattr(configuration_utils.logger, "warning_once", said.append)
    search_arguments(settings, PROMPTS, MASK, 2, 4, None, samples=True)
    assert said == []


def test_lengths_times_and_caches():
    how = search_arguments(dict(max_new_tokens=3, max_time=1e-9, cache_implementation="static"), PROMPTS, MASK, 2, 9, None)
    assert how["max_new_tokens"] == 3 and how["static"] is True
    assert beam_search(LLAMA, PROMPTS, MASK, num_beams=2, pad_token_id=0, **how).lengths.max() == 1 # time was over
    assert "static" not in search_arguments({}, PROMPTS, MASK, 2, 9, None)
    own, LLAMA.generation_config = LLAMA.generation_config, T.GenerationConfig(suppress_tokens=[2], top_k=1, top_p=0.1)
    try: mine = greedy(LLAMA, PROMPTS, MASK, pad_token_id=0, **search_arguments({}, PROMPTS, MASK, 1, 5, None))
    finally: LLAMA.generation_config = own
    assert mine.sequences.equal(greedy(LLAMA, PROMPTS, MASK, max_new_tokens=5, eos_token_id=None, pad_token_id=0).sequences)


def test_a_mixed_group_obeys_for_its_samples_what_beams_have_no_use_for():
    rows, ends = [PROMPTS[1].tolist(), PROMPTS[0, 2:].tolist()], dict(max_completion_length=5, eos_token_id=None, pad_token_id=0)
    plain = roll_out(LLAMA, rows, 8, **ends)
    often = plain[0][0].ids[0]
    mixed = roll_out(LLAMA, rows, 8, rollout="mixed", settings=dict(top_k=1, suppress_tokens=[often]), **ends)
    for group in mixed:
        assert not any(often in c.ids for c in group) and any(often in c.ids for c in plain[0])
        assert len({tuple(c.ids) for c in group[4:]}) == 1                      # the greedy completion, four times
    with pytest.raises(ValueError, match="top_k=1 has no meaning for beams"): roll_out(LLAMA, rows, 8, settings=dict(top_k=1), **ends)


def config(kind, folder, **more):
    return kind(output_dir=str(folder), **dict(num_generations=4, max_completion_length=6, use_cpu=True, bf16=False,
                                               max_steps=1, disable_tqdm=True, report_to="none", save_strategy="no",
                                               per_device_train_batch_size=4) | more)


LIKE_TRL = [dict(), dict(top_k=3), dict(top_p=0.5), dict(min_p=0.2), dict(repetition_penalty=1.5),
            dict(temperature=0.5),
            dict(generation_kwargs=dict(suppress_tokens=[3, 4, 9])), # 9 is the end token
            dict(generation_kwargs='{"max_new_tokens": 3}'),
            dict(top_k=9, generation_kwargs=dict(top_k=2, min_new_tokens=4, no_repeat_ngram_size=2)),
            dict(temperature=2.0, top_p=0.8, min_p=0.01, repetition_penalty=0.8)]


@pytest.mark.parametrize("more", LIKE_TRL, ids=str)
def test_a_baseline_draws_what_trl_draws(more, tmp_path):
    "The same seed, the same prompt: the same completions as the stock trainer's own"
    tokenizer = load_tokenizer("single")
    data, model = Dataset.from_dict({"prompt": ["+ a * P 2 a"] * 4}), new_model("tiny", hidden_size=32, num_hidden_layers=2,
                                                                             num_attention_heads=4, intermediate_size=48)
    def reward(completion_ids, **kwargs): return [float(len(x)) for x in completion_ids]
    mine = BGRPOTrainer(model, reward, config(BGRPOConfig, tmp_path, rollout="sample", **more), data, processing_class=tokenizer)
    stock = GRPOTrainer(model, reward, config(GRPOConfig, tmp_path, **more), data, processing_class=tokenizer)
    ids, _, _ = mine._tokenize_prompts(list(data["prompt"]))
    torch.manual_seed(0)
    found = mine._roll_out(list(data["prompt"]), mine)["completion_ids"]
    torch.manual_seed(0)
    stock.model.eval()
    theirs, *_ = stock._generate_single_turn(prompt_ids=ids, images=None, multimodal_fields={}, num_generations=4)
    assert found == theirs


def test_settings_without_a_meaning_for_beams_are_refused_when_the_config_is_made(tmp_path):
    for more in (dict(top_k=5), dict(top_p=0.9), dict(min_p=0.1), dict(generation_kwargs=dict(typical_p=0.5))):
        with pytest.raises(ValueError, match=f"{next(iter(more.get('generation_kwargs', more)))}=.* has no meaning for beams"):
            config(BGRPOConfig, tmp_path, **more)
        config(BGRPOConfig, tmp_path, rollout="sample", **more)
        config(BGRPOConfig, tmp_path, rollout="mixed", **more)
    for more, message in ((dict(generation_kwargs=dict(num_beams=4)), "num_beams"), (dict(top_p=3.0), "top_p"),
                          (dict(generation_kwargs=dict(guidance_scale=2.0)), "guidance_scale"),
                          (dict(cache_implementation="quantized"), "cache_implementation"),
                          (dict(use_transformers_continuous_batching=True), "leave it out")):
        with pytest.raises(ValueError, match=message): config(BGRPOConfig, tmp_path, rollout="sample", **more)
    kept = config(BGRPOConfig, tmp_path, repetition_penalty=1.2, generation_kwargs=dict(stop_strings="&", min_new_tokens=2))
    assert kept.rollout == "beam"
