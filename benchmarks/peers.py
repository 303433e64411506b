"""Other implementations of y = x W^T with W in 4 bits, for bench_matmul_4bit.py to compare with.

Each is a `Product`: what to run, the weight that it multiplies by, and how far off it may be. The
NF4 ones hold the codes and scales that we do. The int4 ones know evenly spaced levels only, so that
they get a random weight of their own: their speed can be compared, their accuracy cannot.

A peer that is not installed is left out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qlora_ref import dispatch, quantize

BLOCK_SIZE = 64  # of every format here

# Relative errors of the whole result, against float64: x and W rounded to float32, to bfloat16
# (8 bits), and x rounded to 8 bits with a scale for each block.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.int8: 2e-2}


@dataclass(frozen=True)
class Product:
    """A candidate: `run` returns y, `weight` (N, K) is what it stands for."""

    run: Callable[[], Tensor]
    weight: Tensor
    tolerance: float


class Weights:
    """One random weight (N, K) in every format; each is made when it is first asked for."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.original = torch.randn(shape).to(dtype)
        self.quantized = quantize(self.original, block_size=BLOCK_SIZE)

    @cached_property
    def exact(self) -> Tensor:
        """What the codes and scales stand for, float32."""
        return self.quantized.dequantize(torch.float32)

    @cached_property
    def dense(self) -> Tensor:
        """The same, rounded once to the dtype of x."""
        return self.quantized.dequantize(self.dtype)

    @cached_property
    def bitsandbytes_training(self) -> nn.Module:
        return self._bitsandbytes().train()

    @cached_property
    def bitsandbytes_evaluation(self) -> nn.Module:
        # A layer of its own: the first forward in evaluation repacks the weight for good.
        return self._bitsandbytes().eval()

    def _bitsandbytes(self) -> nn.Module:
        import bitsandbytes as bnb

        rows, columns = self.shape
        layer = bnb.nn.Linear4bit(
            columns, rows, bias=False, compute_dtype=self.dtype, quant_type="nf4", device="meta"
        )
        layer.weight = bnb.nn.Params4bit(
            self.original.clone(),
            requires_grad=False,
            quant_type="nf4",
            blocksize=BLOCK_SIZE,
            compress_statistics=False,  # our scales are not quantised here either
        )
        if not may_use_bfloat16_instructions():
            layer.support_avx512bf16_for_cpu = False
        return layer.to("cpu")  # quantises

    @cached_property
    def int4_codes(self) -> Tensor:
        return torch.randint(0, 16, self.shape, dtype=torch.int32)

    @cached_property
    def int4_scales(self) -> Tensor:
        rows, columns = self.shape
        return (torch.rand(rows, columns // BLOCK_SIZE) + 0.1).to(self.dtype)

    @cached_property
    def int4(self) -> Tensor:
        """What the int4 codes and scales stand for, float32."""
        blocks = (self.int4_codes - 8).float().view(*self.int4_scales.shape, BLOCK_SIZE)
        return (blocks * self.int4_scales.float().unsqueeze(-1)).view(self.shape)

    @cached_property
    def int4_packed(self) -> Tensor:
        return torch._convert_weight_to_int4pack_for_cpu(self.int4_codes, 1)


def may_use_bfloat16_instructions() -> bool:
    """Not where ours are kept from it: the peers then have no more than we do."""
    return dispatch.forced_isa() not in ("baseline", "avx2", "avx512")


def is_installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in modules)


def products(x: Tensor, weights: Weights) -> Iterator[tuple[str, Product]]:
    """Every peer's x W^T by name, with as many threads as torch is set to."""
    close = CLOSE[x.dtype]
    dense, exact = weights.dense, weights.exact
    yield "torch dense", Product(lambda: nn.functional.linear(x, dense), exact, close)
    if is_installed("bitsandbytes"):
        yield "bnb training", Product(_bitsandbytes_training(x, weights), exact, close)
        # It computes in bfloat16 whatever the dtype.
        evaluation, loose = weights.bitsandbytes_evaluation, CLOSE[torch.bfloat16]
        yield "bnb evaluation", Product(lambda: evaluation(x), exact, loose)
    if is_installed("openvino"):
        yield "openvino nf4", Product(_openvino(x, weights), exact, close)
    if is_installed("onnxruntime", "onnx"):
        # Its CPU kernels have no bfloat16: x is float32 in any case.
        yield "onnx int4", Product(_onnxruntime(x, weights, 0), weights.int4, close)
        loose = CLOSE[torch.int8]
        yield "onnx int4, int8 x", Product(_onnxruntime(x, weights, 4), weights.int4, loose)
    if x.dtype == torch.bfloat16:  # in float32 its loop is a plain one, 100 times as slow
        yield "torch int4", Product(_torch_int4(x, weights), weights.int4, close)


def _bitsandbytes_training(x: Tensor, weights: Weights) -> Callable[[], Tensor]:
    layer, x = weights.bitsandbytes_training, x.clone().requires_grad_()

    def run() -> Tensor:
        with torch.enable_grad():
            return layer(x).detach()

    return run


def _torch_int4(x: Tensor, weights: Weights) -> Callable[[], Tensor]:
    scales = weights.int4_scales.t()
    scales_and_zeros = torch.stack([scales, torch.zeros_like(scales)], -1).contiguous()
    packed = weights.int4_packed
    return lambda: torch._weight_int4pack_mm_for_cpu(x, packed, BLOCK_SIZE, scales_and_zeros)


def _openvino(x: Tensor, weights: Weights) -> Callable[[], Tensor]:
    """The CPU plugin turns these operations into one product that decodes W as it goes."""
    import openvino as ov
    from openvino import opset13 as op

    tokens, (rows, columns) = len(x), weights.shape
    blocks = [rows, columns // BLOCK_SIZE, BLOCK_SIZE]
    packed = weights.quantized.packed
    low_first = ((packed >> 4) | (packed << 4)).numpy()  # ours has the even element high
    codes = ov.op.Constant(ov.Tensor(low_first, blocks, ov.Type.nf4), shared_memory=True)
    scales = op.constant(weights.quantized.scales.reshape(*blocks[:2], 1).numpy())
    restored = op.multiply(op.convert(codes, "f32"), scales)
    matrix = op.reshape(restored, op.constant([rows, columns]), False)
    parameter = op.parameter([tokens, columns], ov.Type.f32)
    model = ov.Model([op.matmul(parameter, matrix, False, True)], [parameter])
    is_narrow = x.dtype == torch.bfloat16 and may_use_bfloat16_instructions()
    options = {
        "INFERENCE_PRECISION_HINT": "bf16" if is_narrow else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
    }
    compiled = ov.Core().compile_model(model, "CPU", options)
    _require_fused(compiled)
    request = compiled.create_infer_request()
    x32 = x.float().numpy()
    request.set_input_tensor(ov.Tensor(x32, shared_memory=True))
    y = torch.from_numpy(request.get_output_tensor().data)

    def run() -> Tensor:
        request.infer()
        return y

    run.memory = (x32, low_first, compiled)  # type: ignore[attr-defined]  # shared, not owned
    return run


def _require_fused(compiled: Any) -> None:
    kinds = {
        str(node.rt_info["layerType"].value) for node in compiled.get_runtime_model().get_ops()
    }
    if not kinds <= {"Input", "Const", "Reorder", "FullyConnected", "Output"}:
        raise RuntimeError(f"openvino runs more than one product: {sorted(kinds)}")


def _onnxruntime(x: Tensor, weights: Weights, accuracy_level: int) -> Callable[[], Tensor]:
    """accuracy_level: 0 multiplies in float32, 4 rounds x to int8 first."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would go on spinning while others are timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model = _onnx_model(weights, accuracy_level)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    x = x.float()
    y = torch.empty(len(x), weights.shape[0])
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, np.float32, tuple(x.shape), x.data_ptr())
    binding.bind_output("y", "cpu", 0, np.float32, tuple(y.shape), y.data_ptr())

    def run() -> Tensor:
        session.run_with_iobinding(binding)
        return y

    run.input = x  # type: ignore[attr-defined]  # the binding knows its address only
    return run


def _onnx_model(weights: Weights, accuracy_level: int) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    rows, columns = weights.shape
    codes = weights.int4_codes.to(torch.uint8).view(rows, -1, BLOCK_SIZE)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "packed", "scales"],
        ["y"],
        domain="com.microsoft",
        N=rows,
        K=columns,
        bits=4,
        block_size=BLOCK_SIZE,
        accuracy_level=accuracy_level,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", rows])],
        [
            numpy_helper.from_array(packed.numpy(), "packed"),
            numpy_helper.from_array(weights.int4_scales.float().flatten().numpy(), "scales"),
        ],
    )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString()
