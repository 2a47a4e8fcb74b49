"""A policy to go on from, made of a smaller one or of one with another vocabulary.

    python nbs/experiments/grow.py tiny runs/deeper --layers 10
    python nbs/experiments/grow.py tiny runs/several-variables --vocabulary compact_multi

More layers: each new one is a copy of the layer below it that writes nothing yet, so the grown policy computes exactly what the smaller one did.
Another vocabulary: words of both keep their vectors, words of several variables begin with those of `a`, and all others with small random ones."""
import argparse
import re

import torch
from transformers import AutoModelForCausalLM

from bgrpo_nb.policy.model import load_model, load_tokenizer, save_model

WRITERS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def resized(model, **fields):
    "The same architecture with random weights"
    torch.manual_seed(0)
    config = type(model.config)(**model.config.to_dict() | fields | {"dtype": "float32"})
    return AutoModelForCausalLM.from_config(config).float().eval()


def deeper(model, layers):
    old, weights = model.config.num_hidden_layers, {}
    if layers % old: raise SystemExit(f"{layers} layers are no multiple of {old}")
    for name, value in model.state_dict().items():
        if not (found := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)):
            weights[name] = value
            continue
        first, rest = int(found[1]) * (layers // old), found[2]
        for i in range(layers // old): weights[f"model.layers.{first + i}.{rest}"] = value if i == 0 else torch.zeros_like(value) if rest in WRITERS else value.clone()
    grown = resized(model, num_hidden_layers=layers)
    grown.load_state_dict(weights)
    ids = torch.arange(2 * 30).view(2, 30)
    with torch.no_grad(): assert torch.equal(grown(ids).logits, model(ids).logits)
    return grown


def reworded(model, tokenizer, vocabulary):
    old, new = tokenizer.get_vocab(), load_tokenizer(vocabulary)
    grown = resized(model, vocab_size=len(new))
    weights = model.state_dict() | {name: grown.state_dict()[name].clone() for name in ("model.embed_tokens.weight", "lm_head.weight")}
    for word, i in new.get_vocab().items():
        known = old.get(word, old.get(re.sub(r"\b[ab]\d+", "a", word)))
        if known is None: continue
        for name in ("model.embed_tokens.weight", "lm_head.weight"): weights[name][i] = model.state_dict()[name][known]
    grown.load_state_dict(weights)
    return grown, new


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("policy")
    parser.add_argument("out")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocabulary")
    a = parser.parse_args()
    model, tokenizer = load_model(a.policy, device="cpu").float(), load_tokenizer(a.policy)
    if a.layers: model = deeper(model, a.layers)
    if a.vocabulary: model, tokenizer = reworded(model, tokenizer, a.vocabulary)
    save_model(model, tokenizer, a.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} words: {a.out}")
