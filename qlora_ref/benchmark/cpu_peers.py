"""Products with 4-bit weights of libraries that work on the CPU alone.

One that is not installed is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_ref.benchmark import llama_cpp
from qlora_ref.benchmark.candidates import is_installed
from qlora_ref.benchmark.weights import (
    BLOCK_SIZE,
    CLOSE,
    Product,
    Weights,
    may_use_bfloat16_instructions,
)


def cpu_products(x: Tensor, weights: Weights) -> dict[str, Callable[[], Product]]:
    """Every such peer's x W^T by name, to be made when its turn comes."""
    found: dict[str, Callable[[], Product]] = {}
    if is_installed("openvino"):
        found["openvino nf4"] = lambda: _openvino(x, weights)
    if is_installed("onnxruntime", "onnx"):
        # Its CPU kernels have no bfloat16: x is float32 in any case.
        found["onnx int4"] = lambda: _onnxruntime(x, weights, 0)
        found["onnx int4, int8 x"] = lambda: _onnxruntime(x, weights, 4)
    if x.dtype == torch.bfloat16:  # in float32 its loop is a plain one, 100 times as slow
        found["torch int4"] = lambda: _torch_int4(x, weights)
    if llama_cpp.is_installed():
        found["llama.cpp q4_0"] = lambda: _llama_cpp(x, weights)
    return found


def _torch_int4(x: Tensor, weights: Weights) -> Product:
    scales = weights.int4_scales.t()
    scales_and_zeros = torch.stack([scales, torch.zeros_like(scales)], -1).contiguous()
    packed = weights.int4_packed
    return Product(
        lambda: torch._weight_int4pack_mm_for_cpu(x, packed, BLOCK_SIZE, scales_and_zeros),
        weights.int4,
        CLOSE[x.dtype],
        packed.nbytes + scales_and_zeros.nbytes,
    )


def _openvino(x: Tensor, weights: Weights) -> Product:
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
    return Product(run, weights.exact, CLOSE[x.dtype], weights.quantized.nbytes)


def _require_fused(compiled: Any) -> None:
    kinds = {
        str(node.rt_info["layerType"].value) for node in compiled.get_runtime_model().get_ops()
    }
    if not kinds <= {"Input", "Const", "Reorder", "FullyConnected", "Output"}:
        raise RuntimeError(f"openvino runs more than one product: {sorted(kinds)}")


def _onnxruntime(x: Tensor, weights: Weights, accuracy_level: int) -> Product:
    """accuracy_level: 0 multiplies in float32, 4 rounds x to int8 first."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would go on spinning while others are timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model = _onnx_model(weights, accuracy_level)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    tolerance = CLOSE[torch.int8 if accuracy_level else x.dtype]
    x = x.float()
    y = torch.empty(len(x), weights.shape[0])
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, np.float32, tuple(x.shape), x.data_ptr())
    binding.bind_output("y", "cpu", 0, np.float32, tuple(y.shape), y.data_ptr())

    def run() -> Tensor:
        session.run_with_iobinding(binding)
        return y

    run.input = x  # type: ignore[attr-defined]  # the binding knows its address only
    nbytes = weights.int4_codes.numel() // 2 + 4 * weights.int4_scales.numel()
    return Product(run, weights.int4, tolerance, nbytes)


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


def _llama_cpp(x: Tensor, weights: Weights) -> Product:
    """Blocks of 32 int4 codes with a float16 scale; x is rounded to 8 bits with its own scales."""
    product = llama_cpp.Product(x.float(), weights.original.float(), torch.get_num_threads())
    return Product(product.run, product.weight, CLOSE[torch.int8], product.nbytes)
