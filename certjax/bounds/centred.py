"""The centred bound: `||O^ - O*|| <= E_key + E_val`, tight because residuals act around the output.

Derivation: docs/bounds.md, section 4. All arrays are `[b, Hkv, G]`.
"""

from __future__ import annotations

import jax

from pallas_kernels.attend.reference import Sums


def e_val(sums: Sums) -> jax.Array:
    """`E_val = sum_t p'_t eta_t`."""
    return sums.e_val


def e_key(sums: Sums, offset: jax.Array) -> jax.Array:
    """`E_key = (1/L-) sum_t p'_t (e^Delta_t - 1)(nu_t + h)` with `h = ||c - O^|| + E_val` given as `offset`."""
    return (sums.grown_nu + sums.grown * offset) / sums.l_minus
