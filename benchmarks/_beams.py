"Whether two searches found the same beams: asked before anything is timed."
import torch


def same_beams(sequences, scores, others, their_scores, atol=1e-3): # (B, K, C) and (B, K) nats, best first
    """Scores agree within atol; so do sequences whose scores are apart.

    Arithmetic in another order moves scores a little, so that close neighbours change places. Of the last beam nobody
    knows how close the next one is, which was not kept."""
    if not torch.allclose(scores, their_scores, atol=atol, rtol=0): return False
    gaps = scores[:, :-1] - scores[:, 1:]
    unknown = torch.zeros_like(scores[:, :1])
    above, below = torch.cat([unknown + torch.inf, gaps], 1), torch.cat([gaps, unknown], 1)
    apart = torch.minimum(above, below) > 2 * atol
    return torch.equal(sequences[apart], others[apart])
