"""The parameters tree: which leaves a configuration implies, and how a path is written.

Axis letters: V vocabulary, D hidden, L layers, Hq/Hkv query/KV heads, d head, F MLP.
"""

from collections.abc import Mapping
from typing import Any

Shape = tuple[int, ...]


def expected_leaves(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return `{path: shape}` of every leaf of a LLaMA decoder; layers are stacked on a leading axis L.

    Parameters
    ----------
    config : mapping
        A normalised configuration (:func:`checkpoints_tools.config.normalise_config`).

    Returns
    -------
    dict of str to tuple of int
        Paths join the keys with `/`. Kernels are `[in, out]`: `y = x @ kernel + bias`.
    """
    V, D, L = config["vocab_size"], config["hidden_size"], config["num_hidden_layers"]
    F, d = config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    attention = {"q_proj": (D, q), "k_proj": (D, kv), "v_proj": (D, kv), "o_proj": (q, D)}
    mlp = {"gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D)}

    leaves: dict[str, Shape] = {"embed/embedding": (V, D)}
    leaves |= {f"layers/{norm}/scale": (L, D) for norm in ("attn_norm", "mlp_norm")}
    for block, linears, bias in (("attn", attention, "attention_bias"), ("mlp", mlp, "mlp_bias")):
        for name, (n_in, n_out) in linears.items():
            leaves[f"layers/{block}/{name}/kernel"] = (L, n_in, n_out)
            if config[bias]:
                leaves[f"layers/{block}/{name}/bias"] = (L, n_out)
    leaves["final_norm/scale"] = (D,)
    if not config["tie_word_embeddings"]:
        leaves["lm_head/kernel"] = (D, V)
    return leaves


def is_stacked(path: str) -> bool:
    """Whether the leaf at `path` has the leading layers axis."""
    return path.startswith("layers/")


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested dict whose leaves are `flat`'s values; the inverse of :func:`flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{path: leaf}` of a nested dict; only dicts are descended into."""
    flat: dict[str, Any] = {}
    for key, node in tree.items():
        if isinstance(node, Mapping):
            flat |= flatten(node, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = node
    return flat
