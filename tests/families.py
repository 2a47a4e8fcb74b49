"""Every family of causal models that Transformers can build small: is it searched over a tree, over rows, or refused?

    python tests/families.py    writes nbs/experiments/families.json, which the page of the beam tree shows
"""
import contextlib
import inspect
import io
import json
import logging
import signal
import sys
import warnings
from pathlib import Path

import torch
import transformers as T
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
                                                    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)

from bgrpo_nb.search.beam_rows import why_no_cache
from bgrpo_nb.search.beam_tree import why_no_tree
from bgrpo_nb.search.generation import beam_search

RECORD = Path(__file__).parent.parent / "nbs/experiments/families.json"
V = 17
SMALL = dict(vocab_size=V, hidden_size=32, n_embd=32, d_model=32, embed_dim=32, dim=32, num_hidden_layers=2,
             n_layer=2, n_layers=2, num_layers=2, decoder_layers=2, encoder_layers=2, num_attention_heads=4, n_head=4,
             n_heads=4, num_heads=4, decoder_attention_heads=4, encoder_attention_heads=4, num_key_value_heads=2,
             head_dim=8, intermediate_size=48, moe_intermediate_size=16, shared_expert_intermediate_size=16,
             ffn_dim=48, d_ff=48, decoder_ffn_dim=48, encoder_ffn_dim=48, dim_ff=48, n_inner=48, word_embed_proj_dim=32,
             max_position_embeddings=64, n_positions=64, num_local_experts=4, num_experts=4, n_routed_experts=4,
             moe_num_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1,
             n_shared_experts=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
             state_size=4, mamba_d_state=4, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_chunk_size=8,
             mamba_d_conv=2, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
             linear_value_head_dim=8, vocab_size_per_layer_input=V, hidden_size_per_layer_input=8, lru_width=32,
             attention_window_size=32, sliding_window=32, pad_token_id=0, bos_token_id=None, eos_token_id=None,
             initializer_range=0.3, tie_word_embeddings=False, is_decoder=True)
PROMPT, K, C, SECONDS = [3, 7, 2, 9], 4, 5, 8
TEXT, MASK = torch.tensor([[0, 0, *PROMPT[:2]], PROMPT]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])


def takes(kind): # names of the fields of a config class
    return set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "__annotations__", {}))


OTHERS = ({}, dict(num_key_value_heads=4, head_dim=8), dict(rotary_dim=8, bos_token_id=0), dict(num_experts_per_tok=1),
          dict(num_hidden_layers=4))


def small_config(family, other): # of the text part where the family also reads images
    kind = type(CONFIG_MAPPING[family]().get_text_config())
    return kind(**{name: x for name, x in (SMALL | other).items() if name in takes(kind)})


def build(family):
    "A small model with random weights that can read a text"
    failed = []
    for other in OTHERS:
        try: return build_with(family, other)
        except Exception as e: failed.append(e)
    raise failed[0]


def build_with(family, other):
    config = small_config(family, other)
    with torch.device("meta"): size = sum(p.numel() for p in T.AutoModelForCausalLM.from_config(config).parameters())
    if size > 5e6: raise ValueError("its own sizes leave it large")
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad(): model(torch.tensor([PROMPT]))
    return model


@torch.no_grad()
def uncached(model, prompt): # tokens and scores of the K best
    beams = [([], 0.0)]
    for _ in range(C):
        texts = torch.tensor([prompt + tokens for tokens, _ in beams])
        logp = model(texts, use_cache=False).logits[:, -1].float().log_softmax(-1)
        found = [(t + [v], s + x) for (t, s), row in zip(beams, logp.tolist()) for v, x in enumerate(row)]
        beams = sorted(found, key=lambda beam: -beam[1])[:K]
    return beams


def equals_uncached(model, b) -> bool: # prompt b of the batch
    found = beam_search(model, TEXT, MASK, num_beams=K, max_new_tokens=C, eos_token_id=None, pad_token_id=0)
    expected = uncached(model, TEXT[b][MASK[b].bool()].tolist())
    same = found.sequences[b].tolist() == [tokens for tokens, _ in expected]
    return same and max(abs(x - y) for x, (_, y) in zip(found.scores[b].tolist(), expected)) < 1e-3


def first_line(e): return f"{type(e).__name__}: {next(iter(str(e).strip().splitlines()), '')[:80]}"


def too_slow(*_): raise TimeoutError("takes too long")


def limit_work(seconds): # of this process, however busy the machine is; 0: no limit any more
    signal.setitimer(signal.ITIMER_PROF, seconds)


def examine(family) -> dict:
    "How a family is searched; whether each prompt's beams are those of a loop without a cache"
    signal.signal(signal.SIGPROF, too_slow)
    limit_work(SECONDS)
    try: model = build(family)
    except Exception as e: return dict(found="not built", reason=first_line(e))
    finally: limit_work(0)
    limit_work(SECONDS)
    try:
        reason = why_no_tree(model, 9)
        found = "tree" if reason is None else "rows" if why_no_cache(model, 9) is None else "whole texts"
        right = all(equals_uncached(model, b) for b in range(2))
        return dict(found=found, reason=reason or "", model=type(model).__name__, right=right)
    except TimeoutError as e: return dict(found="not built", reason=first_line(e))
    except Exception as e: return dict(found="refused" if isinstance(e, ValueError) else "fails", reason=first_line(e))
    finally: limit_work(0)


def families() -> list[str]:
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES} & {*CONFIG_MAPPING})


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    found = {}
    for family in sys.argv[1:] or families():
        with contextlib.redirect_stderr(io.StringIO()): found[family] = examine(family)
        print(family, found[family], flush=True)
    if not sys.argv[1:]: RECORD.write_text(json.dumps(dict(transformers=T.__version__, families=found), indent=1) + "\n")
