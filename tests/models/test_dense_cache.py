"""`DenseKVCache`: where tokens land, and that nothing is copied to put them there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax.dense_cache import DenseKVCache
from certjax.errors import InvalidArgumentError

L, B, H, N, D = 3, 2, 2, 16, 4


def empty():
    return DenseKVCache.zeros(L, B, H, N, D, "float16")


def draw(t, seed=0):
    return jax.random.normal(jax.random.key(seed), (2, B, t, H, D))


def test_ragged_write_puts_each_row_at_its_own_column_of_one_layer():
    k, v = draw(1)
    cache = empty().write(k, v, jnp.int32(1), jnp.array([3, 9]))
    for stack, x in ((cache.keys, k), (cache.values, v)):
        expected = np.zeros((L, B, H, N, D), np.float16)
        for row, column in enumerate((3, 9)):
            expected[1, row, :, column] = np.asarray(x[row, 0]).astype(np.float16)
        np.testing.assert_array_equal(stack, expected)


def test_chunk_write_puts_all_rows_at_one_column():
    k, v = draw(5)
    cache = empty().write(k, v, 2, 4)
    np.testing.assert_array_equal(cache.keys[2, :, :, 4:9], k.swapaxes(1, 2).astype(jnp.float16))
    np.testing.assert_array_equal(cache.values[2, :, :, 4:9], v.swapaxes(1, 2).astype(jnp.float16))
    assert not cache.keys[:2].any() and not cache.keys[2, :, :, :4].any() and not cache.keys[2, :, :, 9:].any()


def test_write_does_not_count_and_advance_does():
    cache = empty().write(*draw(1), 0, jnp.zeros(B, jnp.int32))
    assert cache.length.tolist() == [0, 0]
    assert cache.advance(1).advance(jnp.array([0, 2])).length.tolist() == [1, 3]


def test_nbytes_counts_keys_and_values():
    assert empty().nbytes() == 2 * L * B * H * N * D * 2


@pytest.mark.parametrize("start", [0, (0, 0)])
def test_write_is_in_place_when_donated(start):
    big = DenseKVCache.zeros(4, B, H, 1024, D, "float32")
    k, v = draw(1)
    write = jax.jit(lambda c, k, v: c.write(k, v, 1, jnp.array(start, jnp.int32)), donate_argnums=0)
    memory = write.lower(big, k, v).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= big.nbytes()
    assert memory.temp_size_in_bytes < big.nbytes() / 8


def test_write_refuses_shapes_that_do_not_fit():
    k, v = draw(1)
    with pytest.raises(InvalidArgumentError, match="do not fit a cache"):
        empty().write(k.swapaxes(1, 2), v.swapaxes(1, 2), 0, 0)
    with pytest.raises(InvalidArgumentError, match="do not fit a cache"):
        empty().write(*draw(N + 1), 0, 0)
    with pytest.raises(InvalidArgumentError, match="one start for all"):
        empty().write(*draw(2), 0, jnp.array([0, 1]))
