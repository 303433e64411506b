"""bitsandbytes.nn: the 4-bit layers."""

from qlora_ref.integrations.bitsandbytes.nn import modules, parametrize
from qlora_ref.integrations.bitsandbytes.nn.embeddings import Embedding, StableEmbedding
from qlora_ref.integrations.bitsandbytes.nn.modules import (
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Int8Params,
    Linear4bit,
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
    OutlierAwareLinear,
    Params4bit,
)

__all__ = [
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "OutlierAwareLinear",
    "Params4bit",
    "StableEmbedding",
    "modules",
    "parametrize",
]
