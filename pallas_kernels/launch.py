"""Launching Triton kernels: Triton's front end translates them, and XLA compiles and launches the result like a kernel
of its own; or, with `TRITON_INTERPRET=1` in the environment before anything here is imported, Triton's interpreter runs
them on the host, for tests.

A custom call of jax-triton launches the same kernels. It costs the host some 10 us each time, as it looks its kernel up
by its whole text (docs/kernels.md), which is more than most of them take.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import jax
import numpy as np

TARGET = "__gpu$xla.gpu.triton"
"""XLA's name for a call of a kernel in Triton's intermediate language."""

TYPES = {
    "float32": "*fp32", "bfloat16": "*bf16", "int32": "*i32", "int8": "*i8", "uint8": "*u8", "bool": "*i1",
}  # fmt: skip


ONE_AT_A_TIME = threading.Lock()
"""XLA runs what does not depend on each other at once; Triton's interpreter changes the language for all threads."""


def launch(
    kernel: Any, *arrays: jax.Array, out: Any, grid: tuple[int, ...], warps: int = 4,
    in_place: dict[int, int] | None = None, **constants: Any,
):  # fmt: skip
    """Run `kernel(*arrays, *out, **constants)` on a grid. `out`: a `ShapeDtypeStruct`, or a sequence of them;
    `in_place`: which of the arrays are which of the outputs, in the same memory."""
    import triton

    if triton.knobs.runtime.interpret:
        run = functools.partial(_interpret, kernel, out=out, grid=grid, in_place=in_place or {}, constants=constants)
        return jax.pure_callback(run, out, *arrays)
    pointers = tuple(TYPES[str(x.dtype)] for x in (*arrays, *(out if isinstance(out, (list, tuple)) else [out])))
    x, y, z = (np.int32(n) for n in (*grid, 1, 1)[:3])
    return jax.ffi.ffi_call(TARGET, out, input_output_aliases=in_place)(
        *arrays, name=kernel.__name__, ir=_translated(kernel, pointers, tuple(constants.items()), warps), debug=False,
        num_stages=np.int32(3), num_warps=np.int32(warps), grid_x=x, grid_y=y, grid_z=z,
    )  # fmt: skip


def capability() -> int:
    """Of the GPU, 80 for Ampere; without one that of Hopper, for what is compiled ahead of time."""
    of_device = getattr(jax.devices()[0], "compute_capability", None)
    return 90 if of_device is None else int(of_device.replace(".", ""))


@functools.cache
def _translated(kernel, pointers: tuple[str, ...], constants: tuple[tuple[str, Any], ...], warps: int) -> str:
    """Triton's intermediate language for a kernel that takes these pointers, then constants."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.compiler import ASTSource

    names, n = kernel.arg_names, len(pointers)
    signature = dict(zip(names[:n], pointers, strict=True)) | {name: "constexpr" for name, _ in constants}
    values = {(names.index(name),): value for name, value in constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(n)}
    target = GPUTarget("cuda", capability(), 32)
    backend = CUDABackend(target)
    options = backend.parse_options({"num_warps": warps})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = ASTSource(kernel, signature, values, aligned).make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    return backend.make_ttir(module, {}, options, target.arch).str_nodebug()


def _interpret(kernel, *arrays, out, grid, in_place, constants):
    several = isinstance(out, (list, tuple))
    results = [_Tensor(_anything(x)) for x in (out if several else [out])]
    for i, o in in_place.items():
        results[o].array[...] = arrays[i]
    tensors = [_Tensor(np.array(x)) for x in arrays]
    _let_loops_have_loaded_bounds()
    with ONE_AT_A_TIME:
        kernel[grid](*tensors, *results, **constants)
    found = [x.array for x in results]
    return found if several else found[0]


@functools.cache
def _let_loops_have_loaded_bounds() -> None:
    """To Triton's interpreter every number is an array of one, of which newer versions of NumPy make no `int`."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _anything(x: jax.ShapeDtypeStruct) -> np.ndarray:
    """What may be there before a kernel has stored something."""
    return np.full(x.shape, np.nan if jax.dtypes.issubdtype(x.dtype, np.floating) else 77, x.dtype)


class _Tensor:
    """As much of a `torch.Tensor` as Triton's interpreter asks for."""

    def __init__(self, array: np.ndarray | None = None):
        self.array = array

    @property
    def dtype(self):
        return self.array.dtype

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> _Tensor:
        return self

    def cpu(self) -> _Tensor:
        return self

    def copy_(self, other: _Tensor) -> None:
        """The interpreter wrote to the array itself."""

    def new_empty(self, size, device) -> _Tensor:
        return _Tensor()

    def set_(self, storage: _Tensor, *of_a_view) -> None:
        self.array = storage.array

    def storage_offset(self) -> int:
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return None
