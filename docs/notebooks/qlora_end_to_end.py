# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # QLoRA from end to end
#
# A LLaMA of 0.9 million parameters has been trained on four plays of Shakespeare. We freeze it in
# 4 bits, put adapters on it, and teach it to write entries of Ambrose Bierce's *Devil's
# Dictionary*. On a CPU this takes about a minute.

# %%
import tempfile
from pathlib import Path

import torch

import qlora_ref
from qlora_ref import plots
from qlora_ref.adapter import load_adapter, save_adapter
from qlora_ref.data import BatchOrder, collate, read_examples, split_held_out, tokenize
from qlora_ref.evaluate import evaluate, generate, summed_loss
from qlora_ref.lora import adapters_disabled
from qlora_ref.memory import memory_report
from qlora_ref.merging import merge_to_directory
from qlora_ref.models import load_model, load_tokenizer

# %matplotlib inline
# %config InlineBackend.figure_formats = ["svg"]

torch.manual_seed(0)
source = "tests/data/tiny_llama"
model, tokenizer = load_model(source), load_tokenizer(source)

# %% [markdown]
# ## Text
#
# Each line of the file is a prompt and the answer to learn. The loss counts on answers only. A
# tenth of the entries is held out.

# %%
examples = read_examples("tests/data/devils_dictionary.jsonl")
print(examples[68].prompt, "->", examples[68].text)
train, held_out = (
    tokenize(part, tokenizer, max_length=128) for part in split_held_out(examples, 0.1, seed=0)
)
held_out = held_out[:32]  # enough to see a difference
print(len(train), "to train on,", len(held_out), "held out")
dense = evaluate(model, held_out, tokenizer.pad_token_id)
print(f"perplexity of the model as it is: {dense.perplexity:.2f}")

# %% [markdown]
# ## The base in 4 bits
#
# `convert_model` replaces the linear layers, one at a time, and says what it left and why.

# %%
report = qlora_ref.convert_model(model, "nf4", block_size=64, double_quant=True)
print(report)
frozen = evaluate(model, held_out, tokenizer.pad_token_id)
print(f"perplexity in 4 bits: {frozen.perplexity:.2f}")

# %% [markdown]
# ## Adapters
#
# Two thin matrices for each 4-bit layer. B begins at zero, so nothing has changed yet.

# %%
print(qlora_ref.add_lora(model, r=16, alpha=32, dropout=0.05))
assert evaluate(model, held_out, tokenizer.pad_token_id) == frozen

# %% [markdown]
# ## Training
#
# An ordinary loop. Gradients pass through the 4-bit weights but none is computed for them. The
# optimizer keeps its moments in 8 bits.

# %%
adapters = [p for p in model.parameters() if p.requires_grad]
optimizer = qlora_ref.AdamW(adapters, lr=3e-3, state_bits=8)
lengths = [len(sequence.ids) for sequence in train]
order = BatchOrder(lengths, batch_size=8, seed=0, group_by_length=True)
model.train()
losses = []
for step in range(40):
    batch = collate([train[i] for i in order.batch(step)], tokenizer.pad_token_id)
    loss, targets = summed_loss(model, batch)
    (loss / targets).backward()
    torch.nn.utils.clip_grad_norm_(adapters, 0.3)
    optimizer.step()
    optimizer.zero_grad()
    losses.append((step + 1, loss.item() / targets))
plots.plot_losses({"QLoRA, r = 16": losses})

# %% [markdown]
# Where the memory goes, beside what arithmetic says:

# %%
print(memory_report(model, optimizer, batch))

# %%
trained = evaluate(model, held_out, tokenizer.pad_token_id)
print(f"perplexity: {frozen.perplexity:.2f} before, {trained.perplexity:.2f} after")
assert trained.loss < frozen.loss - 0.1
with adapters_disabled(model):  # the base is as it was, to the bit
    assert evaluate(model, held_out, tokenizer.pad_token_id) == frozen
print(generate(model, tokenizer, examples[68].prompt, tokens=30))

# %% [markdown]
# Forty steps, and a model this small, learn the form of an entry and not its wit. `make demo`
# trains one of 135 million parameters.
#
# ## Save, load, merge
#
# The adapter is a small file in PEFT's format.

# %%
folder = Path(tempfile.mkdtemp())
save_adapter(model, folder / "adapter", base_model=source)
print({path.name: path.stat().st_size for path in sorted((folder / "adapter").iterdir())})

again = load_model(source)
qlora_ref.convert_model(again, "nf4", block_size=64, double_quant=True)
load_adapter(again, folder / "adapter")
assert evaluate(again, held_out, tokenizer.pad_token_id) == trained

# %% [markdown]
# Merged, base and adapter are one weight. To float that is exact but for a rounding; to 4 bits the
# sum is quantised anew, and the error of each layer is told.

# %%
merge_to_directory(model, source, folder / "float")
merged = evaluate(load_model(folder / "float"), held_out, tokenizer.pad_token_id)
print(merge_to_directory(again, source, folder / "4bit", to="4bit"))
merged4 = evaluate(load_model(folder / "4bit"), held_out, tokenizer.pad_token_id)
print(f"perplexity: {trained.perplexity:.3f} with the adapter, {merged.perplexity:.3f} merged,")
print(f"{merged4.perplexity:.3f} merged and quantised anew")
assert abs(merged.loss - trained.loss) < 1e-3

# %% [markdown]
# The same from the command line, with checkpoints, evaluation and memory report:
#
#     qlora-ref finetune --model tests/data/tiny_llama --data tests/data/devils_dictionary.jsonl \
#         --output runs/tiny --steps 40 --batch-size 8 --length 128 --learning-rate 3e-3
