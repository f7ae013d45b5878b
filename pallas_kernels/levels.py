"""How much of a tile is read: one number a tile, which the plan writes and the kernels go by.

Its low byte is a level; above it is a bit for each piece of a promoted tile that is read from the host, while the rest
of the tile is read as at level FINEST.
"""

from __future__ import annotations

import jax.numpy as jnp

SKIP, COARSE, VALUES, FINEST, PROMOTED = range(5)
"""Values left to the centre; values at their coarsest, or at their finest, with the scan's weights; keys and values at
their finest; originals of some pieces, the rest at its finest."""

FINEST_BYTES, ORIGINAL_BYTES = 2.3, 4.0
"""Of a key's and a value's channel, with scales."""

FEES = 0.0, 0.64 / FINEST_BYTES, 0.89 / FINEST_BYTES, 1.0
"""Of a tile at each level but the last, in tiles read at their finest: what a second pass reads from the device, the
scan's weights included."""

TILE = 128

PARTS_OF_A_WINDOW = 4
"""Most parts that a program reads a tile of the windows in: each may raise the largest score it has seen."""

PIECE_BYTES = 4096
"""Of a piece's keys, and of its values, in bfloat16: what is read from the host at once."""

ACTIVE, N_COARSE, N_VALUES, N_FINEST, N_PROMOTED, GIVE_UP = range(6)
"""Columns of a head's `counts`: tiles read from tier 1; of them at each level but SKIP; whether the head goes dense at
once."""

COUNTS = 6

CHUNK = 128
"""Tiles whose sums the kernels hand each other."""

LOOK = 8
"""Tiles of which a head's `summary` has one number: how many pieces are read from the host, and, times TILES_READ, how
many tiles at their finest."""

TILES_READ = 2**16


def pieces_of_a_tile(d: int) -> int:
    """8 at a head dim of 128, 4 at 64."""
    return 2 * d * TILE // PIECE_BYTES


def tokens_of_a_piece(d: int) -> int:
    """16 or 32."""
    return TILE // pieces_of_a_tile(d)


def every_piece(d: int) -> int:
    """The bits of all of them."""
    return 2 ** pieces_of_a_tile(d) - 1


def word(level, pieces):
    """A tile's number."""
    return level | (pieces << 8)


def level_of(words):
    """The level."""
    return words & 255


def pieces_of(words):
    """A bit for each piece."""
    return words >> 8


def sane(words):
    """A plan's number, whatever is there: kernels and judge go by bits of pieces where some are promoted, and nowhere
    else."""
    level = jnp.minimum(level_of(words), PROMOTED)
    return jnp.where(level == PROMOTED, word(level, pieces_of(words)), level)


def by_scan(level):
    """Whether a tile's values are read with the scan's weights."""
    return (level == COARSE) | (level == VALUES)


def level_of_rest(words, d: int):
    """The level at which what is not promoted is read: PROMOTED where nothing is left."""
    rest = jnp.where(pieces_of(words) == every_piece(d), PROMOTED, FINEST)
    return jnp.where(level_of(words) == PROMOTED, rest, level_of(words))


def promoted_pieces(words, d: int):
    """`[..., NT]` -> bool `[..., NT, pieces_of_a_tile]`."""
    return (pieces_of(words)[..., None] >> jnp.arange(pieces_of_a_tile(d))) & 1 == 1


def initial_plan(shape: tuple[int, ...]):
    """Of tiles that no plan has been made for."""
    return jnp.full(shape, COARSE, jnp.uint16)


def at_work(tiles, programs: int):
    """Programs of a head that share so many tiles."""
    return jnp.minimum(tiles, programs)


def counts_of(words, active, give_up):
    """`[H, COUNTS]` int32 of words and active tiles `[H, NT]`, and of `give_up` `[H]`."""
    of_level = [(level_of(words) == i).sum(1) for i in (COARSE, VALUES, FINEST, PROMOTED)]
    return jnp.stack([active.sum(1), *of_level, give_up], 1).astype(jnp.int32)


def length_of_summary(n_tiles: int) -> int:
    """Numbers of a head, of whole chunks."""
    return -(-n_tiles // CHUNK) * (CHUNK // LOOK)


def n_pieces(summary):
    """Pieces of a head that are read from the host: [H, .] -> [H]."""
    return (summary % TILES_READ).sum(1)


def summary_of(words, d: int):
    """`[H, length_of_summary]` int32 of words `[H, NT]`."""
    heads, n_tiles = words.shape
    n = promoted_pieces(words, d).sum(2) + TILES_READ * (level_of_rest(words, d) == FINEST)
    n = jnp.pad(n, ((0, 0), (0, length_of_summary(n_tiles) * LOOK - n_tiles)))
    return n.reshape(heads, -1, LOOK).sum(2).astype(jnp.int32)
