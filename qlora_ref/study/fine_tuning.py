"""Part 4: QLoRA beside LoRA on 16-bit weights, and what its choices are worth in a fine-tune."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from qlora_ref.adapter_init import dense_weights
from qlora_ref.convert import convert_model
from qlora_ref.data import BatchOrder, read_examples
from qlora_ref.evaluate import summed_loss
from qlora_ref.lora import add_lora
from qlora_ref.optim import AdamW
from qlora_ref.study.options import Options
from qlora_ref.study.paired import Mean, crossed_mean
from qlora_ref.study.report import Claim, Part, Table, verdict
from qlora_ref.study.small_model import SmallModel, cut, window_losses
from qlora_ref.study.workers import in_two_processes

SEEDS, STEPS = 3, 40
QUICK_SEEDS, QUICK_STEPS, QUICK_WINDOWS = 2, 6, 32
BATCH, RATE, CLIP = 16, 3e-3, 0.3
ALPHA = 16.0  # the paper's, for every rank
QUERY_AND_VALUE = ["q_proj", "v_proj"]
# What counts as no difference, in parts of what fine-tuning gains.
SAME = 0.05


@dataclass(frozen=True)
class Setup:
    """One way to fine-tune; codebook None leaves the weights as they are."""

    name: str
    codebook: str | None = "nf4"
    double_quant: bool = True
    targets: str | tuple[str, ...] = "all-linear"
    r: int = 8
    init: str = "zero"


LORA, QLORA = "LoRA, 16-bit weights", "QLoRA: NF4, double"


def setups(matched_r: int) -> list[Setup]:
    """All of them; matched_r gives q and v as many parameters as r = 8 gives all layers."""
    two = tuple(QUERY_AND_VALUE)
    return [
        Setup(LORA, codebook=None),
        Setup(QLORA),
        Setup("QLoRA: NF4", double_quant=False),
        Setup("QLoRA: FP4, double", codebook="fp4"),
        Setup("QLoRA, r = 32", r=32),
        Setup("QLoRA, q and v", targets=two),
        Setup(f"QLoRA, q and v, r = {matched_r}", targets=two, r=matched_r),
        Setup("QLoRA, LoftQ", init="loftq"),
        Setup("QLoRA, PiSSA", init="pissa"),
        Setup("QLoRA: NF2, double", codebook="nf2"),
        Setup("QLoRA: NF2, double, LoftQ", codebook="nf2", init="loftq"),
    ]


@dataclass(frozen=True)
class Outcome:
    """What a fine-tune came to.

    before, after  losses of held-out windows, float64 (windows,)
    steps          the loss of each step
    trainable      parameters trained
    """

    before: Tensor
    after: Tensor
    steps: list[float]
    trainable: int


def study(options: Options, tell: Callable[[str], None]) -> Part:
    """Fine-tune each setup with each seed; compare on the same held-out windows."""
    part = Part(4, "QLoRA beside 16-bit LoRA")
    try:
        small = SmallModel(options.model, options.text, 1)
        read_examples(options.fine_tune_text)
    except (FileNotFoundError, ImportError) as error:
        part.skipped.append(str(error))
        return part
    seeds = QUICK_SEEDS if options.quick else SEEDS
    chosen = setups(matched_rank(small))
    jobs = [(setup, options.seed + seed) for setup in chosen for seed in range(seeds)]
    names = [f"{setup.name}, seed {seed}" for setup, seed in jobs]
    found = in_two_processes(partial(fine_tune, options), jobs, names, tell)
    outcomes: dict[str, list[Outcome]] = {}
    for (setup, _), outcome in zip(jobs, found):
        outcomes.setdefault(setup.name, []).append(outcome)
    after = {name: torch.stack([o.after for o in runs]) for name, runs in outcomes.items()}
    gain = crossed_mean(torch.stack([o.before for o in outcomes[LORA]]) - after[LORA])
    steps = QUICK_STEPS if options.quick else STEPS
    windows = after[LORA].shape[1]
    part.content.append(
        _INTRODUCTION.format(seeds=seeds, steps=steps, batch=BATCH, rate=RATE, windows=windows)
    )
    part.content.append(_table(outcomes, after, gain))
    _add_claims(part, chosen, after, gain)
    part.data = {
        "after": {name: losses.mean(dim=1).tolist() for name, losses in after.items()},
        "steps": {name: runs[0].steps for name, runs in outcomes.items()},
    }
    return part


_INTRODUCTION = """\
The small model, trained on plays, learns a dictionary: {steps} steps of {batch} windows of 128 \
tokens, AdamW at {rate}, adapters of rank 8 on all linear layers unless it is said, alpha 16, \
{seeds} seeds. A seed draws adapters and batches, and turns the model into other coordinates: its \
residual stream is rotated by a random orthogonal matrix, which leaves what it computes as it was \
but gives each seed another draw of the rounding error. Loss is in nats a token on {windows} \
held-out windows; standard errors count windows and seeds."""


def matched_rank(small: SmallModel) -> int:
    """The least rank that gives q and v at least the parameters of rank 8 on all layers."""
    shapes = {name: sum(weight.shape) for name, weight in small.weights.items()}
    two = sum(size for name, size in shapes.items() if name.rpartition(".")[2] in QUERY_AND_VALUE)
    return -(-8 * sum(shapes.values()) // two)


def fine_tune(options: Options, job: tuple[Setup, int]) -> Outcome:
    """Fine-tune one setup with one seed."""
    setup, seed = job
    small = SmallModel(options.model, options.text, 1, turn=seed)
    train, test = _windows(small, options)
    model = small.model
    originals = dense_weights(model)
    if setup.codebook is not None:
        convert_model(model, setup.codebook, double_quant=setup.double_quant)
    torch.manual_seed(seed)
    targets = setup.targets if isinstance(setup.targets, str) else list(setup.targets)
    report = add_lora(model, setup.r, ALPHA, targets=targets, init=setup.init, originals=originals)
    before = window_losses(model, test)
    losses = _train(model, train, QUICK_STEPS if options.quick else STEPS, seed)
    return Outcome(before, window_losses(model, test), losses, report.trainable)


def _windows(small: SmallModel, options: Options) -> tuple[Tensor, Tensor]:
    examples = read_examples(options.fine_tune_text)
    text = "\n\n".join(f"{e.prompt}\n{e.text}" if e.prompt else e.text for e in examples)
    train, test = cut(text)
    return small.split(train), small.split(test)[: QUICK_WINDOWS if options.quick else None]


def _train(model: nn.Module, windows: Tensor, steps: int, seed: int) -> list[float]:
    model.train()
    losses = []
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(params, lr=RATE)
    order = BatchOrder([windows.shape[1]] * len(windows), BATCH, seed, False)
    for step in range(steps):
        ids = windows[order.batch(step)]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        loss, targets = summed_loss(model, batch)
        (loss / targets).backward()
        losses.append(loss.item() / targets)
        nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _table(outcomes: dict[str, list[Outcome]], after: dict[str, Tensor], gain: Mean) -> Table:
    columns = {
        "setup": "",
        "parameters trained": ",d",
        "before": ".4f",
        "after": ".4f",
        "after, less LoRA's": "+.4f",
        "standard error": ".4f",
        "t": "+.1f",
        "in % of LoRA's gain": "+.1f",
    }
    rows = []
    for name, runs in outcomes.items():
        before = torch.stack([o.before for o in runs]).mean().item()
        behind = crossed_mean(after[name] - after[LORA]) if name != LORA else None
        cells = (
            (behind.mean, behind.error, behind.t, 100 * behind.mean / gain.mean)
            if behind
            else (None,) * 4
        )
        rows.append((name, runs[0].trainable, before, after[name].mean().item(), *cells))
    return Table("Loss on held-out windows", columns, rows)


def _add_claims(part: Part, chosen: list[Setup], after: dict[str, Tensor], gain: Mean) -> None:
    plain, fp4, r32, two, matched, loftq, pissa, nf2, nf2_loftq = (s.name for s in chosen[2:])

    def same(statement: str, source: str, mine: str, other: str) -> Claim:
        found = crossed_mean(after[mine] - after[other])
        t = (SAME * gain.mean - abs(found.mean)) / found.error
        share = 100 * found.mean / gain.mean
        text = (
            f"{found.mean:+.4f} nats (error {found.error:.4f}), {share:+.1f} % of what LoRA "
            f"gains; t is for less than {100 * SAME:.0f} %"
        )
        return Claim(statement, source, text, verdict(t), t)

    def better(statement: str, source: str, mine: str, other: str) -> Claim:
        found = crossed_mean(after[other] - after[mine])
        text = f"loss of {other} less that of {mine}: {found.mean:+.4f} nats"
        return Claim(statement, source, text, verdict(found.t), found.t)

    everything = "all linear layers need adapters: q and v alone are worse"
    part.claims += [
        same("QLoRA reaches 16-bit LoRA", "paper, tables 3 and 4", QLORA, LORA),
        same("double quantisation does not cost a fine-tune", "paper, table 3", QLORA, plain),
        same("the rank does not matter: 32 beside 8", "paper, figure 4", r32, QLORA),
        better("NF4 is better than FP4 after a fine-tune", "paper, table 4", QLORA, fp4),
        better(everything, "paper, figure 2", QLORA, two),
        better("LoftQ's start is better than zero", "arXiv 2310.08659", loftq, QLORA),
        better("LoftQ's start is better than zero at 2 bits", "arXiv 2310.08659", nf2_loftq, nf2),
        better("PiSSA's start is better than zero", "arXiv 2404.02948", pissa, QLORA),
        better(everything + " with as many parameters", "paper, figure 2", QLORA, matched),
    ]
