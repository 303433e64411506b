"""The same model in other coordinates: what it computes stays, every weight is another number.

RMSNorm divides by the length of its input, which no rotation changes. So with the norms' own
weights moved into the layers that read them, the residual stream x may be replaced by x Q: what
reads it becomes W Q, what writes to it Q^T W. (QuaRot, arXiv 2404.00456, section 4, rotates so.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def rotation(width: int, seed: int) -> Tensor:
    """A random rotation or reflection, float64 (width, width), uniform over all of them."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


@torch.no_grad()
def rotate_residual_stream(model: Any, seed: int) -> None:
    """Rotate the residual stream of a LLaMA by a random Q, in place.

    Raises ValueError for a model of another make: with other norms this would change it.
    """
    kind = type(model).__name__
    if kind != "LlamaForCausalLM" or model.config.tie_word_embeddings:
        raise ValueError(f"expected a LLaMA with an output layer of its own, got a {kind}")
    body = model.model
    turn = rotation(model.config.hidden_size, seed)
    body.embed_tokens.weight.copy_(body.embed_tokens.weight.double() @ turn)
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _read(layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj], turn)
        _read(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], turn)
        for writer in (attention.o_proj, mlp.down_proj):
            writer.weight.copy_(turn.T @ writer.weight.double())
    _read(body.norm, [model.lm_head], turn)


def _read(norm: Any, readers: list[nn.Linear], turn: Tensor) -> None:
    for reader in readers:
        reader.weight.copy_((reader.weight.double() * norm.weight.double()) @ turn)
    norm.weight.fill_(1)
