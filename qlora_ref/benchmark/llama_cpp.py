"""The 4-bit product of llama.cpp, through the library of whichever Python binding is installed.

The bindings do not offer single operations; their libraries do (ggml's C interface). A weight is
put where llama.cpp puts it when it loads a model: into the order that its CPU kernels like best,
where there is one for this processor.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Where each binding keeps the library, or the libraries that it is made of.
BINDINGS = {"llama_cpp": "lib/libggml*.so", "xllamacpp": "xllamacpp*.so"}

FLOAT32, Q4_0 = 0, 2  # of enum ggml_type
BLOCK_SIZE, BLOCK_BYTES = 32, 18  # of Q4_0: a float16 scale, then 16 bytes of two codes each
_ROOM = 1 << 20  # bytes for the descriptions of a few tensors and one graph


_Log = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_log_set": (None, (_Log, c_void_p)),
    "ggml_init": (c_void_p, (_InitParams,)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_new_graph": (c_void_p, (c_void_p,)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_get_data": (c_void_p, (c_void_p,)),
    "ggml_quantize_chunk": (
        c_size_t,
        (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, POINTER(c_float)),
    ),
    "ggml_backend_cpu_init": (c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
    "ggml_backend_free": (None, (c_void_p,)),
    "ggml_backend_cpu_buffer_type": (c_void_p, ()),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, (c_void_p, c_void_p)),
    "ggml_backend_buffer_free": (None, (c_void_p,)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_tensor_get": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
}
# The buffers of llama.cpp's own weight order; a C++ function, hence the name.
_REORDERED = "_Z35ggml_backend_cpu_repack_buffer_typev"


def is_installed() -> bool:
    """Whether a binding is there whose library has the functions that are needed."""
    return _library() is not None


class Product:
    """y = x W^T with W in Q4_0, in blocks of 32.

    x        float32 (M, K)   its values go into the product rounded to 8 bits
    weight   float32 (N, K)   the original; afterwards what the codes stand for
    threads  int
    """

    def __init__(self, x: Tensor, weight: Tensor, threads: int) -> None:
        library = _library()
        if library is None:
            raise ImportError("no binding of llama.cpp is installed: pip install xllamacpp")
        (rows, columns), tokens = weight.shape, len(x)
        if columns % BLOCK_SIZE:
            raise ValueError(f"Q4_0 has blocks of {BLOCK_SIZE} in a row, got {columns} columns")
        self._library = library
        blocks = quantize(library, weight)
        self.nbytes, self.weight = blocks.numel(), restore(blocks).view(rows, columns)
        self.y = torch.empty(tokens, rows)
        self._weights, self._rest = (_context(library) for _ in range(2))
        w = library.ggml_new_tensor_2d(self._weights, Q4_0, columns, rows)
        b = library.ggml_new_tensor_2d(self._rest, FLOAT32, columns, tokens)
        self._output = library.ggml_mul_mat(self._rest, w, b)
        kind = _buffer_type(library, rows)
        plain = library.ggml_backend_cpu_buffer_type()
        allocate = library.ggml_backend_alloc_ctx_tensors_from_buft
        self._buffers = [allocate(self._weights, kind), allocate(self._rest, plain)]
        x = x.contiguous()
        library.ggml_backend_tensor_set(w, blocks.data_ptr(), 0, blocks.nbytes)
        library.ggml_backend_tensor_set(b, x.data_ptr(), 0, x.nbytes)
        self._graph = library.ggml_new_graph(self._rest)
        library.ggml_build_forward_expand(self._graph, self._output)
        self._backend = library.ggml_backend_cpu_init()
        library.ggml_backend_cpu_set_n_threads(self._backend, threads)

    def run(self) -> Tensor:
        """Multiply; returns y float32 (M, N), the same tensor each time."""
        status = self._library.ggml_backend_graph_compute(self._backend, self._graph)
        if status != 0:
            raise RuntimeError(f"llama.cpp could not multiply: status {status}")
        output = (self._output, self.y.data_ptr(), 0, self.y.nbytes)
        self._library.ggml_backend_tensor_get(*output)  # a copy of y, nothing beside W
        return self.y

    def __del__(self) -> None:
        if not hasattr(self, "_backend"):
            return
        self._library.ggml_backend_free(self._backend)
        for buffer in self._buffers:
            self._library.ggml_backend_buffer_free(buffer)
        for context in (self._weights, self._rest):
            self._library.ggml_free(context)


def quantize(library: Any, weight: Tensor) -> Tensor:
    """W (N, K) in Q4_0, uint8 (blocks, 18)."""
    weight = weight.float().contiguous()
    rows, columns = weight.shape
    blocks = torch.empty(rows * columns // BLOCK_SIZE, BLOCK_BYTES, dtype=torch.uint8)
    pointers = (weight.data_ptr(), blocks.data_ptr())
    library.ggml_quantize_chunk(Q4_0, *pointers, 0, rows, columns, None)
    return blocks


def restore(blocks: Tensor) -> Tensor:
    """What Q4_0 blocks stand for, float32 (blocks, 32): (code - 8) * scale.

    The low nibbles are the first 16 values of a block, the high ones the other 16.
    """
    scales = blocks[:, :2].contiguous().view(torch.float16).float()
    codes = torch.cat([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], dim=1)
    return (codes.float() - 8) * scales


class _Libraries:
    """The functions of one or several shared libraries, declared."""

    def __init__(self, paths: list[Path]) -> None:
        libraries = [ctypes.CDLL(str(path)) for path in paths]
        for name, (result, arguments) in _SIGNATURES.items():
            holder = next(library for library in libraries if hasattr(library, name))
            function = getattr(holder, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.reordered = next(
            (getattr(lib, _REORDERED) for lib in libraries if hasattr(lib, _REORDERED)), None
        )
        if self.reordered is not None:
            self.reordered.restype, self.reordered.argtypes = c_void_p, ()
        self.silent = _Log(lambda level, text, data: None)  # kept: the library calls it
        self.ggml_log_set(self.silent, None)  # type: ignore[attr-defined]


@functools.cache
def _library() -> Any:
    for package, pattern in BINDINGS.items():
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            try:
                return _Libraries(sorted(Path(folder).glob(pattern)))
            except (OSError, StopIteration):  # does not load, or lacks a function
                continue
    return None


def _context(library: Any) -> int:
    return library.ggml_init(_InitParams(_ROOM, None, True))


def _buffer_type(library: Any, rows: int) -> int:
    # Its kernels take eight rows at a time and need AVX2; other weights stay as they are.
    capable = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    if library.reordered is not None and capable and rows % 8 == 0:
        return library.reordered()
    return library.ggml_backend_cpu_buffer_type()
