"""Well-known kernels in Triton: what its compiler makes of them checks the simulated GPU.

The layouts of tensor-core operands, the loads of matrices, asynchronous copies and exchanges within
a warp are Triton's here, not ours.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add(x_ptr, y_ptr, sum_ptr, n, BLOCK: tl.constexpr):
    """sum = x + y."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sum_ptr + i, tl.load(x_ptr + i, i < n) + tl.load(y_ptr + i, i < n), i < n)


@triton.jit
def softmax(x_ptr, y_ptr, columns, BLOCK: tl.constexpr):
    """y = exp(x) over the sum of exp(x), in each row."""
    i = tl.program_id(0) * columns + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < columns
    x = tl.load(x_ptr + i, inside, other=float("-inf")).to(tl.float32)
    weights = tl.exp(x - tl.max(x))
    tl.store(y_ptr + i, weights / tl.sum(weights), inside)


@triton.jit
def layer_norm(x_ptr, weight_ptr, bias_ptr, y_ptr, columns, eps, BLOCK: tl.constexpr):
    """y = (x - mean) / sqrt(variance + eps) * weight + bias, in each row."""
    column = tl.arange(0, BLOCK)
    inside = column < columns
    row = tl.program_id(0) * columns
    x = tl.load(x_ptr + row + column, inside, other=0.0).to(tl.float32)
    mean = tl.sum(x) / columns
    centred = tl.where(inside, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred) / columns + eps)
    weight, bias = tl.load(weight_ptr + column, inside), tl.load(bias_ptr + column, inside)
    tl.store(y_ptr + row + column, centred * scale * weight + bias, inside)


@triton.jit
def cumulate(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """y = the sums of x up to each value."""
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.cumsum(tl.load(x_ptr + i), 0))


@triton.jit
def multiply(a_ptr, b_ptr, y_ptr, M, N, K, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr):
    """y (M, N) = a (M, K) b, where b is (K, N), or (N, K) and transposed."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in range(0, K, BLOCK):
        across = first + tl.arange(0, BLOCK)[None, :]
        down = first + tl.arange(0, BLOCK)[:, None]
        a = tl.load(a_ptr + row * K + across, (row < M) & (across < K), other=0.0)
        at = b_ptr + (column * K + down if TRANSPOSED else down * N + column)
        b = tl.load(at, (column < N) & (down < K), other=0.0)
        total = tl.dot(a, b, total)
    tl.store(y_ptr + row * N + column, total, (row < M) & (column < N))


@triton.jit
def attend(q_ptr, k_ptr, v_ptr, y_ptr, tokens, scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """y = softmax(q k^T scale) v, over the tokens up to each one, by one sum that is rescaled."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    width = tl.arange(0, WIDTH)
    own = token[:, None] * WIDTH + width[None, :]
    q = tl.load(q_ptr + own, token[:, None] < tokens, other=0.0)
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    sum_of_weights = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK, WIDTH), tl.float32)
    for first in range(0, (tl.program_id(0) + 1) * BLOCK, BLOCK):
        other = first + tl.arange(0, BLOCK)
        at = other[:, None] * WIDTH + width[None, :]
        k = tl.load(k_ptr + at, other[:, None] < tokens, other=0.0)
        v = tl.load(v_ptr + at, other[:, None] < tokens, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        scores = tl.where(other[None, :] <= token[:, None], scores, float("-inf"))
        new_most = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp(scores - new_most[:, None])
        shrink = tl.exp(most - new_most)
        sum_of_weights = sum_of_weights * shrink + tl.sum(weights, 1)
        total = tl.dot(weights.to(v.dtype), v, total * shrink[:, None])
        most = new_most
    tl.store(y_ptr + own, total / sum_of_weights[:, None], token[:, None] < tokens)
