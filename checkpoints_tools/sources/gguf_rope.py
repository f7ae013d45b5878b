"""Recover LLaMA 3's `rope_scaling` from the per-frequency divisors that GGUF stores instead of it."""

from typing import Any

import numpy as np

from checkpoints_tools.errors import ConfigError

# The only values published: LLaMA 3.1, 3.2 and 3.3 differ in `factor` alone.
_LOW, _HIGH, _ORIGINAL_CONTEXT = 1.0, 4.0, 8192


def llama3_factors(
    theta: float, head_dim: int, factor: float, low: float, high: float, original_context: int
) -> np.ndarray:
    """Return the divisor of each rotary frequency under HF's `llama3` rule.

    With wavelength `w = 2 pi theta^(2i/d)` and `t = original_context / w`: 1 where `t > high`, `factor` where `t <
    low`, between them `1 / ((1 - s) / factor + s)` with `s = (t - low) / (high - low)`.

    Returns
    -------
    array, [head_dim / 2], float64
    """
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = original_context / wavelength
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def llama3_scaling(
    stored: np.ndarray, theta: float, head_dim: int, original_context: int | None, file: str
) -> dict[str, Any] | None:
    """Return the HF `rope_scaling` whose factors are `stored`, or None where they are all 1.

    Parameters
    ----------
    stored : array, [head_dim / 2]
        `rope_freqs.weight`.
    original_context : int or None
        From the metadata, where it says; LLaMA 3's own value otherwise.

    Raises
    ------
    ConfigError
        No published setting reproduces `stored` (to 1 part in 10^4).
    """
    if np.all(stored == 1.0):
        return None
    factor = float(np.round(stored[-1], 3))
    context = original_context or _ORIGINAL_CONTEXT
    if stored.shape != (head_dim // 2,) or not np.allclose(
        stored, llama3_factors(theta, head_dim, factor, _LOW, _HIGH, context), rtol=1e-4
    ):
        raise ConfigError(
            f"{file}: rope_freqs.weight matches no LLaMA 3 rope scaling (low_freq_factor {_LOW}, high_freq_factor "
            f"{_HIGH}, "
            f"original context {context}, any factor), so rope_scaling cannot be derived. Convert the HF directory "
            f"instead."
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": context,
    }
