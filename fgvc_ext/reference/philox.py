"""Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) on int64 tensors.

The same bits as ``csrc/common/philox.h``. A 32-bit word is kept in the low half of a non-negative int64.
"""

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random words for every counter. All tensors int64 in [0, 2**32), of shapes that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap; their 64 bits are still those of the unsigned product.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32 & WORD) ^ c1 ^ k0,
            product1 & WORD,
            (product0 >> 32 & WORD) ^ c3 ^ k1,
            product0 & WORD,
        )
        k0, k1 = k0 + _KEY_STEPS[0] & WORD, k1 + _KEY_STEPS[1] & WORD
    return c0, c1, c2, c3


def draws(seed: Tensor, samples: int, channels: int, count: int, operator: int) -> Tensor:
    """Words number 0 … count−1 of every (sample, channel): int64 [samples, channels, count].

    ``seed`` is int64 [], which numbers the samples, or [samples], which keys each sample on its own (sample counter 0).
    Draw d is word d % 4 of the counter (d // 4, channel, sample, operator).
    """
    device = seed.device
    calls = torch.arange((count + 3) // 4, device=device)
    channel = torch.arange(channels, device=device)[:, None]
    numbered = torch.arange(samples, device=device) if seed.dim() == 0 else torch.zeros_like(seed)
    key = seed.expand(samples)[:, None, None]
    operator_word = torch.full((), operator, dtype=torch.int64, device=device)
    counter = torch.broadcast_tensors(calls, channel, numbered[:, None, None], operator_word)
    words = philox(counter, (key & WORD, key >> 32 & WORD))
    return torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(-2)[..., :count]
