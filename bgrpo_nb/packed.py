"""Linear layers whose weights lie as the processor wants them, for as long as a search runs.

A search multiplies the same weights by few rows, again and again. On a CPU in float32 oneDNN does that in about half the time once large weights
are packed; packing costs about as much as two or three steps. PyTorch reaches it through operators that its own compiler uses and that may
change, so a small product is tried first: where it differs or fails, layers stay as they are. The weights themselves are not touched."""
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

FEWEST_WEIGHTS = 2**17 # a smaller matrix stays in the cache as it is
FEWEST_PRODUCTS = 8    # fewer do not pay for the packing


def _pack(weight: Tensor,  # (out, in) float32
          rows: int,       # that most products will have
          ) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)


_PACKED: dict[int, Tensor] = {}  # by the address of the weights
torch.library.define("bgrpo_nb::packed_linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor") # so that a compiled model can call it


@torch.library.impl("bgrpo_nb::packed_linear", "CPU")
def _packed_linear(x, weight, bias):  # (…, in), (out, in), (out,) -> (…, out)
    packed = _PACKED.get(weight.data_ptr())
    return F.linear(x, weight, bias) if packed is None else torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")


@torch.library.register_fake("bgrpo_nb::packed_linear")
def _shape(x, weight, bias): return x.new_empty(*x.shape[:-1], weight.shape[0])


def _product(x, weight, bias): return torch.ops.bgrpo_nb.packed_linear.default(x, weight, bias)


@lru_cache
def packs() -> bool:
    "Whether this PyTorch has the operators, and they multiply rightly"
    x, w, b = torch.randn(2, 3, 8), torch.randn(16, 8), torch.randn(16)
    try:
        _PACKED[w.data_ptr()] = _pack(w, 6)
        return torch.allclose(_product(x, w, b), F.linear(x, w, b), atol=1e-5)
    except (AttributeError, RuntimeError, TypeError): return False
    finally: _PACKED.pop(w.data_ptr(), None)


def _forward(layer, rows):
    weight, bias = layer.weight.T if isinstance(layer, Conv1D) else layer.weight, layer.bias
    _PACKED[weight.data_ptr()] = _pack(weight, rows)
    return lambda x: _product(x, weight, bias)

def _fits(layer) -> bool:
    "A plain linear layer of its class's own forward, large, in float32, on the CPU"
    return (type(layer) in (nn.Linear, Conv1D) and "forward" not in vars(layer) and layer.weight.is_cpu
            and layer.weight.dtype == torch.float32 and layer.weight.numel() >= FEWEST_WEIGHTS)


@contextmanager
def packed_linears(model, rows: int, # of a step, all prompts together
                   products: int):   # of each layer, at most
    "Pack a model's linear layers where that pays; as they were afterwards, whatever happens. Inside another such block nothing is packed again"
    changed = []
    try:
        if products >= FEWEST_PRODUCTS and packs() and not torch.is_autocast_enabled("cpu"):
            for layer in filter(_fits, model.modules()):
                layer.forward = _forward(layer, rows)
                changed.append((layer, layer.weight.data_ptr()))
        yield model
    finally:
        for layer, address in changed:
            del layer.forward
            _PACKED.pop(address, None)  # layers may share one weight
