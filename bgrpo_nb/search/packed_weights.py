"""Linear layers whose weights lie as the processor wants them, for as long as a search runs.

A search multiplies the same weights by few rows, again and again. On a CPU in float32 oneDNN does that in about half the time once large weights
are packed; packing costs about as much as two or three steps. PyTorch reaches it through operators that its own compiler uses and that may
change, so a small product is tried first: where it differs or fails, layers stay as they are. The weights themselves are not touched."""
from contextlib import contextmanager
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

FEWEST_WEIGHTS = 2**17 # a smaller matrix stays in the cache as it is
FEWEST_PRODUCTS = 8    # fewer do not pay for the packing
FED_ALIKE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")) # Transformers' names of neighbours that multiply the same rows: one product for all

_PACKED: dict[tuple, tuple[Tensor, Tensor | None]] = {}  # weights and bias, by where those of the layers lie
_USED = WeakKeyDictionary() # model: the copies of its last search; never read again, but new memory costs as much as packing, and the next take theirs
torch.library.define("bgrpo_nb::packed_linear", "(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor") # so that a compiled model can call it


def _key(weights, biases): return tuple(x.data_ptr() for x in (*weights, *biases) if x is not None)

@torch.library.impl("bgrpo_nb::packed_linear", "CPU")
def _packed_linear(x, weights, biases):  # (…, in), n x (out, in), n x (out,) -> (…, all outs)
    found = _PACKED.get(_key(weights, biases))
    if found is None: return torch.cat([F.linear(x, w, b) for w, b in zip(weights, biases)], -1)
    return torch.ops.mkldnn._linear_pointwise.default(x, *found, "none", [], "")

@torch.library.register_fake("bgrpo_nb::packed_linear")
def _shape(x, weights, biases): return x.new_empty(*x.shape[:-1], sum(w.shape[0] for w in weights))


def _pack(weights, biases, rows: int): # that most products will have; the key
    whole = weights[0].detach().contiguous() if len(weights) == 1 else torch.cat([w.detach() for w in weights])
    bias = biases[0] if len(biases) == 1 or biases[0] is None else torch.cat([b.detach() for b in biases])
    key = _key(weights, biases)
    _PACKED[key] = torch.ops.mkldnn._reorder_linear_weight(whole, rows), bias
    return key

def _product(x, weights, biases): return torch.ops.bgrpo_nb.packed_linear.default(x, weights, biases)


@lru_cache
def packs() -> bool:
    "Whether this PyTorch has the operators, and they multiply rightly"
    x, w, b = torch.randn(2, 3, 8), torch.randn(16, 8), torch.randn(16)
    try:
        _pack([w], [b], 6)
        return torch.allclose(_product(x, [w], [b]), F.linear(x, w, b), atol=1e-5)
    except (AttributeError, RuntimeError, TypeError): return False
    finally: _PACKED.pop(_key([w], [b]), None)


def _out_by_in(layer): return layer.weight.T if isinstance(layer, Conv1D) else layer.weight

def _forwards(layers, weights, biases):
    "A forward for each of the layers that are fed alike: the first multiplies for all, the others are handed their part"
    if len(layers) == 1: return [lambda x: _product(x, weights, biases)]
    waiting = []
    def first(x):
        part, *rest = _product(x, weights, biases).split([w.shape[0] for w in weights], -1)
        waiting[:] = [x, *rest]
        return part
    def later(k, plain):
        def forward(x):
            if not waiting or waiting[0] is not x: return plain(x)
            part = waiting[k]
            if k + 1 == len(waiting): waiting.clear()
            return part
        return forward
    return [first, *(later(k, l.forward) for k, l in enumerate(layers[1:], 1))]

def _fits(layers) -> bool:
    "Plain linear layers of their class's own forward, large together, in float32, on the CPU, with biases or without"
    return (all(type(l) in (nn.Linear, Conv1D) and "forward" not in vars(l) and l.weight.is_cpu and l.weight.dtype == torch.float32 for l in layers)
            and sum(l.weight.numel() for l in layers) >= FEWEST_WEIGHTS and len({l.bias is None for l in layers}) == 1
            and len({_out_by_in(l).shape[1] for l in layers}) == 1)

def _groups(model): # lists of layers
    alike = [[getattr(m, n) for n in names] for m in model.modules() for names in FED_ALIKE if all(isinstance(getattr(m, n, None), nn.Module) for n in names)]
    alike = [g for g in alike if _fits(g)]
    seen = {l for g in alike for l in g}
    return alike + [[l] for l in model.modules() if l not in seen and _fits([l])]


@contextmanager
def packed_linears(model, rows: int, # of a step, all prompts together
                   products: int):   # of each layer, at most
    """Pack a model's linear layers where that pays; as they were afterwards, whatever happens. Inside another such block nothing is packed again.
    The memory of the copies stays with the model for its next search, until `forget_packed`"""
    changed, keys, used = [], [], _USED.pop(model, [])
    try:
        if products >= FEWEST_PRODUCTS and packs() and not torch.is_autocast_enabled("cpu"):
            for layers in _groups(model):
                weights, biases = [_out_by_in(l) for l in layers], [l.bias for l in layers]
                if used: del used[0]             # the new copy takes its place
                keys.append(_pack(weights, biases, rows))
                for layer, forward in zip(layers, _forwards(layers, weights, biases)):
                    layer.forward = forward
                    changed.append(layer)
        yield model
    finally:
        for layer in changed: del layer.forward
        copies = [_PACKED.pop(key)[0] for key in keys if key in _PACKED] # layers may share weights, also with those of a block within
        if copies: _USED[model] = copies

def forget_packed(model):
    "Give the memory of a model's packed copies back"
    _USED.pop(model, None)
