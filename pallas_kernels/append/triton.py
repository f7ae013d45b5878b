"""A step's keys and values into the windows, in place. Twin: `TieredKVCache.write`, ten kernels when XLA makes them."""

from __future__ import annotations

import dataclasses

import jax
import triton
import triton.language as tl

from pallas_kernels.launch import launch


@triton.jit
def append_token(
    k, v, length, layer, ring_keys, ring_values, sink_keys, sink_values,  # inputs
    ring_keys_out, ring_values_out, sink_keys_out, sink_values_out,  # outputs, in the same memory
    H: tl.constexpr, HEADS: tl.constexpr, RING: tl.constexpr, SINK: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    h, at = tl.program_id(0).to(tl.int64), tl.load(layer).to(tl.int64)  # windows may have more than 2^31 elements
    position = tl.load(length + h // HEADS) - 1
    row, channel = tl.arange(0, SIZE)[:, None], tl.arange(0, D)[None]
    token_k, token_v = tl.load(k + h * D + channel), tl.load(v + h * D + channel)
    offset, slot = position % SIZE, position // SIZE % (RING // SIZE) * SIZE
    # Opening a block clears what the ring held there, so that the array depends on the tokens only.
    fresh, there = row == offset, ((at * H + h) * RING + slot + row) * D + channel
    stored = fresh | (row >= tl.where(offset == 0, 0, SIZE))
    stored &= channel < tl.where(position < CAPACITY, D, 0)
    tl.store(ring_keys_out + there, tl.where(fresh, token_k, 0.0).to(k.dtype.element_ty), mask=stored)
    tl.store(ring_values_out + there, tl.where(fresh, token_v, 0.0).to(k.dtype.element_ty), mask=stored)
    there = ((at * H + h) * SINK + position) * D + channel
    stored = channel < tl.where(position < SINK, D, 0)
    tl.store(sink_keys_out + there, token_k, mask=stored)
    tl.store(sink_values_out + there, token_v, mask=stored)


@dataclasses.dataclass(frozen=True)
class Append:
    """A token of each sequence, and where it goes."""

    k: jax.Array  # [b, Hkv, d] in the windows' dtype
    v: jax.Array
    length: jax.Array  # [b] int32, with this token
    windows: tuple[jax.Array, ...]  # ring keys, ring values, sink keys, sink values: [L, b, Hkv, n, d]
    size: int  # of a block
    capacity: int

    @property
    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """Of the windows."""
        return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in self.windows]

    @property
    def constants(self) -> dict[str, int]:
        """Of `append_token`, but for H and D."""
        heads, ring = self.windows[0].shape[2:4]
        sink = self.windows[2].shape[3]
        return dict(HEADS=heads, RING=ring, SINK=sink, SIZE=self.size, CAPACITY=self.capacity)


def append_to_windows(token: Append, layer: jax.Array) -> list[jax.Array]:
    """The windows with the token at position `length - 1` in them. `layer`: [1] int32."""
    batch, heads, d = token.k.shape
    return launch(
        append_token, token.k, token.v, token.length, layer, *token.windows, out=token.shapes, grid=(batch * heads,),
        in_place={4: 0, 5: 1, 6: 2, 7: 3}, H=batch * heads, D=d, **token.constants,
    )  # fmt: skip
