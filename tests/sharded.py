"A model sharded over two CPU processes searches for groups and computes a gradient as a whole one does. Run by test_trainer.py under torchrun."
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bgrpo_nb.policy.model import load_model
from bgrpo_nb.learn.trie import trie_logps
from bgrpo_nb.learn.trl_batching import roll_out, share_groups

torch.set_num_threads(1)
dist.init_process_group("gloo")
index, G = dist.get_rank(), 4
prompts = [p for p in ([5, 3, 8, 9], [7, 7, 9], [6, 4, 4, 2, 9]) for _ in range(G)][index * 6:index * 6 + 6]     # the second group lies on both


def gather(items): # accelerate's gather_object, without an Accelerator
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, list(items))
    return sum(parts, [])


def run(model, everywhere):
    generator = torch.Generator().manual_seed(0)
    searched = []

    def search(groups):
        searched.extend(groups)
        return roll_out(model, groups, G, 8, 9, 0, "mixed", generator=generator)
    with torch.no_grad(): members = share_groups(prompts, G, search, index, everywhere, gather)
    P, C = max(map(len, prompts)), 8
    ids = torch.tensor([[0] * (P - len(p)) + p + m.ids + [0] * (C - len(m.ids)) for p, m in zip(prompts, members)])
    mask = torch.tensor([[0] * (P - len(p)) + [1] * (len(p) + len(m.ids)) + [0] * (C - len(m.ids)) for p, m in zip(prompts, members)])
    logps, _ = trie_logps(model, ids, mask, C)
    with torch.no_grad(): # a sharded head is not run in pieces, however few elements are asked for
        torch.testing.assert_close(trie_logps(model, ids, mask, C, max_elements=1)[0], logps, atol=1e-4, rtol=0)
    (logps.sum() / 12).backward()
    return members, logps.detach(), searched


whole = load_model(sys.argv[1], device="cpu")
sharded = load_model(sys.argv[1], device="cpu")
mesh = init_device_mesh("cpu", (2,))
for layer in sharded.model.layers: fully_shard(layer, mesh=mesh)
fully_shard(sharded, mesh=mesh)
a, b = run(whole, True), run(sharded, True)
assert len(b[2]) == 3, "every process runs every search"
assert [(m.ids, m.beam_rank) for m in a[0]] == [(m.ids, m.beam_rank) for m in b[0]]
torch.testing.assert_close(a[1], b[1], atol=1e-4, rtol=0)
for p, q in zip(whole.parameters(), sharded.parameters()):
    dist.all_reduce(p.grad)
    torch.testing.assert_close(q.grad.full_tensor(), p.grad / 2, atol=1e-5, rtol=1e-3)
weight = sharded.model.layers[0].self_attn.q_proj.weight
assert weight.to_local().shape[0] * 2 == weight.shape[0], "half of it lies here"
print("equal")
dist.destroy_process_group() # without it the threads of gloo may abort the process at its end
