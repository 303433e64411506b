"""What is said of bits and bytes, worked out from the shapes of LLaMA models."""

from __future__ import annotations

from qlora_ref.study.llama import (
    ADAM_BYTES,
    LLAMA_2_70B,
    LLAMA_7B,
    LLAMA_65B,
    LLAMAS,
    NF4_BITS,
    NF4_DOUBLE_BITS,
)
from qlora_ref.study.report import Claim, Table

PAPER_65B = 65e9  # parameters, as the paper counts them
SAVED_BITS = NF4_BITS - NF4_DOUBLE_BITS


def bytes_table() -> Table:
    """What LLaMA models weigh, by their shapes."""
    columns = {
        "model": "",
        "parameters": ",d",
        "of them quantised": ",d",
        "float32, GB": ".2f",
        "16 bits, GB": ".2f",
        "NF4, GB": ".3f",
        "NF4 double, GB": ".3f",
        "less than float32": ".2f",
        "adapters, r = 64": ",d",
    }
    rows = []
    for m in LLAMAS:
        plain, double = m.quantized_bytes(NF4_BITS) / 1e9, m.quantized_bytes(NF4_DOUBLE_BITS) / 1e9
        dense = (4 * m.total / 1e9, 2 * m.total / 1e9)
        ratio = dense[0] / double
        rows.append((m.name, m.total, m.linear, *dense, plain, double, ratio, m.adapters(64)))
    title = "Weights; embedding, output layer and norms in 16 bits; GB = 10⁹ bytes"
    return Table(title, columns, rows)


def bytes_claims() -> list[Claim]:
    """What the paper and articles say of bits and bytes."""
    return [*_of_the_paper(), *_of_articles()]


def _of_the_paper() -> list[Claim]:
    return [
        Claim(
            "double quantisation saves 0.373 bits a parameter, about 3 GB for 65B",
            "paper, section 3",
            f"32/64 - (8/64 + 32/(64·256)) = {SAVED_BITS} bits; "
            f"{SAVED_BITS / 8 * LLAMA_65B.linear / 1e9:.3f} GB on what is quantised of 65B",
            "holds",
        ),
        Claim(
            "fine-tuning 65B in 16 bits takes more than 780 GB",
            "paper, abstract",
            f"{PAPER_65B * (2 + 2 + ADAM_BYTES) / 1e9:.1f} GB of weights, gradients and Adam's "
            "moments, without float32 master weights or activations",
            "holds",
        ),
    ]


def _of_articles() -> list[Claim]:
    of_7b = SAVED_BITS / 8 * LLAMA_7B.linear
    double_7b = LLAMA_7B.quantized_bytes(NF4_DOUBLE_BITS)
    base_70b, adapters_70b = LLAMA_2_70B.quantized_bytes(NF4_DOUBLE_BITS), LLAMA_2_70B.adapters(64)
    training_70b = base_70b + adapters_70b * (2 + 2 + ADAM_BYTES)
    return [
        Claim(
            "double quantisation saves 0.375 bits, 315 MB of a 7B model",
            "articles",
            f"{SAVED_BITS:.4f} bits, {of_7b / 1e6:.1f} MB ({of_7b / 2**20:.1f} MiB): embedding and "
            "output layer are not quantised",
            "does not hold",
        ),
        Claim(
            "a 7B model in 4 bits takes 3.5 GB, an eighth of float32",
            "articles",
            f"{double_7b / 1e9:.2f} GB with scales, 16-bit embedding and output layer: "
            f"1/{4 * LLAMA_7B.total / double_7b:.2f} of float32, "
            f"1/{2 * LLAMA_7B.total / double_7b:.2f} of 16 bits",
            "does not hold",
        ),
        Claim(
            "QLoRA trains 70B on one GPU of 48 GB",
            "articles",
            f"Llama-2-70B: {base_70b / 1e9:.2f} GB of weights, {training_70b / 1e9:.2f} GB with "
            "adapters of rank 64, their gradients and moments, before activations; the paper says "
            "65B",
            "not settled",
        ),
    ]
