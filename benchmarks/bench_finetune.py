"""A whole QLoRA step (forward, backward, AdamW) on a Llama of random weights, beside its peers.

    ours          4-bit layers, LoRA and AdamW of this package
    bitsandbytes  its Linear4bit, PEFT's LoRA, torch's AdamW
    dense         bfloat16 layers, PEFT's LoRA, torch's AdamW

All seven linear layers of each block have adapters of rank 16; computation is in bfloat16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

import qlora_ref
from qlora_ref.benchmark.timing import medians

# (hidden size, size between, blocks, sequences, tokens of each)
MODELS = {
    "large, few tokens": (4096, 11008, 2, 1, 64),
    "small, many tokens": (1024, 2816, 8, 4, 256),
}
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA, LEARNING_RATE = 16, 32, 1e-4
VOCABULARY = 2048

# How far first losses may be from ours. bitsandbytes computes from the same codes, in bfloat16.
# Dense weights are not rounded to 4 bits: that moves the loss of a token by 0.5 (its standard
# deviation in the larger model), and the mean of 64 tokens by 0.06.
SAME_LOSS = {"bitsandbytes": 0.02, "dense": 0.25}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    for name, (hidden, between, blocks, sequences, length) in MODELS.items():
        torch.manual_seed(0)
        ids = torch.randint(0, VOCABULARY, (sequences, length))
        makers = {"ours": _ours, "bitsandbytes": _bitsandbytes, "dense": _dense}
        steps = {
            who: _step(*make(_llama(hidden, between, blocks)), ids) for who, make in makers.items()
        }
        losses = {who: step() for who, step in steps.items()}
        if any(abs(losses[who] - losses["ours"]) > apart for who, apart in SAME_LOSS.items()):
            raise RuntimeError(f"the first losses differ: {losses}")
        for threads in options.threads:
            torch.set_num_threads(threads)
            found = medians(steps, options.repeats, steady=False)  # long, and alike
            ours = found["ours"]
            ratios = ", ".join(f"{who} {found[who] / ours:.2f}" for who in SAME_LOSS)
            print(
                f"{name} ({blocks} x {hidden}/{between}, {sequences} x {length} tokens), "
                f"{threads} thread(s): {ids.numel() / ours:.0f} tokens/s; time / ours: {ratios}",
                flush=True,
            )


def _llama(hidden: int, between: int, blocks: int) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=between,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).train()


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _ours(model: nn.Module) -> tuple[nn.Module, Any]:
    qlora_ref.convert_model(model)
    qlora_ref.add_lora(model, r=RANK, alpha=ALPHA)
    return model, qlora_ref.AdamW(_trainable(model), lr=LEARNING_RATE)


def _dense(model: nn.Module) -> tuple[nn.Module, Any]:
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LAYERS)
    model = peft.get_peft_model(model, config)
    return model, torch.optim.AdamW(_trainable(model), lr=LEARNING_RATE, fused=True)


def _bitsandbytes(model: nn.Module) -> tuple[nn.Module, Any]:
    import bitsandbytes as bnb

    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and path.split(".")[-1] in LAYERS:
            new = bnb.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                device="meta",
            )
            new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            model.set_submodule(path, new.to("cpu"))
    return _dense(model)


def _step(model: nn.Module, optimizer: Any, ids: torch.Tensor) -> Callable[[], float]:
    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


if __name__ == "__main__":
    main()
