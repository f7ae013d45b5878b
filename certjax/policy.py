"""`Policy`: everything a user decides about certified attention, static under jit."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from certjax import arguments
from certjax.codecs import Codec, make_codec
from certjax.errors import InvalidArgumentError
from pallas_kernels import numerics as num

FORM = (
    "codec", "block_size", "group_size", "key_metadata", "key_planes", "value_planes", "refine", "rotate", "fp8_scale",
    "annotations", "spectral", "centre", "sink_tokens", "recent_tokens", "tier2",
)  # fmt: skip
"""Fields that say how tokens are stored; the others say how they are attended to."""


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise InvalidArgumentError(message)


def _widths(name: str, x: Any) -> tuple[int, ...]:
    if not isinstance(x, (tuple, list)):
        raise InvalidArgumentError(f"{name} must be a tuple of widths in bits such as (8, 4), got {x!r}.")
    return tuple(arguments.integer(name, width) for width in x)


TYPED = {
    "int": arguments.integer, "float": arguments.number, "bool": arguments.flag, "tuple[int, ...]": _widths,
}  # fmt: skip
"""Annotation of a field -> what makes a value of it, or refuses it."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """How tier 1 is stored, what is promoted, and when a head falls back to dense attention.

    Use the presets `Policy.paper()`, `Policy.budget(...)` and `Policy.observe()`, each taking any field as an override.

    Attributes
    ----------
    kind
        Selection policy: "paper" (promote by mass), "budget" (read what a tolerance asks for) or "observe" (tier 1 as
        it is, certified, whatever the bound).
    codec, block_size
        Tier-1 format (a name of `certjax.codecs.REGISTRY`), and `B`.
    group_size, key_metadata
        `int8_int4` and its relatives: `g` (None: the format's own), and the dtype of key scales and offsets.
    key_planes, value_planes, refine, rotate
        `planes`: widths in bits of the planes that hold a code; whether they can be read one by one; whether vectors
        are turned before they are quantized.
    fp8_scale
        `fp8_e4m3`: one scale a "tensor" or a "head".
    annotations
        "bfloat16" or "byte" a token and annotation.
    spectral
        Keep spectral norms of the blocks' residuals, and take the tighter bound that they allow.
    centre
        Per KV head, what `planes` subtracts from keys and values, and `c` in `nu_t = ||v_t - c||`: "zero", the prompt's
        "mean", or "auto": its mean for keys, and for the values of those heads that it shortens.
    sink_tokens, recent_tokens
        Windows kept on the device in original precision, multiples of `block_size`.
    tier2
        Where the originals are kept: in "host" memory, or in that of the "device". There they save no memory and cost
        nothing to read, and all sequences, heads and blocks are handled at once: for evaluating on a GPU what
        compression does to answers, and for machines without pinned memory. Outputs and certificates are those of
        "host" up to rounding; `host_price` and the bytes paged in count as if the originals were there.
    tolerance, relative_to
        Budget policy: largest certified error of what is returned and not dense, as a fraction of the norm of the
        layer's concatenated head outputs over sqrt(Hq) ("layer"), of the head's own output ("head"), or as it is
        ("absolute"). Of "layer" `allotment` says whether it holds for every head, or for their root mean square.
    skip_values
        Budget policy: blocks may do without their values, their centre standing for them, where the bound allows.
    host_price
        What a byte from the host costs in selection, in bytes of device memory.
    allotment
        How a tolerance relative to the layer is shared out: "pooled" (heads differ; the root mean square of their
        bounds, hence the error of the layer's concatenated output, is within the tolerance) or "equal" (every head is).
    margin
        The plan aims at `margin * tolerance`, because masses move when original keys replace codes.
    max_promoted
        A head whose plan needs more than this fraction of its originals goes dense at once.
    tau_cov, k_min, k_max, v_tol, rung1_threshold, rung1_multiplier
        Paper policy (arXiv:2605.20868): coverage, clamp of K, value threshold, rung 1.
    ranking_depth
        `r` of the ranking and boundary checks; 0 turns both off.
    eps_guard
        Slack of the boundary check, in log-mass.
    canary, exploration, seed
        Score-consistency check on every block paged in, plus a random fraction of the others per step.
    scrub
        Every block's fingerprint (P1) is verified once in `scrub` steps; 1 is every step, 0 is never. (In a decode loop
        on fused kernels: of one layer a step, each layer in turn.)
    backend
        "auto" (see `certjax.pick_backend`), or "xla", "mosaic_gpu", "triton", "reference" (the kernels' `jnp` twins).
    """

    kind: Literal["paper", "budget", "observe"]
    codec: str = "int8_int4"
    block_size: int = 16
    group_size: int | None = None
    key_metadata: Literal["float32", "float16"] = "float32"
    key_planes: tuple[int, ...] = (8, 4)
    value_planes: tuple[int, ...] = (4, 2)
    refine: bool = True
    rotate: bool = True
    fp8_scale: Literal["tensor", "head"] = "tensor"
    annotations: Literal["bfloat16", "byte"] = "bfloat16"
    spectral: bool = False
    centre: Literal["zero", "mean", "auto"] = "zero"
    sink_tokens: int = 0
    recent_tokens: int = 0
    tier2: Literal["host", "device"] = "host"
    tolerance: float | None = None
    relative_to: Literal["layer", "head", "absolute"] = "layer"
    skip_values: bool = False
    host_price: float = 8.0
    allotment: Literal["pooled", "equal"] = "pooled"
    margin: float = 0.96
    max_promoted: float = 0.5
    tau_cov: float = 0.995
    k_min: int = 2
    k_max: int = 128
    v_tol: float = 0.05
    rung1_threshold: float = 0.02
    rung1_multiplier: float = 2.0
    ranking_depth: int = 1
    eps_guard: float = 1e-6
    canary: bool = True
    exploration: float = 0.0
    seed: int = 0
    scrub: int = 16
    backend: Literal["auto", "xla", "mosaic_gpu", "triton", "reference"] = "auto"

    @classmethod
    def paper(cls, **overrides) -> Policy:
        """The paper's policy with its defaults: no windows, coverage 0.995, `K` in [2, 128]."""
        return cls(**{"kind": "paper", **overrides})

    @classmethod
    def budget(
        cls, tolerance: float = 0.05, relative_to: Literal["layer", "head", "absolute"] = "layer", **overrides
    ) -> Policy:
        """Certified error within `tolerance`, or heads go dense: of a layer's output by default, as the root mean
        square over its heads (`allotment="equal"`, or another `relative_to`: of every head)."""
        preset = {"kind": "budget", "tolerance": tolerance, "relative_to": relative_to, "skip_values": True}
        return cls(**{**cls._best_format(overrides), **preset, **overrides})

    @classmethod
    def observe(cls, **overrides) -> Policy:
        """Tier 1 and the windows, nothing promoted, no tolerance: naive attention with a certificate."""
        return cls(**{**cls._best_format(overrides), "kind": "observe", **overrides})

    @classmethod
    def _best_format(cls, overrides: dict) -> dict:
        """The format and windows of the presets that are our own (docs/formats.md says why)."""
        block = arguments.integer("block_size", overrides.get("block_size", cls.block_size))
        block = max(block, 1)  # what is below 1 is refused with its own message
        sink, recent = (-(-n // block) * block for n in (16, 128))
        return {
            "codec": "planes", "annotations": "byte", "spectral": True, "centre": "auto", "sink_tokens": sink,
            "recent_tokens": recent, "ranking_depth": 0, "scrub": 128,
        }  # fmt: skip

    def _typed(self) -> None:
        """Fields as Python's own numbers and tuples: a policy is static under jit, and compared by value."""
        for field in dataclasses.fields(self):
            kind, _, optional = field.type.partition(" | ")
            x = getattr(self, field.name)
            if kind in TYPED and not (optional and x is None):
                object.__setattr__(self, field.name, TYPED[kind](field.name, x))

    def __post_init__(self):
        self._typed()
        _require(
            self.kind in ("paper", "budget", "observe"),
            f"kind must be 'paper', 'budget' or 'observe', got {self.kind!r}.",
        )
        self.make_codec()
        _require(
            1 <= self.block_size <= num.MAX_HEAD_DIM,  # norms are taken over a block's tokens too
            f"block_size must be at least 1 and at most {num.MAX_HEAD_DIM}, got {self.block_size}.",
        )
        _require(
            self.centre in ("zero", "mean", "auto"), f"centre must be 'zero', 'mean' or 'auto', got {self.centre!r}."
        )
        for name in ("sink_tokens", "recent_tokens"):
            n = getattr(self, name)
            _require(
                n >= 0 and n % self.block_size == 0,
                f"{name} must be a non-negative multiple of block_size={self.block_size}, got {n}.",
            )
        _require(self.tier2 in ("host", "device"), f"tier2 must be 'host' or 'device', got {self.tier2!r}.")
        if self.kind == "budget":
            _require(
                self.tolerance is not None and self.tolerance > 0,
                f"tolerance must be positive, got {self.tolerance}; for exact attention use mode='dense'.",
            )
            _require(self.tolerance < float("inf"), "tolerance must be finite; to enforce none use Policy.observe().")
        else:
            _require(
                self.tolerance is None,
                f"the {self.kind} policy enforces no tolerance; drop `tolerance` or use Policy.budget(...).",
            )
        _require(
            self.annotations in ("bfloat16", "byte"),
            f"annotations must be 'bfloat16' or 'byte', got {self.annotations!r}.",
        )
        _require(
            self.relative_to in ("layer", "head", "absolute"),
            f"relative_to must be 'layer', 'head' or 'absolute', got {self.relative_to!r}.",
        )
        _require(
            self.allotment in ("pooled", "equal"), f"allotment must be 'pooled' or 'equal', got {self.allotment!r}."
        )
        for name in ("margin", "max_promoted", "tau_cov"):
            x = getattr(self, name)
            _require(0 < x <= 1, f"{name} must be in (0, 1], got {x}.")
        _require(
            1 <= self.k_min <= self.k_max,
            f"k_min and k_max must satisfy 1 <= k_min <= k_max, got {self.k_min} and {self.k_max}.",
        )
        for name in ("v_tol", "rung1_threshold", "eps_guard", "seed"):
            x = getattr(self, name)
            _require(x >= 0, f"{name} must be non-negative, got {x}.")
        _require(self.host_price > 0, f"host_price must be positive, got {self.host_price}.")
        _require(self.rung1_multiplier >= 1, f"rung1_multiplier must be at least 1, got {self.rung1_multiplier}.")
        _require(self.ranking_depth >= 0, f"ranking_depth must be non-negative, got {self.ranking_depth}.")
        _require(0 <= self.exploration <= 1, f"exploration must be in [0, 1], got {self.exploration}.")
        _require(
            self.exploration == 0 or self.canary, "exploration feeds the canary; set canary=True to use it."
        )
        _require(
            self.backend in ("auto", "xla", "mosaic_gpu", "triton", "reference"),
            f"backend must be 'auto', 'xla', 'mosaic_gpu', 'triton' or 'reference', got {self.backend!r}.",
        )
        _require(self.scrub >= 0, f"scrub must be non-negative, got {self.scrub}.")

    @property
    def pooled(self) -> bool:
        """Whether the heads of a layer share one budget."""
        return self.relative_to == "layer" and self.allotment == "pooled"

    @property
    def form(self) -> Policy:
        """What a cache depends on that is made by this policy: equal for all that store it alike."""
        return Policy("observe", **{name: getattr(self, name) for name in FORM})

    def make_codec(self) -> Codec:
        """The tier-1 codec this policy asks for."""
        return make_codec(
            self.codec,
            group_size=self.group_size,
            key_metadata=self.key_metadata,
            key_planes=self.key_planes,
            value_planes=self.value_planes,
            refine=self.refine,
            rotate=self.rotate,
            fp8_scale=self.fp8_scale,
        )

    @property
    def ring_blocks(self) -> int:
        """Blocks of the recent window's ring: the window and the block being filled."""
        return self.recent_tokens // self.block_size + 1


def require_policy(policy: Policy) -> None:
    """Refuse what is no `Policy`, such as its name or a preset that was not called."""
    arguments.instance("policy", policy, Policy, "make one by Policy.budget(...), .paper() or .observe()")
