"""DAPO's soft punishment of overlong responses.

Source: Yu et al. 2025, DAPO (arXiv 2503.14476), section 3.4, equation 13, where `max_length` is L_max and `buffer` is
L_cache. OpenRLHF 0.11 multiplies it by a factor.
"""

from __future__ import annotations

from torch import Tensor


def overlong_penalty(lengths: Tensor, *, max_length: int, buffer: int, factor: float = 1.0) -> Tensor:
    """What to add to rewards, fp32 [samples]: 0 up to max_length - buffer tokens, -factor from max_length on, linear
    between them.

    lengths: int64 [samples], of responses, in tokens, as are max_length and buffer.

    Raises: ValueError for a buffer that is empty or longer than responses may be, and for a negative factor.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"the buffer is {buffer} tokens: it must hold at least 1, at most max_length, {max_length}")
    if not factor >= 0:
        raise ValueError(f"the factor is {factor}: a penalty is not negative")
    excess = lengths - (max_length - buffer)
    return -factor * excess.clamp(0, buffer).float() / buffer
