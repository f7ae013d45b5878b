"""`LlamaConfig`: the shape of a LLaMA model, checked where it is built and static under jit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from certjax.errors import InvalidArgumentError

DTYPES = ("float32", "bfloat16", "float16")
ROPE_TYPES = ("llama3", "linear")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched beyond the context of pretraining.

    Attributes
    ----------
    rope_type
        "llama3": wavelengths longer than `original_max_position_embeddings / low_freq_factor` are stretched
        by `factor`, those shorter than `original_max_position_embeddings / high_freq_factor` are kept, those
        between are interpolated. "linear": all are stretched by `factor`.
    factor
        At least 1.
    low_freq_factor, high_freq_factor, original_max_position_embeddings
        "llama3" only.
    """

    rope_type: Literal["llama3", "linear"]
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self):
        if self.rope_type not in ROPE_TYPES:
            raise InvalidArgumentError(
                f"rope_type {self.rope_type!r} is not supported; certjax computes {', '.join(ROPE_TYPES)} and the "
                "unscaled default (rope_scaling=None)."
            )
        if not self.factor >= 1:
            raise InvalidArgumentError(f"rope scaling factor must be at least 1, got {self.factor!r}.")
        if self.rope_type != "llama3":
            return
        for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            value = getattr(self, name)
            if value is None or not value > 0:
                raise InvalidArgumentError(f"llama3 rope scaling needs a positive {name}, got {value!r}.")
        if not self.high_freq_factor > self.low_freq_factor:
            raise InvalidArgumentError(
                f"high_freq_factor={self.high_freq_factor} must exceed low_freq_factor={self.low_freq_factor}."
            )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape and dtypes of a LLaMA-family model. Hashable, so that it can be static under jit.

    Attributes
    ----------
    head_dim
        `d`; need not be `d_model / n_heads`.
    rope_scaling
        None for unscaled rotary embeddings.
    dtype
        Of parameters and compute: "float32", "bfloat16" or "float16". Norms, rotary embeddings, softmax and
        logits are float32 whatever it is.
    kv_dtype
        Of the cached keys and values. Default: "bfloat16" where `dtype` is, otherwise "float16".

    Raises
    ------
    InvalidArgumentError
        If a field is outside what the model computes; the message names it.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_eps: float = 1e-6
    tie_embeddings: bool = False
    context_length: int = 2048
    attention_bias: bool = False
    mlp_bias: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    dtype: str = "float32"
    kv_dtype: str | None = None

    def __post_init__(self):
        if self.kv_dtype is None:
            object.__setattr__(self, "kv_dtype", "bfloat16" if self.dtype == "bfloat16" else "float16")
        sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "context_length")
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidArgumentError(f"{name} must be a positive int, got {value!r}.")
        if self.n_heads % self.n_kv_heads:
            raise InvalidArgumentError(
                f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}: every KV head serves "
                "the same number of query heads."
            )
        if self.head_dim % 2:
            raise InvalidArgumentError(f"head_dim={self.head_dim} must be even: rotary embeddings turn pairs.")
        for name in ("rope_theta", "rms_eps"):
            if not getattr(self, name) > 0:
                raise InvalidArgumentError(f"{name} must be positive, got {getattr(self, name)!r}.")
        for name in ("dtype", "kv_dtype"):
            if getattr(self, name) not in DTYPES:
                raise InvalidArgumentError(f"{name} must be one of {', '.join(DTYPES)}, got {getattr(self, name)!r}.")
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            raise InvalidArgumentError(
                f"rope_scaling must be a RopeScaling or None, got {type(self.rope_scaling).__name__}; "
                "LlamaConfig.from_hf reads the dictionaries of Hugging Face."
            )
        if not isinstance(self.eos_token_ids, tuple) or not all(isinstance(t, int) for t in self.eos_token_ids):
            raise InvalidArgumentError(f"eos_token_ids must be a tuple of ints, got {self.eos_token_ids!r}.")

    @property
    def group_size(self) -> int:
        """G, query heads of one KV head."""
        return self.n_heads // self.n_kv_heads

    @classmethod
    def llama31_8b(cls) -> LlamaConfig:
        """meta-llama/Llama-3.1-8B-Instruct."""
        return cls(
            vocab_size=128256, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, d_ff=14336,
            rope_theta=500000.0, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192), rms_eps=1e-5,
            context_length=131072, eos_token_ids=(128001, 128008, 128009), bos_token_id=128000, dtype="bfloat16",
        )  # fmt: skip

    @classmethod
    def llama32_1b(cls) -> LlamaConfig:
        """meta-llama/Llama-3.2-1B-Instruct."""
        return cls(
            vocab_size=128256, d_model=2048, n_layers=16, n_heads=32, n_kv_heads=8, head_dim=64, d_ff=8192,
            rope_theta=500000.0, rope_scaling=RopeScaling("llama3", 32.0, 1.0, 4.0, 8192), rms_eps=1e-5,
            tie_embeddings=True, context_length=131072, eos_token_ids=(128001, 128008, 128009), bos_token_id=128000,
            dtype="bfloat16",
        )  # fmt: skip

    @classmethod
    def smollm2_135m(cls) -> LlamaConfig:
        """HuggingFaceTB/SmolLM2-135M-Instruct, in float32: the size that runs on a CPU."""
        return cls(
            vocab_size=49152, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, d_ff=1536,
            rope_theta=100000.0, rms_eps=1e-5, tie_embeddings=True, context_length=8192, eos_token_ids=(2,),
            bos_token_id=1, pad_token_id=2,
        )  # fmt: skip

    @classmethod
    def tinyllama_1b(cls) -> LlamaConfig:
        """TinyLlama/TinyLlama-1.1B-Chat-v1.0."""
        return cls(
            vocab_size=32000, d_model=2048, n_layers=22, n_heads=32, n_kv_heads=4, head_dim=64, d_ff=5632,
            rms_eps=1e-5, context_length=2048, eos_token_ids=(2,), bos_token_id=1, dtype="bfloat16",
        )  # fmt: skip

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> LlamaConfig:
        """Read the `config.json` of a `LlamaForCausalLM`, as written by any version of transformers.

        Keys that are absent take the defaults of transformers' own LlamaConfig.

        Raises
        ------
        InvalidArgumentError
            If a size is missing, or the model is of another architecture or uses a feature that this port does
            not compute (another activation, sliding windows, another kind of rotary embedding).
        """
        _refuse_unsupported(hf)
        try:
            d_model, n_heads = hf["hidden_size"], hf["num_attention_heads"]
            sizes = dict(
                vocab_size=hf["vocab_size"], d_model=d_model, n_layers=hf["num_hidden_layers"], n_heads=n_heads,
                d_ff=hf["intermediate_size"],
            )  # fmt: skip
        except KeyError as missing:
            raise InvalidArgumentError(f"the Hugging Face config has no {missing.args[0]!r}.") from None
        if not hf.get("head_dim") and d_model % n_heads:
            raise InvalidArgumentError(
                f"hidden_size={d_model} is not a multiple of num_attention_heads={n_heads} and head_dim is not given."
            )
        context_length = hf.get("max_position_embeddings", 2048)
        theta, scaling = _rope_of(hf, context_length)
        eos = hf.get("eos_token_id", 2)
        # Checkpoints written before transformers 5 say torch_dtype; none says nothing: float32.
        dtype = hf.get("dtype") or hf.get("torch_dtype") or "float32"
        return cls(
            **sizes,
            n_kv_heads=hf.get("num_key_value_heads") or n_heads,
            head_dim=hf.get("head_dim") or d_model // n_heads,
            rope_theta=theta,
            rope_scaling=scaling,
            rms_eps=hf.get("rms_norm_eps", 1e-6),
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
            context_length=context_length,
            attention_bias=bool(hf.get("attention_bias", False)),
            mlp_bias=bool(hf.get("mlp_bias", False)),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,),
            bos_token_id=hf.get("bos_token_id", 1),
            pad_token_id=hf.get("pad_token_id"),
            dtype=str(dtype).removeprefix("torch."),
        )


def _refuse_unsupported(hf: Mapping[str, Any]) -> None:
    architectures = hf.get("architectures") or ["LlamaForCausalLM"]
    model_type = hf.get("model_type", "llama")
    if model_type != "llama" or "LlamaForCausalLM" not in architectures:
        raise InvalidArgumentError(
            f"model_type {model_type!r} with architectures {architectures} is not a LLaMA language model; certjax "
            "runs LlamaForCausalLM only."
        )
    activation = hf.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise InvalidArgumentError(f"hidden_act {activation!r} is not supported; the port computes SwiGLU (silu).")
    if hf.get("sliding_window") and hf.get("use_sliding_window", True):
        raise InvalidArgumentError(
            f"sliding_window={hf['sliding_window']} is not supported; the port attends to the whole context."
        )


def _rope_of(hf: Mapping[str, Any], context_length: int) -> tuple[float, RopeScaling | None]:
    """`(theta, scaling)` from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    partial = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise InvalidArgumentError(f"partial_rotary_factor={partial} is not supported; whole heads are rotated.")
    theta = float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return theta, None
    if "factor" not in rope and rope_type in ROPE_TYPES:
        raise InvalidArgumentError(f"rope scaling of type {rope_type!r} gives no factor.")
    if rope_type != "llama3":
        return theta, RopeScaling(rope_type, float(rope.get("factor", 1.0)))
    return theta, RopeScaling(
        rope_type="llama3",
        factor=float(rope["factor"]),
        low_freq_factor=rope.get("low_freq_factor"),
        high_freq_factor=rope.get("high_freq_factor"),
        # What transformers falls back to.
        original_max_position_embeddings=rope.get("original_max_position_embeddings", context_length),
    )
