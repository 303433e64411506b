"""Train the tiny LLaMA-shaped model that the tests quantise and fine-tune.

Tests need weights that a real training run made, in the layout of a transformers checkpoint, and
small enough for the repository. This script makes one from shakespeare.txt: a byte-level BPE
tokenizer of 512 tokens and a language model of 0.9 million parameters whose k and v projections are
narrower than q (grouped-query attention), so that no shape is shared by accident.

    python tests/data/train_tiny_model.py --steps 700

The results load offline with AutoModelForCausalLM and AutoTokenizer. Next: README.md beside it.
"""

import argparse
import math
import os
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
SEED = 1611
VOCAB, POSITIONS = 512, 512
BATCH, LENGTH = 32, 128
PEAK_RATE, WARM_UP_STEPS = 3e-3, 50
CHUNK_BYTES = 4096


def split_text(data: bytes) -> tuple[list[str], list[str]]:
    """Cut the text into 4 KB chunks and hold out every tenth; returns (training, held-out)."""
    chunks = [data[i : i + CHUNK_BYTES].decode("ascii") for i in range(0, len(data), CHUNK_BYTES)]
    return [chunk for i, chunk in enumerate(chunks) if i % 10 != 9], chunks[9::10]


def train_tokenizer(text: list[str]) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE: 3 special tokens, 256 bytes and 253 merges. It adds no specials."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: list[str]) -> torch.Tensor:
    """The ids of the joined text, int64; it passes by the wrapper, which warns of long inputs."""
    return torch.tensor(tokenizer.backend_tokenizer.encode("".join(text)).ids)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A LLaMA of 4 layers: q and o are (128, 128), k and v (64, 128), the MLP (384, 128)."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up to PEAK_RATE, then half a cosine down to a tenth of it."""
    if step < WARM_UP_STEPS:
        return PEAK_RATE * (step + 1) / WARM_UP_STEPS
    progress = (step - WARM_UP_STEPS) / (steps - WARM_UP_STEPS)
    return PEAK_RATE * (0.55 + 0.45 * math.cos(math.pi * progress))


def train(model: LlamaForCausalLM, tokens: torch.Tensor, steps: int) -> None:
    """Run AdamW on `steps` batches of 32 random windows of 128 tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    model.train()
    for step in range(steps):
        starts = torch.randint(len(tokens) - LENGTH + 1, (BATCH, 1))
        batch = tokens[starts + torch.arange(LENGTH)]  # (BATCH, LENGTH)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4d}  training loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Mean cross-entropy in nats per predicted token, over whole windows of 128 tokens."""
    model.eval()
    windows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    losses = [model(input_ids=w, labels=w).loss.item() * len(w) for w in windows.split(BATCH)]
    return sum(losses) / len(windows)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the checkpoint beside `out` and swap directories, so a killed run keeps the old one."""
    fresh, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(out, old)
    os.replace(fresh, out)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    """Train, save, and print the held-out loss of the saved weights."""
    parser = argparse.ArgumentParser(description="Train the tiny model of the tests.")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--out", type=Path, default=HERE / "tiny_llama")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # small matrices gain nothing from more, and sums keep one order
    torch.manual_seed(SEED)
    training, held_out = split_text((HERE / "shakespeare.txt").read_bytes())
    tokenizer = train_tokenizer(training)
    model = build_model(tokenizer)
    train(model, encode(tokenizer, training), arguments.steps)

    model.bfloat16()  # the loss is that of the rounded weights, as the file holds
    save(model, tokenizer, arguments.out)
    loss = mean_loss(model.float(), encode(tokenizer, held_out))
    print(f"held-out loss {loss:.4f} nats/token")


if __name__ == "__main__":
    main()
