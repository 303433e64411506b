# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # NF4 by hand
#
# From the normal distribution to a weight in 4 bits. Each step is a line or two of torch; then the
# library does the same, and the two are compared bit for bit.

# %%
import torch

import qlora_ref
from qlora_ref import codebooks, packing, plots

# %matplotlib inline
# %config InlineBackend.figure_formats = ["svg"]

# %% [markdown]
# ## Sixteen levels
#
# Weights of a trained network are nearly normal: many near zero, few far away. So a code of 4 bits
# should have its levels dense near zero. NF4 puts them at **quantiles**: `Q(p)` is the number
# below which a share p of a normal distribution lies. Seven quantiles go to the negative side,
# eight to the positive one, and 0 is a level of its own.
#
# The largest quantile must be finite, so p stops at 929/960 = 0.9677083, not at 1. Dividing by it
# makes the ends -1 and 1.

# %%
offset = 0.9677083
p_positive = torch.linspace(offset, 0.5, 9)[:-1]  # 8 of them; Q(0.5) = 0 is left out
p_negative = torch.linspace(offset, 0.5, 8)[:-1]  # 7
positive = torch.special.ndtri(p_positive.double()).float()
negative = -torch.special.ndtri(p_negative.double()).float()
levels = torch.cat([negative, torch.zeros(1), positive]).sort().values
levels = levels / levels.max()
print(levels)

# %%
assert torch.equal(levels, codebooks.nf4_codebook())  # the paper's table, to the bit
plots.plot_codebooks({"NF4": levels.tolist(), "int4": codebooks.int4_codebook().tolist()})

# %% [markdown]
# The density is that of a normal weight divided by the largest magnitude of its block of 64, which
# is what the levels will stand for.
#
# ## A block of weights
#
# 64 weights share one scale, their **absmax**. A weight divided by it lies in [-1, 1], and its
# **code** is the index of the nearest level.

# %%
torch.manual_seed(0)
weight = 0.02 * torch.randn(256, 256)
block = weight.flatten()[:64]

absmax = block.abs().max()
normalised = block * (1 / absmax)
codes = (normalised[:, None] - levels).abs().argmin(dim=1)
restored = levels[codes] * absmax

for name, values in {"weight": block, "normalised": normalised, "restored": restored}.items():
    print(f"{name:<11}", *(f"{value:+.4f}" for value in values[:8].tolist()))
print(f"{'code':<11}", *(f"{code:7d}" for code in codes[:8].tolist()))

# %% [markdown]
# Two codes make a byte, the first one in the upper four bits. That is all that is kept of the
# block: 32 bytes, and absmax.

# %%
packed = (codes[0::2] * 16 + codes[1::2]).to(torch.uint8)
plots.plot_nibbles(block[:8].tolist(), codes[:8].tolist(), absmax.item())

# %% [markdown]
# ## The library does the same
#
# To the whole weight at once. Where a weight is exactly half-way between two levels the lower one
# is taken; `argmin` does so too.

# %%
q = qlora_ref.quantize(weight, "nf4", block_size=64)
print(q)
assert torch.equal(q.packed[:32], packed)
assert torch.equal(q.absmax[0], absmax)
assert torch.equal(q.dequantize().flatten()[:64], restored)
assert torch.equal(packing.unpack_codes(q.packed, 64).long(), codes)

# %% [markdown]
# ## What it costs
#
# The mean squared error, as a share of the mean square of the weights, for each codebook. All have
# sixteen codes and the same blocks; only the levels differ.

# %%
weights = torch.randn(1 << 20)
for name in ("nf4", "af4", "fp4_ocp", "int4", "fp4"):
    error = qlora_ref.quantize(weights, name).error(weights)
    print(f"{name:<8} {100 * error.mse:.3f} %   {error.snr_db:.1f} dB")

# %%
errors = {
    name: (qlora_ref.quantize(weights, name).dequantize() - weights).tolist()
    for name in ("nf4", "fp4", "int4")
}
plots.plot_errors(errors, "in standard deviations of the weights")

# %% [markdown]
# Large blocks need fewer scales, but their absmax is larger, and so is every error in them.

# %%
for block_size in (32, 64, 128, 256, 1024):
    q = qlora_ref.quantize(weights, "nf4", block_size)
    print(f"{block_size:>5}  {q.bits_per_parameter:.3f} bits   {100 * q.error(weights).mse:.3f} %")

# %% [markdown]
# ## Scales in 8 bits
#
# Half a bit for each weight goes to scales. **Double quantisation** takes their mean off, and
# quantises what is left like a weight: in blocks of 256, to the nearest of 256 levels that cover
# seven decades.

# %%
single = qlora_ref.quantize(weights, "nf4")
scales = single.absmax
mean = scales.double().mean().float()
centred = scales - mean
levels8 = codebooks.dynamic_codebook()

first = centred[:256]
absmax2 = first.abs().max()
codes8 = (first[:, None] / absmax2 - levels8).abs().argmin(dim=1)
restored8 = levels8[codes8] * absmax2 + mean
relative = (restored8 / scales[:256] - 1).abs()
print(f"largest error of a scale: {100 * relative.max():.2f} %")

# %%
double = qlora_ref.quantize(weights, "nf4", double_quant=True)
assert torch.equal(double.absmax[:256], restored8)
for q in (single, double):
    print(f"{q.bits_per_parameter:.4f} bits   {100 * q.error(weights).mse:.4f} %")
print("by arithmetic:", 4 + 32 / 64, "and", 4 + 8 / 64 + 32 / (64 * 256))

# %% [markdown]
# 0.37 bits less for each weight, and the error hardly moves.
#
# Next: the same operations [one by one](../operations/index.md), down to their kernels.
