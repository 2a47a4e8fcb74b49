"Every setting of TRL's GRPOConfig means the same here, or is listed in CONTRACT: compared with TRL's own GRPOTrainer."
import copy
import json
import os
import random
import warnings
from dataclasses import fields

import pandas as pd
import pytest
import torch
import transformers
import trl
from datasets import Dataset, IterableDataset
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

from bgrpo_nb.learn.config import CONTRACT, BGRPOConfig
from bgrpo_nb.learn.trainer import BGRPOTrainer
from bgrpo_nb.policy.model import load_tokenizer
from bgrpo_nb.search import generation

TOKENS = load_tokenizer("single")
WORDS = "1 2 3 4 5 6 7 8 9 + * ^ P a".split()
G, C = 4, 6
TINY = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24,
            vocab_size=len(TOKENS), pad_token_id=TOKENS.pad_token_id, eos_token_id=TOKENS.eos_token_id,
            bos_token_id=None, max_position_embeddings=64, initializer_range=0.5)
STEPS = dict(num_generations=G, per_device_train_batch_size=16, max_completion_length=C, max_steps=2, use_cpu=True,
             bf16=False, gradient_checkpointing=False, disable_tqdm=True, save_strategy="no", report_to="none", seed=3,
             optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=0.0,
             loss_type="grpo", scale_rewards="none", beta=0.0, num_iterations=1, use_bias_correction_kl=True,
             disable_dropout=True, logging_steps=1, num_train_epochs=3, torch_empty_cache_steps=None)


def prompts(n=12):
    draw = random.Random(1)
    return [" ".join(draw.choices(WORDS, k=2 + i % 4)) for i in range(n)]


ALIKE = prompts()[::3]


def completion(prompt, member):
    "Its own for each prompt and member; some beginnings shared, some without an end"
    draw = random.Random(f"{prompt} {member // 2}")
    ids = [draw.randrange(2, len(TOKENS)) for _ in range(C)]
    ids = [i if i != TOKENS.eos_token_id else 1 for i in ids]
    if member % 2: ids[-1] = 3
    return ids if member == 3 else [*ids[:1 + (member + len(prompt)) % 5], TOKENS.eos_token_id]


def inject(prompts, trainer):
    "A rollout_func: the same completions for both trainers"
    rows = [completion(p, k % G) for k, p in enumerate(prompts)]
    return dict(prompt_ids=TOKENS(prompts)["input_ids"], completion_ids=rows, logprobs=None)


def by_ids(completion_ids, prompts=(), **columns):
    "All alike in a third of the groups, which have no advantage"
    paid = [len(ids) / 8 + 0.3 * (ids[0] % 3) for ids in completion_ids]
    return [1.0 if prompt in ALIKE else x for prompt, x in zip(prompts or paid, paid)]
def by_length(completion_ids, **columns): return [float(len(ids) % 2) for ids in completion_ids]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    "A saved model, which a KL term needs"
    folder = tmp_path_factory.mktemp("policy")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(folder)
    TOKENS.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def trainer_of(kind, model, folder, more, rewards=by_ids, share=True, data=None, **arguments):
    "TRL's trainer, or ours, on the same model, settings and prompts"
    settings = STEPS | dict(output_dir=str(folder)) | more
    if kind == "stock": settings.pop("rollout", None)
    trainer_class, args = (GRPOTrainer, GRPOConfig(**settings)) if kind == "stock" else \
                          (BGRPOTrainer, BGRPOConfig(share_prefixes=share, **settings))
    data = Dataset.from_dict({"prompt": prompts()}) if data is None else data
    return trainer_class(copy.deepcopy(model), rewards, args, data, processing_class=TOKENS,
                         **dict(rollout_func=inject) | arguments)


def parameters(model): return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(*args, **kwargs):
    "Parameters after the steps"
    trainer = trainer_of(*args, **kwargs)
    trainer.train()
    return parameters(trainer.model)


FAMILIES = { # class, and what its config needs beside the sizes
    "Llama": {}, "Qwen3": dict(head_dim=8), "Gemma2": dict(head_dim=8, num_hidden_layers=2, sliding_window=8,
                                                          query_pre_attn_scalar=8),
    "GPT2": dict(n_positions=64), "OPT": dict(ffn_dim=24, word_embed_proj_dim=16, init_std=0.5),
    "Mixtral": dict(num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.0)}


def family(name):
    "A tiny model with random weights"
    config_class = getattr(transformers, f"{name}Config")
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config_class(**TINY | FAMILIES[name])).float()


SEQUENCE = dict(importance_sampling_level="sequence")
AGAIN = dict(num_iterations=2, learning_rate=3.0)             # the second step is off-policy: ratios differ from 1
ADAM = dict(optim="adamw_torch", learning_rate=1e-2, adam_epsilon=1e-3)
VESPO = dict(loss_type="vespo", **AGAIN)
KL = dict(beta=0.05, num_iterations=2, learning_rate=0.3)
SYNCED = dict(sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.5)
ADAPTIVE = dict(use_adaptive_entropy=True, entropy_coef=0.1, entropy_target=9.0, max_steps=3)
SAMPLES = dict(rollout="sample")
THREE = dict(max_steps=3)

TRAINED = [ # what is changed, and what else it needs to have an effect
    (dict(loss_type="dr_grpo"), {}), (dict(loss_type="dapo"), {}), (dict(loss_type="bnpo"), {}),
    (dict(loss_type="cispo"), {}), (dict(loss_type="sapo"), AGAIN), (dict(loss_type="vespo"), {}),
    (dict(loss_type="luspo"), SEQUENCE),
    (dict(sapo_temperature_neg=3.0, sapo_temperature_pos=2.0), dict(loss_type="sapo", **AGAIN)),
    (dict(vespo_k_pos=1.0, vespo_lambda_pos=1.0), VESPO), (dict(vespo_k_neg=1.0, vespo_lambda_neg=1.0), VESPO),
    (dict(scale_rewards="group"), {}), (dict(scale_rewards="batch"), {}), (dict(scale_rewards=True), {}),
    (dict(reward_weights=[1.0, 0.2]), {}), (dict(multi_objective_aggregation="normalize_then_sum"), {}),
    (dict(num_iterations=2), {}), (dict(epsilon=0.9), AGAIN), (dict(epsilon_high=1.0), AGAIN),
    (dict(delta=1.01), AGAIN), (SEQUENCE, AGAIN), (dict(off_policy_mask_threshold=1e-4), AGAIN),
    (dict(beta=0.05), dict(num_iterations=2, learning_rate=0.3)), (dict(use_bias_correction_kl=False), KL),
    (SYNCED, KL | THREE), (dict(ref_model_mixup_alpha=0.9), SYNCED | KL | THREE),
    (dict(ref_model_sync_steps=2), SYNCED | KL | THREE | dict(beta=0.1)),
    (dict(top_entropy_quantile=0.5), {}), (dict(entropy_coef=0.1), {}), (ADAPTIVE, THREE),
    (dict(entropy_coef_delta=0.05, entropy_coef_min=0.02), ADAPTIVE), (dict(entropy_coef_max=0.05), ADAPTIVE),
    (dict(entropy_target=0.01), ADAPTIVE),
    (dict(temperature=0.5), SAMPLES), (dict(mask_truncated_completions=True), SAMPLES),
    (dict(gradient_accumulation_steps=2), {}), (dict(shuffle_dataset=False), {}), (dict(seed=4), {}),
    (dict(learning_rate=0.1), {}), (dict(max_grad_norm=0.01), {}), (dict(weight_decay=0.1), {}),
    (dict(lr_scheduler_kwargs=dict(min_lr=0.4)),
     THREE | dict(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs=dict(min_lr=0.01))),
    (dict(lr_scheduler_type="linear"), {}), (dict(warmup_steps=2), dict(lr_scheduler_type="constant_with_warmup")),
    (dict(optim="adamw_torch"), dict(learning_rate=1e-2, adam_epsilon=1e-3)),
    (dict(adam_beta1=0.5, adam_beta2=0.9), ADAM), (dict(adam_epsilon=1e-1), ADAM),
    (dict(max_steps=1), {}), (dict(max_steps=-1, num_train_epochs=1), {}),
]
STOCK = {}                                                   # what TRL's trainer has reached


def by_stock(policy, folder, more, rewards):
    key = json.dumps([more, len(rewards)], sort_keys=True)
    if key not in STOCK: STOCK[key] = trained("stock", policy, folder, more, rewards=rewards)
    return STOCK[key]


def in_words(changed): return " ".join(f"{name}={value}" for name, value in changed.items())


@pytest.mark.parametrize("changed, needs", TRAINED, ids=[in_words(changed) for changed, _ in TRAINED])
def test_the_same_training_as_trl(policy, tmp_path, changed, needs):
    "Same completions, same parameters; and the setting has an effect that the comparison would see"
    several = {"reward_weights", "multi_objective_aggregation"} & changed.keys()
    rewards = [by_ids, by_length] if several else [by_ids]
    expected = by_stock(policy, tmp_path, needs | changed, rewards)
    found = trained("ours", policy, tmp_path, needs | changed, rewards=rewards)
    assert (expected - by_stock(policy, tmp_path, needs, rewards)).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("more", [dict(per_device_train_batch_size=8, steps_per_generation=2, num_iterations=2),
                                  dict(per_device_train_batch_size=4, generation_batch_size=16),
                                  dict(per_device_train_batch_size=4, gradient_accumulation_steps=4)],
                         ids=lambda d: "-".join(d))
def test_full_rows_are_cut_into_micro_batches_as_in_trl(policy, tmp_path, more):
    torch.testing.assert_close(trained("ours", policy, tmp_path, more, share=False),
                               trained("stock", policy, tmp_path, more), atol=1e-5, rtol=1e-4)


ARRIVES = dict( # settings of Transformers' loop, which nothing here reads or replaces: a value other than the default
    output_dir="elsewhere", optim_args="a=1", optim_target_modules="all-linear", average_tokens_across_devices=False,
    bf16=True, tf32=True, activation_checkpointing=True,
    activation_checkpointing_kwargs=dict(use_reentrant=True), gradient_checkpointing=True,
    gradient_checkpointing_kwargs=dict(use_reentrant=True), torch_compile=True, torch_compile_backend="eager",
    torch_compile_mode="default", use_liger_kernel=True, liger_kernel_config=dict(rope=True), use_cache=True,
    logging_strategy="epoch", logging_steps=7, logging_first_step=True, log_on_each_node=False,
    logging_nan_inf_filter=False, include_num_input_tokens_seen="all", log_level="info", log_level_replica="info",
    disable_tqdm=False, report_to="tensorboard", run_name="a name", project="a project", trackio_space_id="a/b",
    trackio_bucket_id="a/b", trackio_static_space_id="a/b", eval_strategy="steps", eval_steps=5, eval_delay=3,
    prediction_loss_only=True, eval_on_start=True, eval_do_concat_batches=False, eval_use_gather_object=True,
    eval_accumulation_steps=2, save_only_model=True, save_strategy="epoch", save_steps=9, save_on_each_node=True,
    enable_jit_checkpoint=True, push_to_hub=True, hub_token="t", hub_private_repo=True, hub_model_id="a/b",
    hub_strategy="end", hub_always_push=True, hub_revision="r", load_best_model_at_end=True,
    metric_for_best_model="reward", ignore_data_skip=True, restore_callback_states_from_checkpoint=True,
    full_determinism=True, use_cpu=True, accelerator_config=dict(split_batches=True), parallelism_config=None,
    dataloader_drop_last=True, dataloader_num_workers=1, dataloader_pin_memory=False,
    dataloader_persistent_workers=True, dataloader_prefetch_factor=3, dataloader_multiprocessing_context="fork",
    dataloader_in_order=False, ddp_find_unused_parameters=True, ddp_bucket_cap_mb=5, ddp_broadcast_buffers=True,
    ddp_static_graph=True, ddp_backend="gloo", ddp_timeout=60, fsdp="full_shard", fsdp_config=dict(min_num_params=9),
    deepspeed=dict(train_batch_size="auto"), debug="underflow_overflow", skip_memory_metrics=False, do_train=True,
    do_eval=True, do_predict=True, local_rank=0, ds3_gather_for_generation=False, num_iterations=3,
    log_multimodal=False, log_completions_hub_repo="a/b")
BESIDE = dict(log_completions_hub_repo=dict(log_completions=True), load_best_model_at_end=dict(eval_strategy="steps"),
              dataloader_prefetch_factor=dict(dataloader_num_workers=1),
              dataloader_persistent_workers=dict(dataloader_num_workers=1),
              full_determinism=dict(seed=1))                 # what these settings need

SEEN = { # settings that are compared in a test of their own, below or in another file
    "remove_unused_columns": "test_columns_and_chat_templates_as_in_trl",
    "chat_template_kwargs": "test_columns_and_chat_templates_as_in_trl",
    "pad_to_multiple_of": "test_settings_that_leave_the_parameters_as_they_are",
    "cast_lm_head_to_fp32": "test_settings_that_leave_the_parameters_as_they_are",
    "fp16": "test_sizes_and_names_that_contradict_each_other",
    "router_aux_loss_coef": "test_a_router_learns_as_in_trl",
    "log_completions": "test_the_table_of_completions_is_trls",
    "num_completions_to_print": "test_the_table_of_completions_is_trls",
    "log_unique_prompts": "test_the_table_of_completions_is_trls",
    "model_init_kwargs": "tests/test_policies.py", "trust_remote_code": "tests/test_policies.py",
    "repetition_penalty": "tests/test_generation_settings.py",
}


def test_every_setting_of_trl_is_listed_and_has_a_check():
    "A new release of TRL with another field fails here, with the field's name"
    listed = [name for kind in CONTRACT.values() for name in kind]
    compared = {name for changed, _ in TRAINED for name in changed}
    known = {*listed, *compared, *ARRIVES, *SEEN}
    of_trl = {f.name for f in fields(GRPOConfig)}
    assert of_trl - known == set(), "fields that neither CONTRACT nor this file knows"
    assert known - of_trl - {"rollout"} == set(), "fields that TRL does not have any more"
    assert len(listed) == len(set(listed))
    assert all(where in globals() or where.startswith("tests/") for where in SEEN.values())


def outcome(config_class, name, value):
    "What becomes of a value: the setting afterwards, or the error"
    settings = dict(use_cpu=True, bf16=False, num_generations=4, per_device_train_batch_size=16, output_dir="x",
                    per_device_eval_batch_size=4, gradient_checkpointing=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: return getattr(config_class(**settings | BESIDE.get(name, {}) | {name: value}), name)
        except Exception as e: return type(e), str(e)


@pytest.mark.parametrize("name", ARRIVES)
def test_a_setting_of_transformers_arrives(name, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))      # some of them are written there
    stock, ours = (outcome(c, name, ARRIVES[name]) for c in (GRPOConfig, BGRPOConfig))
    assert repr(ours) == repr(stock)


REFUSED = dict(use_vllm=True, use_transformers_continuous_batching=True, use_transformers_paged=True,
               transformers_continuous_batching_config=dict(a=1), disable_dropout=False,
               neftune_noise_alpha=5.0, auto_find_batch_size=True, train_sampling_strategy="sequential", data_seed=1,
               max_tool_calling_iterations=3, resume_from_checkpoint="x", label_smoothing_factor=0.1,
               label_names=["x"], length_column_name="x", include_for_metrics=["loss"], batch_eval_metrics=True,
               vllm_mode="server", vllm_importance_sampling_correction=False, vllm_gpu_memory_utilization=0.9)


@pytest.mark.parametrize("name", CONTRACT["refused"])
def test_what_is_refused_names_the_setting_and_its_default_is_taken(name):
    "Also with samples"
    value = REFUSED.get(name, "another value")
    with pytest.raises(ValueError, match=f"{name}=.* leave it|{name}=.*; "):
        BGRPOConfig(use_cpu=True, rollout="sample", **{name: value})
    default = getattr(BGRPOConfig(use_cpu=True), name)
    assert getattr(BGRPOConfig(use_cpu=True, **{name: default}), name) == default


@pytest.mark.parametrize("rollout", ["beam", "mixed", "sample"])
@pytest.mark.parametrize("name, value", dict(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1,
                                             mask_truncated_completions=True).items())
def test_what_is_of_use_where_something_is_drawn(name, value, rollout):
    refusing = {"beam": ("not with beams", "not with beams alone"), "mixed": ("not with beams",), "sample": ()}
    if not any(name in CONTRACT[kind] for kind in refusing[rollout]):
        BGRPOConfig(use_cpu=True, rollout=rollout, **{name: value})
        return
    with pytest.raises(ValueError, match=f"{name}={value}"): BGRPOConfig(use_cpu=True, rollout=rollout, **{name: value})


@pytest.mark.parametrize("given, prompts_per_step, rows, micro_batches", [
    ({}, 48, 768, 1), (dict(generation_batch_size=64), 4, 64, 1), (dict(steps_per_generation=4), 48, 192, 4),
    (dict(gradient_accumulation_steps=4), 48, 192, 4), (dict(per_device_train_batch_size=32), 2, 32, 1),
    (dict(generation_batch_size=64, per_device_train_batch_size=16), 4, 16, 4),
    (dict(generation_batch_size=64, steps_per_generation=2), 4, 32, 2),
    (dict(prompts_per_step=4, per_device_train_batch_size=16, gradient_accumulation_steps=4), 4, 16, 4)],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else str(x))
def test_sizes_follow_from_those_that_are_given(given, prompts_per_step, rows, micro_batches):
    c = BGRPOConfig(use_cpu=True, num_generations=16, **given)
    assert (c.prompts_per_step, c.per_device_train_batch_size, c.steps_per_generation) == (prompts_per_step, rows,
                                                                                          micro_batches)
    assert c.generation_batch_size == rows * micro_batches == 16 * prompts_per_step


@pytest.mark.parametrize("given, says", [
    (dict(generation_batch_size=60), "generation_batch_size=60 holds no whole number of groups"),
    (dict(per_device_train_batch_size=10), "per_device_train_batch_size=10 x 1 .* no whole number of groups"),
    (dict(generation_batch_size=64, gradient_accumulation_steps=3), "generation_batch_size=64 does not divide into 3"),
    (dict(prompts_per_step=3, per_device_train_batch_size=16), "prompts_per_step=3 contradicts per_device_train"),
    (dict(prompts_per_step=3, generation_batch_size=64), "prompts_per_step=3 contradicts generation_batch_size=64"),
    (dict(generation_batch_size=64, steps_per_generation=2, per_device_train_batch_size=8), "contradicts the 16 rows"),
    (dict(steps_per_generation=0), "steps_per_generation=0"), (dict(num_generations_eval=0), "num_generations_eval=0"),
    (dict(activation_checkpointing=BGRPOConfig.gradient_checkpointing,
          gradient_checkpointing=not BGRPOConfig.gradient_checkpointing), "its new name"),
    (dict(baseline="right_only", multi_objective_aggregation="normalize_then_sum"), "the sum of the rewards"),
    (dict(baseline="right_only", distinct_bonus=0.5), "distinct_bonus=0.5 has no effect"),
    (dict(baseline="right_only", balance_rewards=True), "balance_rewards=True has no effect"),
    (dict(trie_elements=2**20, share_prefixes=False), "trie_elements=1048576 is of tries"),
    (dict(fp16=True), "fp16=True trains in float32 on a CPU")],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_sizes_and_names_that_contradict_each_other(given, says):
    with pytest.raises(ValueError, match=says): BGRPOConfig(use_cpu=True, **given)


@pytest.mark.parametrize("changed", [dict(pad_to_multiple_of=16), dict(cast_lm_head_to_fp32=True)], ids=in_words)
@pytest.mark.parametrize("share", [True, False], ids=["trie", "full rows"])
def test_settings_that_leave_the_parameters_as_they_are(policy, tmp_path, changed, share):
    trainer = trainer_of("ours", policy, tmp_path, changed, share=share)
    batches, inner = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda rows: (batches.append(inner(rows)), batches[-1])[1]
    trainer.train()
    expected = trained("stock", policy, tmp_path, changed)
    torch.testing.assert_close(parameters(trainer.model), expected, atol=1e-5, rtol=1e-4)
    assert (batches[0]["completion_ids"].shape[1] == 16) == ("pad_to_multiple_of" in changed)
    assert ("forward" in vars(trainer.model.lm_head)) == ("cast_lm_head_to_fp32" in changed)


def test_a_router_learns_as_in_trl(tmp_path):
    torch.manual_seed(0)
    experts = family("Mixtral")
    found, expected, without = (trained(kind, experts, tmp_path, dict(router_aux_loss_coef=coef))
                                for kind, coef in (("ours", 0.5), ("stock", 0.5), ("stock", 0.0)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (expected - without).abs().max() > 1e-3


def test_the_table_of_completions_is_trls(policy, tmp_path, capsys):
    "Printed and written; with beams there is a column more"
    more = dict(log_completions=True, num_completions_to_print=2, log_unique_prompts=True, max_steps=1)
    said, tables = {}, {}
    for kind in ("stock", "ours"):
        trainer_of(kind, policy, tmp_path / kind, more).train()
        said[kind] = [line for line in capsys.readouterr().out.splitlines() if "│" in line or "┃" in line]
        tables[kind] = pd.read_parquet(next((tmp_path / kind / "completions").glob("*.parquet")))
    assert said["ours"] == said["stock"] != []
    pd.testing.assert_frame_equal(tables["ours"], tables["stock"])


CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if closed %}P{% endif %}"


def conversations(n=12): return Dataset.from_dict({"prompt": [[{"role": "user", "content": p}] for p in prompts(n)],
                                                   "answer": [str(i) for i in range(n)]})


@pytest.mark.parametrize("keep", [True, False])
def test_columns_and_chat_templates_as_in_trl(policy, tmp_path, keep):
    "Prompts of messages, a template with a setting of its own, other columns with and without remove_unused_columns"
    seen, tokenizer = {}, copy.deepcopy(TOKENS)
    tokenizer.chat_template = CHAT
    for kind in ("stock", "ours"):
        def pay(prompts, completions, completion_ids, **columns):
            seen.setdefault(kind, []).append((prompts, columns.get("answer"), type(completions[0])))
            return by_ids(completion_ids)
        more = dict(remove_unused_columns=not keep, chat_template_kwargs=dict(closed=True), max_steps=1)
        settings = STEPS | dict(output_dir=str(tmp_path)) | more
        trainer_class, args = (GRPOTrainer, GRPOConfig(**settings)) if kind == "stock" else (BGRPOTrainer,
                               BGRPOConfig(**settings))
        trainer = trainer_class(copy.deepcopy(policy), pay, args, conversations(), processing_class=tokenizer)
        trainer.train()
        seen[kind].append(trainer._tokenize_prompts(list(conversations()["prompt"]))[0])
    assert seen["ours"] == seen["stock"] and (seen["ours"][0][1] is not None) == keep
    assert seen["ours"][-1][0][-1] == TOKENS.convert_tokens_to_ids("P")


@pytest.mark.parametrize("more", [{}, dict(num_generations_eval=2, per_device_eval_batch_size=4),
                                  dict(per_device_eval_batch_size=8)], ids=in_words)
def test_evaluation_by_reward_as_in_trl(policy, tmp_path, more):
    "One dataset and several by name; without an evaluator"
    def rollout(prompts, trainer):
        size = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        rows = [completion(p, k % size) for k, p in enumerate(prompts)]
        return dict(prompt_ids=TOKENS(prompts)["input_ids"], completion_ids=rows, logprobs=None)
    data = Dataset.from_dict({"prompt": prompts(8)})
    found = {}
    for kind in ("stock", "ours"):
        more = dict(per_device_eval_batch_size=4) | more
        trainer = trainer_of(kind, policy, tmp_path, more, rollout_func=rollout, eval_dataset=dict(a=data, b=data))
        found[kind] = {k: v for k, v in trainer.evaluate().items() if "reward" in k and "groups" not in k}
    assert found["ours"] == pytest.approx(found["stock"]) and "eval_reward" in found["ours"]


def test_arguments_by_position_and_a_rollout_of_ones_own(policy, tmp_path):
    "As in GRPOTrainer's signature, where rollout_func is the thirteenth; what is left unread is refused"
    calls = []
    class Counted(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): calls.append(state.global_step)
    found = {}
    for trainer_class, config in ((GRPOTrainer, GRPOConfig), (BGRPOTrainer, BGRPOConfig)):
        args = config(**STEPS | dict(output_dir=str(tmp_path)))
        data = Dataset.from_dict({"prompt": prompts()})
        trainer = trainer_class(copy.deepcopy(policy), by_ids, args, data, None, TOKENS, None, [Counted()],
                                (None, None), None, None, None, inject)
        trainer.train()
        found[trainer_class] = parameters(trainer.model)
    torch.testing.assert_close(found[GRPOTrainer], found[BGRPOTrainer], atol=1e-5, rtol=1e-4)
    assert calls == [1, 2] * 2
    for more, says in ((dict(rollout="mixed"), "rollout='mixed' needs the search"),
                       (dict(prompts_at_once=2), "prompts_at_once=2 needs"),
                       (dict(baseline="minimum_risk"), "baseline='minimum_risk' needs")):
        with pytest.raises(ValueError, match=says): trainer_of("ours", policy, tmp_path, more)
    with pytest.raises(TypeError, match="unexpected keyword argument 'evaluater'"):
        trainer_of("ours", policy, tmp_path, {}, evaluater=1)
    with pytest.raises(ValueError, match="eval_dataset is not read"):
        trainer_of("ours", policy, tmp_path, {}, eval_dataset=conversations(), evaluator=lambda *a: {})
    trainer = trainer_of("ours", policy, tmp_path, {}, evaluator=lambda *a: dict(x=1.0))
    with pytest.raises(ValueError, match="eval_dataset is not read"): trainer.evaluate(conversations())
    assert trainer.evaluate()["eval_x"] == 1.0


def near_the_end(position, tmp_path, kind=Dataset, **more):
    "A trainer whose longest prompt has 60 of 64 positions, with completions of up to 6"
    model = family("Llama" if position == "rotary" else "GPT2")
    rows = [" ".join(["1"] * n) for n in (3, 60, 4, 5)]
    if more.pop("chat", False): rows = [[dict(role="user", content=row)] for row in rows]
    data = Dataset.from_dict({"prompt": rows})
    if kind is IterableDataset: data = data.to_iterable_dataset()
    tokenizer = copy.deepcopy(TOKENS)
    tokenizer.chat_template = CHAT
    settings = STEPS | dict(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=16) | more
    return BGRPOTrainer(model, by_ids, BGRPOConfig(**settings), data, processing_class=tokenizer)


@pytest.mark.parametrize("chat", [False, True], ids=["text", "messages"])
def test_prompts_near_the_models_length(tmp_path, chat):
    "Learned positions: refused before training, unless it just fits; rotary ones: one warning, and training"
    says = "may reach 66 tokens, the model has 64 positions"
    with pytest.raises(ValueError, match=f"{says}; lower max_completion_length by 2"):
        near_the_end("learned", tmp_path, chat=chat)
    near_the_end("learned", tmp_path, chat=chat, max_completion_length=4)
    generation._LONG.clear()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        near_the_end("rotary", tmp_path, chat=chat).train()
    assert sum(says in str(w.message) for w in found) == 1


def test_a_stream_is_measured_batch_by_batch(tmp_path):
    trainer = near_the_end("learned", tmp_path, IterableDataset)
    with pytest.raises(ValueError, match="may reach 66 tokens"): trainer.train()
    generation._LONG.clear()
    with pytest.warns(UserWarning, match="may reach 66 tokens"):
        near_the_end("rotary", tmp_path, IterableDataset).train()


def test_a_stream_trains_as_its_dataset(policy, tmp_path):
    found = [trained(kind, policy, tmp_path, dict(shuffle_dataset=False), data=data) for kind, data in (
             ("stock", Dataset.from_dict({"prompt": prompts()}).to_iterable_dataset()),
             ("ours", Dataset.from_dict({"prompt": prompts()}).to_iterable_dataset()),
             ("ours", Dataset.from_dict({"prompt": prompts()})))]
    for other in found[1:]: torch.testing.assert_close(other, found[0], atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    "A folder with a model that scores texts"
    folder = tmp_path_factory.mktemp("reward") / "scorer"
    torch.manual_seed(2)
    transformers.LlamaForSequenceClassification(LlamaConfig(**TINY, num_labels=1)).save_pretrained(folder)
    tokenizer = copy.deepcopy(TOKENS)                         # text of prompt and completion, joined: words it has not
    tokenizer.backend_tokenizer.model = WordLevel(tokenizer.get_vocab(), unk_token="a")
    tokenizer.save_pretrained(folder)
    return folder


def test_rewards_in_all_of_trls_forms(policy, tmp_path, reward_model):
    "Async functions, models and models' names, several with weights: as in TRL"
    async def later(completion_ids, **columns): return by_length(completion_ids)
    def forms(): return [by_ids, later, str(reward_model),
                         transformers.AutoModelForSequenceClassification.from_pretrained(reward_model)]
    more = dict(reward_weights=[1.0, 0.5, 0.3, -0.1])
    found, expected = (trained(kind, policy, tmp_path, more, rewards=forms()) for kind in ("ours", "stock"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_what_is_missing_is_one_line(policy, tmp_path):
    args = BGRPOConfig(**STEPS | dict(output_dir=str(tmp_path)))
    data = Dataset.from_dict({"prompt": prompts()})
    with pytest.raises(ValueError, match="processing_class is missing"):
        BGRPOTrainer(family("Llama"), by_ids, args, data)
    with pytest.raises(ValueError, match="reward_funcs is missing"): BGRPOTrainer(policy, None, args, data)
    with pytest.raises(ValueError, match="no column 'prompt', only text"):
        BGRPOTrainer(policy, by_ids, args, data.rename_column("prompt", "text"))
    assert BGRPOTrainer(copy.deepcopy(policy), by_ids, args, data).processing_class.vocab_size == TOKENS.vocab_size


def policy_of(name):
    "A tiny model of the family, a LoRA, or a model with a vision tower that is given text"
    if name == "LoRA":
        from peft import LoraConfig, get_peft_model
        return get_peft_model(family("Llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"],
                                                          init_lora_weights=False))
    if name == "VLM":
        vision = transformers.CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, patch_size=8,
                                               num_attention_heads=2, image_size=16, projection_dim=16)
        torch.manual_seed(1)
        config = transformers.LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TINY), image_token_id=30)
        return transformers.LlavaForConditionalGeneration(config)
    return family(name)


def logp(model, prompt_ids, completion_ids):
    "Of one completion, alone and without padding: nats"
    ids = torch.tensor([[*prompt_ids, *completion_ids]])
    with torch.no_grad(): logits = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, ids[0, 1:, None])[-len(completion_ids):].sum().item()


@pytest.mark.parametrize("rollout, checkpointing", [("beam", False), ("beam", True), ("sample", True), ("mixed", True)],
                         ids=["beam", "beam-checkpointing", "sample-checkpointing", "mixed-checkpointing"])
@pytest.mark.parametrize("name", [*FAMILIES, "LoRA", "VLM"])
def test_two_steps_of_each_family(name, rollout, checkpointing, tmp_path):
    "Scores are the policy's log-probabilities; after two steps on a batch the trie and full rows have equal parameters"
    start, seen, ends = policy_of(name).eval(), [], []
    def pay(prompts, completion_ids, beam_score, **columns):
        seen.append((prompts, completion_ids, beam_score))
        return [reward + k % G for k, reward in enumerate(by_ids(completion_ids))]
    for share in (True, False):
        ends.append(trained("ours", start, tmp_path, dict(rollout=rollout, learning_rate=0.05, num_iterations=2,
                    gradient_checkpointing=checkpointing), rewards=pay, share=share, rollout_func=None))
    for prompt, ids, score in list(zip(*seen[0]))[::5]:
        assert score == pytest.approx(logp(start, TOKENS(prompt)["input_ids"], ids), abs=1e-3)
    assert (ends[0] - parameters(start)).abs().max() > 1e-3
    torch.testing.assert_close(*ends, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("parser", [transformers.HfArgumentParser, trl.TrlParser])
def test_the_settings_are_read_by_the_parsers_of_scripts(parser, tmp_path):
    found = parser((BGRPOConfig,))
    assert "share of the way to the end" in " ".join(found.format_help().split())
    config, = found.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", "true", "--num_generations", "8",
                                                 "--prompts_per_step", "2", "--ema_decay", "0.9"])
    assert (config.num_generations, config.prompts_per_step, config.ema_decay) == (8, 2, 0.9)


def rewards_of_one_step(policy, folder, rewards, more):
    "What TRL's trainer sums up, and the advantages"
    trainer = trainer_of("ours", policy, folder, dict(max_steps=1, rollout="sample") | more, rewards=rewards)
    trainer.train()
    return trainer.state.log_history[0], list(trainer._logs["advantages"])


def wrong(completion_ids, **columns): return [0.0] * len(completion_ids)
def always(completion_ids, **columns): return [1.0] * len(completion_ids)
def some(completion_ids, **columns): return [float(ids[0] % 2) for ids in completion_ids]


def test_a_function_without_weight_changes_nothing(policy, tmp_path):
    "Neither what counts as right nor who gets the bonus"
    for more in (dict(credit_once=True), dict(distinct_bonus=0.5)):
        alone, of_alone = rewards_of_one_step(policy, tmp_path, [some], more)
        both, of_both = rewards_of_one_step(policy, tmp_path, [always, some], more | dict(reward_weights=[0.0, 1.0]))
        assert of_alone == of_both and len(set(of_alone)) > 1
        assert alone["groups/all_valid"] == both["groups/all_valid"] < 1
        assert both["rewards/always/mean"] == 1.0
    found, _ = rewards_of_one_step(policy, tmp_path, [wrong, always], dict(reward_weights=[1.0, -0.1]))
    assert found["reward"] < 0 == found["groups/all_valid"]


def test_the_bonus_is_what_the_setting_says_whatever_the_weight(policy, tmp_path):
    _, plain = rewards_of_one_step(policy, tmp_path, [some], dict(distinct_bonus=0.5))
    _, halved = rewards_of_one_step(policy, tmp_path, [some], dict(distinct_bonus=0.25, reward_weights=[0.5]))
    assert halved == pytest.approx([x / 2 for x in plain])


def test_no_bonus_goes_to_a_row_that_no_function_with_a_weight_has_paid(policy, tmp_path):
    "Its verdict says that it is right; the function that counts gave None"
    def named(completion_ids, log_extra, **columns):
        log_extra("reason", ["ok"] * len(completion_ids))
        return [1.0] * len(completion_ids)
    def sometimes(completion_ids, **columns): return [float(ids[0]) if k % 2 else None for k, ids in enumerate(completion_ids)]
    found, _ = rewards_of_one_step(policy, tmp_path, [named, sometimes], dict(distinct_bonus=0.5, reward_weights=[0.0, 1.0]))
    assert found["rewards/named/mean"] == 1.0 and found["reward"] < 1e3


def test_an_evaluator_that_is_never_called_is_named_and_what_it_returns_is_checked(policy, tmp_path):
    with pytest.warns(UserWarning, match="evaluator is not called.*eval_strategy='steps'"):
        trainer = trainer_of("ours", policy, tmp_path, {}, evaluator=lambda model, tokenizer: None)
    with pytest.raises(TypeError, match="evaluator returned None; return a dictionary"): trainer.evaluate()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the evaluator")
        trainer_of("ours", policy, tmp_path, dict(eval_strategy="steps", eval_steps=1), evaluator=lambda *given: {})


@pytest.mark.parametrize("change, says", [
    (dict(eos_token=None), "no end token"), (dict(pad_token="<new>"), "pad_token has the id 31.*resize_token_embeddings"),
    (dict(eos_token="<new>"), "eos_token has the id 31.*resize_token_embeddings")], ids=["no end", "pad", "end"])
def test_a_tokenizer_that_does_not_fit_the_model(policy, tmp_path, change, says):
    tokenizer = copy.deepcopy(TOKENS)
    for name, value in change.items():
        if value is None: setattr(tokenizer, name, None)
        else: tokenizer.add_special_tokens({name: value})
    args = BGRPOConfig(**STEPS | dict(output_dir=str(tmp_path)))
    data = Dataset.from_dict({"prompt": prompts()})
    with pytest.raises(ValueError, match=says):
        BGRPOTrainer(copy.deepcopy(policy), by_ids, args, data, processing_class=tokenizer)


def test_a_tokenizer_with_more_tokens_than_the_model_is_named(policy, tmp_path):
    tokenizer = copy.deepcopy(TOKENS)
    tokenizer.add_tokens(["<one more>"])
    args = BGRPOConfig(**STEPS | dict(output_dir=str(tmp_path)))
    with pytest.warns(UserWarning, match="32 tokens and the model 31.*resize_token_embeddings"):
        BGRPOTrainer(copy.deepcopy(policy), by_ids, args, Dataset.from_dict({"prompt": prompts()}), processing_class=tokenizer)


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
@pytest.mark.filterwarnings("ignore:.*every row is forwarded", "ignore:.*without a beam tree")
def test_a_tuned_prefix_is_counted_before_prompts_with_padding(name, tmp_path):
    "The log-probabilities of a row are those without its padding"
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    plain = family(name)
    plain.config.num_key_value_heads = plain.config.num_attention_heads if name == "GPT2" else 1 # PEFT reads it
    model = peft.get_peft_model(plain, config)
    for x in model.parameters():
        if x.requires_grad: torch.nn.init.normal_(x, std=0.5)
    trainer = trainer_of("ours", model, tmp_path, {})
    row, pads = torch.tensor([[5, 9, 4, 7, 6]]), (0, 5, 20)
    found = []
    for pad in pads:
        ids, mask = (torch.nn.functional.pad(x, (pad, 0)) for x in (row, torch.ones_like(row)))
        with torch.no_grad(): found.append(trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 2)[0])
    for other in found[1:]: torch.testing.assert_close(other, found[0], atol=1e-4, rtol=1e-4)
