"CUDA graphs acted out on a CPU: a step is recorded operation by operation, and replayed on the same memory."
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("_local_scalar_dense", "aten::item", "nonzero", "masked_select", "unique", "aten::equal")


def tensors(tree): return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Capture(TorchDispatchMode):
    """A CUDA graph simulated on the CPU. Recording runs the operations, then restores all memory that existed before.
    A replay runs them again on the same tensors and Python numbers, and writes the results into the same memory"""
    def __init__(self):
        super().__init__()
        self.tape, self.before = [], {}
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = any(w in func.name() for w in WAITS)
        from_list = func.name() == "aten::lift_fresh" and args[0].ndim
        if from_list or waits: raise RuntimeError(f"{func.name()} cannot be captured")
        inputs = tensors((args, kwargs))
        for x in inputs:
            storage = x.untyped_storage()
            if storage.data_ptr() not in self.before: self.before[storage.data_ptr()] = storage, storage.clone()
        out = func(*args, **(kwargs or {}))
        of_inputs, results = {x.untyped_storage().data_ptr() for x in inputs}, tensors(out)
        own = [x.untyped_storage().data_ptr() not in of_inputs for x in results] # not a view of an input
        self.tape.append((func, args, kwargs or {}, results, own))
        return out
    def __exit__(self, *error):
        super().__exit__(*error)
        made = {x.untyped_storage().data_ptr() for *_, results, own in self.tape for x, o in zip(results, own) if o}
        for where, (storage, content) in self.before.items():
            if where not in made: storage.copy_(content)
    def replay(self):
        for func, args, kwargs, results, own in self.tape:
            again = tensors(func(*args, **kwargs))
            for x, y, o in zip(results, again, own):
                if o: x.copy_(y)


class Stage:
    "What was recorded and how often it was replayed"
    def __init__(self): self.tapes, self.replays = [], 0
    def record(self, advance, device):
        capture = Capture()
        with capture: advance()
        self.tapes.append(capture)
        def replay():
            self.replays += 1
            capture.replay()
        return replay


@pytest.fixture
def stage(monkeypatch):
    "Searches believe that they are on a device; nothing that was recorded is left before and afterwards"
    from bgrpo_nb.search import captured, generation
    acted, choose = Stage(), captured.choose_form
    monkeypatch.setattr(captured, "_record", acted.record)
    monkeypatch.setattr(generation, "choose_form", lambda asked, device, *more: choose(asked, "cuda", *more))
    captured.release_graphs()
    captured._FOUND.clear()
    generation._WARNED.clear()
    yield acted
    captured.release_graphs()
    captured._FOUND.clear()
