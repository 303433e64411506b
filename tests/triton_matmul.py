"""The product of two matrices in Triton, compiled for a GPU that need not be there.

Printed as PTX: Triton's compiler writes the asynchronous copies, the loads of matrices and the
tensor-core products, so that running it checks the interpreter by code that is not ours.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BLOCK = 32


@triton.jit
def multiply(a_ptr, b_ptr, y_ptr, inputs, BLOCK: tl.constexpr):
    """y (BLOCK, BLOCK) = a (BLOCK, inputs) b (inputs, BLOCK), in float16 with float32 sums."""
    rows = tl.arange(0, BLOCK)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in range(0, inputs, BLOCK):
        a = tl.load(a_ptr + rows * inputs + first + columns)
        b = tl.load(b_ptr + (first + rows) * BLOCK + columns)
        total = tl.dot(a, b, total)
    tl.store(y_ptr + rows * BLOCK + columns, total)


def compile_multiply() -> str:
    """The PTX for sm_80, with the loads pipelined."""
    types = {"a_ptr": "*fp16", "b_ptr": "*fp16", "y_ptr": "*fp32", "inputs": "i32"}
    signature = {name: types.get(name, "constexpr") for name in multiply.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    source = ASTSource(multiply, signature=signature, constexprs={"BLOCK": BLOCK}, attrs=aligned)
    options = {"num_warps": 4, "num_stages": 3}
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
    return str(compiled.asm["ptx"])


if __name__ == "__main__":
    print(compile_multiply())
