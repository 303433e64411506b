"""How many parameters LLaMA models have, and what they weigh in 4 bits: arithmetic on shapes."""

from __future__ import annotations

from dataclasses import dataclass

ADAM_BYTES = 8  # two float32 moments a parameter
NF4_BITS = 4 + 32 / 64
NF4_DOUBLE_BITS = 4 + 8 / 64 + 32 / (64 * 256)


@dataclass(frozen=True)
class Llama:
    """Shapes of a LLaMA, from its published configuration."""

    name: str
    width: int
    layers: int
    hidden: int
    vocabulary: int = 32000
    key_value_width: int | None = None  # None: as wide as the rest

    @property
    def _shapes(self) -> list[tuple[int, int]]:
        """(in, out) of the seven linear layers of a block."""
        d, f, kv = self.width, self.hidden, self.key_value_width or self.width
        return [(d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)]

    @property
    def linear(self) -> int:
        """Weights that are quantised: all linear layers but the output layer."""
        return self.layers * sum(k * n for k, n in self._shapes)

    @property
    def kept(self) -> int:
        """Parameters that are not: embedding, output layer, norms."""
        return 2 * self.vocabulary * self.width + (2 * self.layers + 1) * self.width

    @property
    def total(self) -> int:
        """All parameters."""
        return self.linear + self.kept

    def adapters(self, r: int) -> int:
        """Parameters of rank-r adapters on all linear layers: r (in + out) each."""
        return self.layers * r * sum(k + n for k, n in self._shapes)

    def quantized_bytes(self, bits: float, kept_bytes: int = 2) -> float:
        """Bytes with linear layers at `bits` a weight and the rest at `kept_bytes` a parameter."""
        return self.linear * bits / 8 + self.kept * kept_bytes


LLAMA_7B = Llama("LLaMA-7B", 4096, 32, 11008)
LLAMA_13B = Llama("LLaMA-13B", 5120, 40, 13824)
LLAMA_33B = Llama("LLaMA-33B", 6656, 60, 17920)
LLAMA_65B = Llama("LLaMA-65B", 8192, 80, 22016)
LLAMA_2_70B = Llama("Llama-2-70B", 8192, 80, 28672, key_value_width=1024)
LLAMA_3_8B = Llama("Llama-3-8B", 4096, 32, 14336, 128256, key_value_width=1024)
LLAMAS = (LLAMA_7B, LLAMA_13B, LLAMA_33B, LLAMA_65B, LLAMA_2_70B, LLAMA_3_8B)
