"""Counter-based random numbers: the number for a token depends only on what it is for, not on what was drawn before.

So a rollout is the same whatever the batch size, the micro batch, the number of processes or a restart.
"""

from __future__ import annotations

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(counter: np.ndarray, key: tuple[int, int], rounds: int = 10) -> np.ndarray:
    """The Philox 4x32 block function. Source: Salmon, Moraes, Dror, Shaw 2011, section 4.3.

    Args:
        counter: ``[N, 4]`` integers below 2^32.
        key: two integers below 2^32.
        rounds: 10, as in the paper's recommended strength.

    Returns:
        ``[N, 4]`` uint32.
    """
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(rounds):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def token_uniforms(
    seed: int, prompt_index: np.ndarray, sample_index: np.ndarray, position: np.ndarray | int
) -> np.ndarray:
    """One uniform number in ``[0, 1)`` for each (seed, prompt, sample, position), 53 bits each.

    Args:
        seed: of the run, below 2^64.
        prompt_index: ``[N]``, the prompt's number in the run's stream, below 2^64.
        sample_index: ``[N]``, below 2^32.
        position: ``[N]`` or one number: which token of the response, below 2^32.

    Returns:
        ``[N]`` float64.
    """
    prompts = np.asarray(prompt_index, dtype=np.uint64)
    counter = np.stack(
        [
            prompts & _LOW,
            prompts >> _SHIFT,
            np.asarray(sample_index, dtype=np.uint64),
            np.broadcast_to(np.asarray(position, dtype=np.uint64), prompts.shape),
        ],
        axis=1,
    )
    bits = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)).astype(np.uint64)
    return ((bits[:, 0] >> np.uint64(5)) * 67108864.0 + (bits[:, 1] >> np.uint64(6))) / 9007199254740992.0
