"""The training loop: a 4-bit base, adapters, and the optimizer of the adapters.

Source: QLoRA (arXiv 2305.14314); the defaults are those of its Appendix B where they do not depend
on the size of the model. Read next: cli/finetune.py shows how it is called.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_ref.adapter import describe_base, save_adapter
from qlora_ref.adapter_init import dense_weights
from qlora_ref.checkpoint import save_base
from qlora_ref.convert import convert_model
from qlora_ref.data import (
    BatchOrder,
    TokenSequence,
    calibration_batches,
    collate,
    fingerprint,
    pack,
    read_examples,
    split_held_out,
    tokenize,
)
from qlora_ref.evaluate import (
    WIDTH_MULTIPLE,
    Evaluation,
    count_targets,
    evaluate,
    generate,
    summed_loss,
)
from qlora_ref.files import written_aside
from qlora_ref.lora import LoraReport, adapters_disabled, add_lora, lora_layers
from qlora_ref.memory import MemoryReport, memory_report, resident_bytes
from qlora_ref.models import load_model, load_tokenizer
from qlora_ref.module4bit import layers_4bit
from qlora_ref.optim import AdamW
from qlora_ref.paging.counters import PagingReport
from qlora_ref.settings import OPTIMIZERS, Settings, choose_dtype, learning_rate
from qlora_ref.training_state import (
    check_identity,
    checkpoints,
    fingerprint_base,
    load_state,
    save_state,
)

# Settings that change where things are, not what comes out.
_NOT_IDENTITY = ("data", "calibration", "resident_bytes", "page_directory")


@dataclass(frozen=True)
class StepLog:
    """One line of log.jsonl: loss is the mean over the step's target tokens, in nats."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    resident_bytes: int


@dataclass(frozen=True)
class Result:
    """What a fine-tune came to; `before` is the 4-bit base, `after` has the trained adapter."""

    before: Evaluation
    after: Evaluation
    final_loss: float
    tokens_per_second: float
    lora: LoraReport
    memory: MemoryReport
    paging: PagingReport | None
    output: Path
    samples: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Run:
    """Everything that the loop works on."""

    settings: Settings
    model: nn.Module
    tokenizer: Any
    train: list[TokenSequence]
    held_out: list[TokenSequence]
    lora: LoraReport
    optimizer: AdamW
    device: torch.device
    identity: dict[str, Any]
    base: dict[str, Any]  # of the adapter's record: it stays as it is in all steps


def finetune(
    settings: Settings,
    output: Path | str,
    resume: bool = False,
    save_every: int = 0,
    sample_prompt: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
    on_step: Callable[[StepLog], None] = lambda log: None,
) -> Result:
    """Fine-tune a model with QLoRA.

    settings       what to train, on what, how
    output         directory for checkpoints, log.jsonl, report.json, the adapter and, where the
                   base is no plain conversion (Settings.plain_base), the base in 4 bits
    resume         go on from the newest checkpoint in `output` (from the start if there is none)
    save_every     write a checkpoint every so many steps, and one at the end; 0: only at the end
    sample_prompt  continue this before and after training
    tell, on_step  called with what is being done, and after every step
    returns        Result; the adapter is in output/adapter, in PEFT's format

    Resumed, a run on the CPU reference ends with the same bits as one that was never broken.
    Raises ValueError for settings, text or a checkpoint that do not fit; nothing is overwritten.
    """
    output = Path(output)
    if output.exists() and any(output.iterdir()) and not resume:
        raise ValueError(
            f"{output} is not empty: choose another directory, or resume the run in it"
        )
    run = _prepare(settings, tell)
    start = _resume(run, output, tell) if resume else 0
    tell(f"evaluating the 4-bit base on {len(run.held_out)} held-out sequences")
    with adapters_disabled(run.model):
        before = evaluate(run.model, run.held_out, _pad_id(run))
        samples = (
            {}
            if sample_prompt is None
            else {"before": generate(run.model, run.tokenizer, sample_prompt)}
        )
    tell(f"perplexity before: {before.perplexity:.2f}; training from step {start}")
    logs = _train(run, output, start, save_every, on_step)
    after = evaluate(run.model, run.held_out, _pad_id(run))
    tell(f"perplexity after: {after.perplexity:.2f}")
    if sample_prompt is not None:
        samples["after"] = generate(run.model, run.tokenizer, sample_prompt)
    save_adapter(run.model, output / "adapter", _save_base(run, output), run.base)
    result = Result(
        before=before,
        after=after,
        final_loss=logs[-1]["loss"] if logs else math.nan,
        tokens_per_second=_median([log["tokens_per_second"] for log in logs]),
        lora=run.lora,
        memory=memory_report(run.model, run.optimizer, _first_batch(run)),
        paging=run.optimizer.paging_report(),
        output=output,
        samples=samples,
    )
    _write_report(result, settings)
    return result


def _save_base(run: _Run, output: Path) -> str:
    """Where the adapter's base can be had again; written here if it is no plain conversion."""
    if run.settings.plain_base or not next(iter(lora_layers(run.model).values())).belongs_to_base:
        return run.settings.model
    save_base(run.model, output / "base")
    run.tokenizer.save_pretrained(output / "base")
    return str(output / "base")


def _prepare(settings: Settings, tell: Callable[[str], None]) -> _Run:
    torch.manual_seed(settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    examples = read_examples(settings.data)  # unreadable text is found before a model is loaded
    tell(f"loading {settings.model}")
    tokenizer = load_tokenizer(settings.model)
    train, held_out = _sequences(settings, examples, tokenizer)
    dtype = choose_dtype(settings.compute_dtype, device)
    model = load_model(settings.model, dtype)
    if settings.calibration:  # the dense model is run; otherwise only the 4-bit one goes there
        model.to(device)
    lora = _quantise_and_adapt(settings, model, tokenizer, tell)
    model.to(device)
    tell(str(lora))
    if settings.gradient_checkpointing:
        enable_checkpointing(model)
    optimizer = AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings.learning_rate,
        betas=(0.9, settings.beta2),
        weight_decay=settings.weight_decay,
        **_state_options(settings),
    )
    identity = {
        **{key: value for key, value in asdict(settings).items() if key not in _NOT_IDENTITY},
        "compute_dtype": str(dtype),
        "base_sha256": fingerprint_base(model),
        "text_sha256": fingerprint(examples),
    }
    model.train()
    parts = (settings, model, tokenizer, train, held_out, lora, optimizer, device, identity)
    return _Run(*parts, describe_base(model))


def _quantise_and_adapt(
    settings: Settings, model: nn.Module, tokenizer: Any, tell: Callable[[str], None]
) -> LoraReport:
    originals = None if settings.init == "zero" else dense_weights(model)
    quantised_here = not layers_4bit(model)
    if quantised_here:
        tell(f"quantising to {settings.codebook}, computing in {next(model.parameters()).dtype}")
        tell(str(convert_model(model, **_conversion(settings, tokenizer))))
    else:
        tell("the model is in 4 bits already")
    lora = add_lora(
        model,
        settings.r,
        settings.alpha,
        settings.dropout,
        settings.targets,
        settings.rslora,
        init=settings.init,
        originals=originals,
        init_iterations=settings.init_iterations,
        scale_search=settings.scale_search,
    )
    if quantised_here and not settings.plain_base:
        for adapter in lora_layers(model).values():
            adapter.belongs_to_base = True
    return lora


def _conversion(settings: Settings, tokenizer: Any) -> dict[str, Any]:
    names = ("codebook", "block_size", "double_quant", "scale_search")
    options = {name: getattr(settings, name) for name in names}
    if settings.calibration:
        size = settings.length, settings.calibration_sequences
        options["calibration"] = calibration_batches(settings.calibration, tokenizer, *size)
    return options


def _state_options(settings: Settings) -> dict[str, Any]:
    """Where AdamW keeps its state, and in how many bits."""
    state_bits, paged = OPTIMIZERS[settings.optimizer]
    given = {name: getattr(settings, name) for name in ("resident_bytes", "page_directory")}
    return {
        "state_bits": state_bits,
        "paged": paged,
        **{name: value for name, value in given.items() if value},
    }


def enable_checkpointing(model: Any) -> None:
    """Keep the inputs of the layers of a transformers model, and recompute the rest."""
    # transformers renamed it in 5.23.
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _sequences(
    settings: Settings, examples: list[Any], tokenizer: Any
) -> tuple[list[TokenSequence], list[TokenSequence]]:
    train_text, held_out_text = split_held_out(examples, settings.held_out, settings.seed)
    train = tokenize(train_text, tokenizer, settings.length)
    held_out = tokenize(held_out_text, tokenizer, settings.length)
    if settings.packing:
        train = pack(train, settings.length)
    return train, held_out[: settings.evaluation_sequences]


def _resume(run: _Run, output: Path, tell: Callable[[str], None]) -> int:
    found = checkpoints(output)
    if not found:
        tell(f"no checkpoint in {output} yet: starting from the beginning")
        return 0
    step = check_identity(found[-1], run.identity)
    load_state(found[-1], run.model, run.optimizer)
    tell(f"resuming from {found[-1]}")
    return step


def _train(
    run: _Run, output: Path, start: int, save_every: int, on_step: Callable[[StepLog], None]
) -> list[dict[str, Any]]:
    steps = run.settings.steps
    lengths = [len(sequence.ids) for sequence in run.train]
    order = BatchOrder(
        lengths, run.settings.batch_size, run.settings.seed, run.settings.group_by_length
    )
    output.mkdir(parents=True, exist_ok=True)
    log_path = output / "log.jsonl"
    logs = _cut_log(log_path, start)
    for step in range(start, steps):
        log = _step(run, order, step)
        logs.append(asdict(log))
        with open(log_path, "a") as file:
            file.write(json.dumps(logs[-1]) + "\n")
        if step + 1 == steps or (save_every and (step + 1) % save_every == 0):
            save_state(output, step + 1, run.model, run.optimizer, run.identity, run.base)
        on_step(log)
    return logs


def _step(run: _Run, order: BatchOrder, step: int) -> StepLog:
    began = time.perf_counter()
    rate = learning_rate(run.settings, step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    batches = list(_micro_batches(run, order, step))
    # The mean is over the tokens of the whole step: a mean of the micro-batches' means would weigh
    # a token by the length of its neighbours.
    targets = sum(count_targets(batch) for batch in batches)
    total = 0.0
    for batch in batches:
        loss, _ = summed_loss(run.model, batch)
        (loss / targets).backward()
        total += loss.item()
    params = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    norm = nn.utils.clip_grad_norm_(params, run.settings.max_grad_norm)
    if not (math.isfinite(total) and math.isfinite(norm.item())):
        raise ValueError(
            f"step {step + 1} has loss {total / targets} and gradient norm {norm.item()}: lower "
            "the learning rate, or compute in float32; the last checkpoint is unharmed"
        )
    run.optimizer.step()
    run.optimizer.zero_grad()
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    seconds = time.perf_counter() - began
    return StepLog(
        step + 1, total / targets, rate, norm.item(), tokens, tokens / seconds, resident_bytes()
    )


def _micro_batches(run: _Run, order: BatchOrder, step: int) -> Iterator[dict[str, Tensor]]:
    for micro in range(run.settings.accumulation):
        indices = order.batch(step * run.settings.accumulation + micro)
        batch = collate([run.train[i] for i in indices], _pad_id(run), WIDTH_MULTIPLE)
        yield {name: tensor.to(run.device) for name, tensor in batch.items()}


def _first_batch(run: _Run) -> dict[str, Tensor]:
    batch = collate(run.train[: run.settings.batch_size], _pad_id(run), WIDTH_MULTIPLE)
    return {name: tensor.to(run.device) for name, tensor in batch.items()}


def _cut_log(path: Path, start: int) -> list[dict[str, Any]]:
    """The log's lines up to the step that is resumed from; later ones will be written again."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text().splitlines():
        try:
            log = json.loads(line)
        except ValueError:  # the line that was being written when the run was killed
            break
        if log["step"] <= start:
            kept.append(log)
    with written_aside(path) as aside:
        aside.write_text("".join(json.dumps(log) + "\n" for log in kept))
    return kept


def _write_report(result: Result, settings: Settings) -> None:
    report = {
        "settings": asdict(settings),
        "perplexity_before": result.before.perplexity,
        "perplexity_after": result.after.perplexity,
        "held_out_tokens": result.after.tokens,
        "final_loss": result.final_loss,
        "tokens_per_second": result.tokens_per_second,
        "trainable_parameters": result.lora.trainable,
        "memory": result.memory.as_dict(),
        "samples": result.samples,
    }
    if result.paging is not None:
        report["paging"] = asdict(result.paging)
    with written_aside(result.output / "report.json") as aside:
        aside.write_text(json.dumps(report, indent=2) + "\n")


def _pad_id(run: _Run) -> int:
    pad = run.tokenizer.pad_token_id
    return 0 if pad is None else int(pad)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else math.nan
