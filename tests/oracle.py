"""Float64 NumPy: exact attention over originals, and each term of the bound by its definition."""

from __future__ import annotations

import numpy as np


def f64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def softmax(s: np.ndarray) -> np.ndarray:
    w = np.exp(s - s.max(-1, keepdims=True))
    return w / w.sum(-1, keepdims=True)


def exact_attention(q, keys, values, lengths) -> np.ndarray:
    """`O*`. `q`: [b, Hq, d]; `keys`, `values`: [b, Hkv, N, d]; `lengths`: [b] -> [b, Hq, d]."""
    q, keys, values = f64(q), f64(keys), f64(values)
    b, h, n, d = keys.shape
    q = q.reshape(b, h, -1, d)
    out = np.empty_like(q)
    for row in range(b):
        m = int(lengths[row])
        s = q[row] @ keys[row, :, :m].transpose(0, 2, 1) / np.sqrt(d)
        out[row] = softmax(s) @ values[row, :, :m]
    return out.reshape(b, -1, d)


def exact_error(out, q, keys, values, lengths) -> np.ndarray:
    """`||out - O*||` of every head: [b, Hq]."""
    return np.linalg.norm(f64(out) - exact_attention(q, keys, values, lengths), axis=-1)


def centred_terms(q, k_hat, v_hat, delta, eta, nu, centre) -> dict[str, np.ndarray]:
    """The centred bound by its formulas, for one KV head with everything quantized; leaves are [G] or [G, d].

    `q`: [G, d]; `k_hat`, `v_hat`: [N, d]; `delta`: [G, N]; `eta`, `nu`: [N]; `centre`: [d].
    """
    q, k_hat, v_hat, delta, eta, nu, centre = map(f64, (q, k_hat, v_hat, delta, eta, nu, centre))
    p = softmax(q @ k_hat.T / np.sqrt(q.shape[-1]))
    out = p @ v_hat
    e_val = (p * eta).sum(-1)
    offset = np.linalg.norm(centre - out, axis=-1) + e_val
    l_minus = (p * np.exp(-delta)).sum(-1)
    e_key = (p * np.expm1(delta) * (nu + offset[:, None])).sum(-1) / l_minus
    return {"out": out, "e_val": e_val, "e_key": e_key, "l_minus": l_minus}
