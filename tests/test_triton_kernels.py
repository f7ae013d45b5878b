"""The big steps' kernels in Triton: against their twins, and in a chain. Without a GPU they are interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax import Policy
from certjax.fused.chain import chained_attention
from pallas_kernels import dispatch
from tests.oracle import f64
from tests.test_chain import POLICIES, exact, problem
from tests.test_kernels import EVERY, KERNELS, B, H, check_against_twin, check_every_chunk, found_by

pytest.importorskip("triton", reason="Triton's interpreter, or Triton for the GPU, is not installed")
pytestmark = pytest.mark.usefixtures("quick_compilation")
PROCESSORS = 5
"""Few programs, so that each reads several tiles."""


@KERNELS
@EVERY
def test_kernel_equals_its_twin(d, name):
    check_against_twin(d, name, getattr(dispatch.triton_kernels(B * H, PROCESSORS), name))


@pytest.mark.parametrize("shared", [164, 100])
def test_scan_with_less_memory_equals_its_twin(shared):
    """On Ampere and Ada values are not fetched ahead."""
    kernels = dispatch.triton_kernels(B * H, PROCESSORS, shared)
    assert not kernels.scan.keywords["ahead"]
    check_against_twin(128, "scan", kernels.scan)


@pytest.mark.parametrize("n_tiles", [134, 270])
@pytest.mark.parametrize("splits, readers", [(1, 1), (12, 8)])
def test_fine_finds_its_tiles_in_every_chunk(n_tiles, splits, readers):
    kernel = dispatch.triton_kernels(1).fine.func
    check_every_chunk(n_tiles, functools.partial(kernel, splits=splits, readers=readers))


@pytest.mark.gpu
@pytest.mark.parametrize("processors", [PROCESSORS, 132])
@KERNELS
@EVERY
def test_compiled_kernel_does_the_same_every_time(d, name, processors):
    kernel = jax.jit(getattr(dispatch.triton_kernels(B * H, processors), name))
    first = check_against_twin(d, name, kernel)
    for _ in range(20):  # a race between warps need not show at once
        jax.tree.map(np.testing.assert_array_equal, found_by(d, name, kernel), first)


@pytest.mark.parametrize("d, name", [(64, "promoting"), (128, "dense")])
def test_chain_of_triton_alone(d, name):
    """By a plan that does not hold, so that there is a second pass."""
    cache, q = problem(d)
    cache = cache.replace(plan=0 * cache.plan)
    policy = Policy.budget(block_size=128, **POLICIES[name])

    @jax.jit
    def step(q, cache):
        kernels = dispatch.triton_kernels(B * H, PROCESSORS)
        return chained_attention(q, cache, jnp.int32(1), policy, kernels, jnp.ones(B, bool))[:2]

    out, certificate = jax.device_get(step(q, cache))
    error = np.linalg.norm(f64(out) - exact(q, cache), axis=-1)
    assert (error <= certificate.e_total).all() and certificate.canary_ok.all()
    assert set(certificate.rung.ravel()) == {3 if name == "dense" else 2}
    assert ((certificate.e_total <= certificate.tolerance) | (certificate.rung == 3)).all()
