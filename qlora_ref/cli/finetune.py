"""`qlora-ref finetune`."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qlora_ref.cli.options import (
    AsJson,
    BlockSize,
    Calibration,
    CalibrationSequences,
    Codebook,
    Data,
    DoubleQuant,
    Model,
    ScaleSearch,
    console,
    messages,
    print_json,
)
from qlora_ref.settings import OPTIMIZERS, Settings

_DEFAULT = Settings(model="", data="")


def finetune(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option(help="directory for checkpoints, log and adapter")],
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the newest checkpoint")
    ] = False,
    codebook: Codebook = _DEFAULT.codebook,
    block_size: BlockSize = _DEFAULT.block_size,
    double_quant: DoubleQuant = _DEFAULT.double_quant,
    scale_search: ScaleSearch = _DEFAULT.scale_search,
    calibration: Calibration = _DEFAULT.calibration,
    calibration_sequences: CalibrationSequences = _DEFAULT.calibration_sequences,
    compute_dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
    r: Annotated[int, typer.Option(help="rank of the adapters")] = _DEFAULT.r,
    alpha: Annotated[
        float, typer.Option(help="the update is scaled by alpha / r")
    ] = _DEFAULT.alpha,
    dropout: Annotated[float, typer.Option(help="on the adapters' inputs")] = _DEFAULT.dropout,
    rslora: Annotated[bool, typer.Option(help="scale by alpha / sqrt(r)")] = _DEFAULT.rslora,
    targets: Annotated[
        str, typer.Option(help="all-linear, names separated by commas, or a regular expression")
    ] = "all-linear",
    init: Annotated[
        str, typer.Option(help="where adapters start: zero, loftq or pissa")
    ] = _DEFAULT.init,
    init_iterations: Annotated[
        int, typer.Option(help="of loftq or pissa")
    ] = _DEFAULT.init_iterations,
    steps: Annotated[int, typer.Option(help="optimizer steps")] = _DEFAULT.steps,
    batch_size: Annotated[int, typer.Option(help="sequences a micro-batch")] = _DEFAULT.batch_size,
    accumulation: Annotated[int, typer.Option(help="micro-batches a step")] = _DEFAULT.accumulation,
    length: Annotated[int, typer.Option(help="tokens a sequence, at most")] = _DEFAULT.length,
    packing: Annotated[bool, typer.Option(help="fill sequences to the length")] = _DEFAULT.packing,
    group_by_length: Annotated[
        bool, typer.Option(help="batches of like lengths")
    ] = _DEFAULT.group_by_length,
    learning_rate: Annotated[float, typer.Option(help="after warm-up")] = _DEFAULT.learning_rate,
    schedule: Annotated[str, typer.Option(help="constant or cosine")] = _DEFAULT.schedule,
    warmup: Annotated[float, typer.Option(help="share of the steps")] = _DEFAULT.warmup,
    max_grad_norm: Annotated[
        float, typer.Option(help="gradient clipping")
    ] = _DEFAULT.max_grad_norm,
    weight_decay: Annotated[float, typer.Option(help="of the adapters")] = _DEFAULT.weight_decay,
    beta2: Annotated[float, typer.Option(help="of AdamW")] = _DEFAULT.beta2,
    optimizer: Annotated[str, typer.Option(help=", ".join(OPTIMIZERS))] = _DEFAULT.optimizer,
    resident_bytes: Annotated[
        int, typer.Option(help="that pages of a paged optimizer may occupy; 0: 256 MiB")
    ] = _DEFAULT.resident_bytes,
    page_directory: Annotated[
        str, typer.Option(help="of a paged optimizer on the CPU; else $TMPDIR or /var/tmp")
    ] = _DEFAULT.page_directory,
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="recompute activations in the backward")
    ] = _DEFAULT.gradient_checkpointing,
    held_out: Annotated[float, typer.Option(help="share of the text kept for evaluation")] = 0.1,
    evaluation_sequences: Annotated[
        int, typer.Option(help="held-out sequences, at most")
    ] = _DEFAULT.evaluation_sequences,
    seed: Annotated[int, typer.Option(help="of everything random")] = _DEFAULT.seed,
    save_every: Annotated[int, typer.Option(help="steps between checkpoints; 0: at the end")] = 0,
    sample_prompt: Annotated[
        Optional[str], typer.Option(help="continue this before and after")  # noqa: UP045
    ] = None,
    plot: Annotated[bool, typer.Option(help="write loss.png (needs matplotlib)")] = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune: quantise a model, train adapters on a text, report perplexity before and after."""
    options = dict(locals())
    options["targets"] = _parse_targets(targets)
    settings = Settings(**{name: options[name] for name in asdict(_DEFAULT)})
    if plot:
        import matplotlib  # noqa: F401  # fails now if it is missing, not after the training
    from qlora_ref.finetune import finetune as run

    def tell(text: str) -> None:
        messages.print(escape(text), highlight=False, soft_wrap=True)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=messages, transient=True) as progress:
        task = progress.add_task("training", total=steps, visible=False)

        def on_step(log: Any) -> None:
            text = (
                f"loss {log.loss:.3f}  {log.tokens_per_second:.0f} tokens/s  "
                f"{log.resident_bytes / 1e9:.2f} GB"
            )
            progress.update(task, completed=log.step, description=text, visible=True)
            if not messages.is_terminal:
                messages.print(f"step {log.step}/{steps}  {text}", highlight=False)

        result = run(settings, output, resume, save_every, sample_prompt, tell, on_step)
    if plot:
        _plot(output)
    report = json.loads((output / "report.json").read_text())
    print_json(report) if as_json else _print_result(result)


def _parse_targets(text: str) -> str | list[str]:
    """Names separated by commas, one name among them, as a list; the rest as it is."""
    names_alone = text != "all-linear" and re.fullmatch(r"[\w.,]+", text)
    return text.split(",") if names_alone else text


def _plot(output: Path) -> None:
    from qlora_ref.plots import plot_loss

    logs = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    plot_loss(logs, output / "loss.png", "QLoRA fine-tune")


def _print_result(result: Any) -> None:
    before, after = result.before.perplexity, result.after.perplexity
    console.print(f"[bold]held-out perplexity {before:.2f} before, {after:.2f} after[/bold]")
    console.print(f"{result.after.tokens} held-out tokens; {result.lora}", soft_wrap=True)
    console.print(f"{result.tokens_per_second:.0f} tokens a second (median step)")
    console.print(str(result.memory), highlight=False, soft_wrap=True)
    if result.paging is not None:
        console.print(str(result.paging), highlight=False, soft_wrap=True)
    for when, text in result.samples.items():
        console.print(f"[bold]sample {when}[/bold] {escape(text)}", highlight=False)
    console.print(f"adapter, log and report in {escape(str(result.output))}")
