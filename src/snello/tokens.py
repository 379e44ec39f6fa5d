"""Pure functions on token sequences: which tokens to keep, and keeping them. No model, no state.

B: samples, N: tokens including prefix tokens, D: embed dim, P: prefix tokens, k: kept patch tokens.
"""

import torch
from torch import Tensor


def keep_top(scores: Tensor, num_keep: int, num_prefix_tokens: int) -> Tensor:
    """Indices of the prefix tokens and of the patch tokens with the highest scores, in their original order.

    Args:
        scores: (B, N), any real values; those of the prefix tokens are not looked at.
        num_keep: patch tokens to keep, k in 1..N - P.
        num_prefix_tokens: P, the leading tokens that always stay.

    Returns:
        (B, P + k) int64, ascending in each row.

    Raises:
        ValueError: where `num_keep` is not in 1..N - P.
    """
    num_patches = scores.shape[1] - num_prefix_tokens
    if not 1 <= num_keep <= num_patches:
        raise ValueError(f"num_keep must be in 1..{num_patches}, got {num_keep}")
    best = scores[:, num_prefix_tokens:].topk(num_keep, dim=1, sorted=False).indices.sort(dim=1).values
    prefix = torch.arange(num_prefix_tokens, device=scores.device).expand(len(scores), -1)
    return torch.cat((prefix, best + num_prefix_tokens), dim=1)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of x (B, N, D) at index (B, K), as (B, K, D); the gradient of the others is zero."""
    B, N, D = x.shape
    rows = index + torch.arange(B, device=x.device).unsqueeze(1) * N
    # One index_select over B * N rows: measured on CPU 4 to 20 times faster, both ways, than torch.gather.
    return x.reshape(B * N, D).index_select(0, rows.view(-1)).view(B, -1, D)
