"""Name tables: which tensor of a checkpoint becomes which leaf, and what is done to it on the way.

A table is read top to bottom; the first pattern that matches the whole name wins. `{layer}` of the pattern is the
layer.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Transform:
    """How a stored tensor becomes (one layer of) a leaf.

    Attributes
    ----------
    apply : callable
        `(tensor, config) -> array`, a view where it can be.
    transposes : bool
        Whether the stored tensor has its axes the other way round than the leaf.
    """

    apply: Callable[[np.ndarray, Config], np.ndarray]
    transposes: bool = False

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that a tensor must be stored with to become a leaf of `shape`."""
        return shape[::-1] if self.transposes else shape


@dataclass(frozen=True)
class Rule:
    """A pattern over tensor names, and either the leaf's path and transform or the reason to ignore the tensor."""

    pattern: re.Pattern[str]
    path: str | None = None
    transform: Transform | None = None
    ignored_because: str | None = None


def unpermute(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Undo the row order in which GGUF's `llama` architecture stores query and key projections.

    HF rotates the two halves of a head (row i with row i + d/2); GGUF's llama rotates neighbours (row 2i with 2i + 1),
    so its writer interleaves the halves of each head: row `2i + j` of a stored head is row `j * d/2 + i` of the HF
    head.

    Parameters
    ----------
    tensor : array, [heads * d, ...]
        A kernel as stored, rows first, or a bias.
    heads : int
        Query heads for `attn_q`, KV heads for `attn_k`.

    Returns
    -------
    array, [heads * d, ...]
        In HF order.
    """
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


KEEP = Transform(lambda tensor, config: tensor)
TRANSPOSE = Transform(lambda tensor, config: tensor.T, transposes=True)
UNPERMUTE_Q = Transform(lambda tensor, config: unpermute(tensor, config["num_attention_heads"]))
UNPERMUTE_K = Transform(lambda tensor, config: unpermute(tensor, config["num_key_value_heads"]))
UNPERMUTE_Q_TRANSPOSE = Transform(lambda tensor, config: UNPERMUTE_Q.apply(tensor, config).T, transposes=True)
UNPERMUTE_K_TRANSPOSE = Transform(lambda tensor, config: UNPERMUTE_K.apply(tensor, config).T, transposes=True)


def _take(pattern: str, path: str, transform: Transform) -> Rule:
    return Rule(re.compile(pattern.replace("{layer}", r"(?P<layer>\d+)")), path, transform)


def _ignore(pattern: str, because: str) -> Rule:
    return Rule(re.compile(pattern), ignored_because=because)


def _linear(stem: str, path: str, kernel: Transform = TRANSPOSE, bias: Transform = KEEP) -> list[Rule]:
    return [_take(rf"{stem}\.weight", f"{path}/kernel", kernel), _take(rf"{stem}\.bias", f"{path}/bias", bias)]


_HF_LAYER = r"model\.layers\.{layer}"
HF_RULES: tuple[Rule, ...] = (
    _take(r"model\.embed_tokens\.weight", "embed/embedding", KEEP),
    _take(rf"{_HF_LAYER}\.input_layernorm\.weight", "layers/attn_norm/scale", KEEP),
    _take(rf"{_HF_LAYER}\.post_attention_layernorm\.weight", "layers/mlp_norm/scale", KEEP),
    *(r for n in "qkvo" for r in _linear(rf"{_HF_LAYER}\.self_attn\.{n}_proj", f"layers/attn/{n}_proj")),
    *(r for n in ("gate", "up", "down") for r in _linear(rf"{_HF_LAYER}\.mlp\.{n}_proj", f"layers/mlp/{n}_proj")),
    _take(r"model\.norm\.weight", "final_norm/scale", KEEP),
    _take(r"lm_head\.weight", "lm_head/kernel", TRANSPOSE),
    _ignore(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", "recomputed from rope_theta and rope_scaling"),
)

_GGUF_LAYER = r"blk\.{layer}"
GGUF_RULES: tuple[Rule, ...] = (
    _take(r"token_embd\.weight", "embed/embedding", KEEP),
    _take(rf"{_GGUF_LAYER}\.attn_norm\.weight", "layers/attn_norm/scale", KEEP),
    _take(rf"{_GGUF_LAYER}\.ffn_norm\.weight", "layers/mlp_norm/scale", KEEP),
    *_linear(rf"{_GGUF_LAYER}\.attn_q", "layers/attn/q_proj", UNPERMUTE_Q_TRANSPOSE, UNPERMUTE_Q),
    *_linear(rf"{_GGUF_LAYER}\.attn_k", "layers/attn/k_proj", UNPERMUTE_K_TRANSPOSE, UNPERMUTE_K),
    *_linear(rf"{_GGUF_LAYER}\.attn_v", "layers/attn/v_proj"),
    *_linear(rf"{_GGUF_LAYER}\.attn_output", "layers/attn/o_proj"),
    *(r for n in ("gate", "up", "down") for r in _linear(rf"{_GGUF_LAYER}\.ffn_{n}", f"layers/mlp/{n}_proj")),
    _take(r"output_norm\.weight", "final_norm/scale", KEEP),
    _take(r"output\.weight", "lm_head/kernel", TRANSPOSE),
    _ignore(r"rope_freqs\.weight", "carried by the configuration as rope_scaling"),
    _ignore(r"blk\.\d+\.attn_rot_embd\.weight", "recomputed from rope_theta and rope_scaling"),
)
