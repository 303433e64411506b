"""The command `qlora-ref`: each command reads its options, calls one function, prints."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from qlora_ref.settings import OPTIMIZERS, Settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="QLoRA: fine-tune a model whose frozen weights are held in 4 bits.",
)
_console = Console()
_messages = Console(stderr=True)

Model = Annotated[
    str, typer.Option(help="directory, hub name, GGUF file, or package:NAME that carries a GGUF")
]
Data = Annotated[str, typer.Option(help="text file, .jsonl of prompts and answers, or directory")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON on standard output, nothing else")]
Codebook = Annotated[str, typer.Option(help="nf4, fp4, fp4_ocp, int4, af4, nf3 or nf2")]
BlockSize = Annotated[int, typer.Option(help="values per scale")]
DoubleQuant = Annotated[bool, typer.Option(help="quantise the scales to 8 bits")]
_DEFAULT = Settings(model="", data="")


def main() -> None:
    """Run the command line; what went wrong is one line, not a traceback."""
    try:
        app()
    except (
        ValueError,
        TypeError,
        ImportError,
        OSError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        text = escape(str(error))  # a path in brackets is no markup
        _messages.print(f"[red]error:[/red] {text}", highlight=False, soft_wrap=True)
        sys.exit(1)


@app.command()
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
    from qlora_ref.finetune import finetune as run

    def tell(text: str) -> None:
        _messages.print(escape(text), highlight=False, soft_wrap=True)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=_messages, transient=True) as progress:
        task = progress.add_task("training", total=steps, visible=False)

        def on_step(log: Any) -> None:
            text = (
                f"loss {log.loss:.3f}  {log.tokens_per_second:.0f} tokens/s  "
                f"{log.resident_bytes / 1e9:.2f} GB"
            )
            progress.update(task, completed=log.step, description=text, visible=True)
            if not _messages.is_terminal:
                _messages.print(f"step {log.step}/{steps}  {text}", highlight=False)

        result = run(settings, output, resume, save_every, sample_prompt, tell, on_step)
    if plot:
        _plot(output)
    report = json.loads((output / "report.json").read_text())
    _print_json(report) if as_json else _print_result(result)


@app.command()
def evaluate(
    model: Model,
    data: Data,
    adapter: Annotated[Optional[Path], typer.Option(help="directory of an adapter")] = None,  # noqa: UP045
    codebook: Annotated[str, typer.Option(help="quantise to this first; none: as it is")] = "none",
    block_size: BlockSize = 64,
    double_quant: DoubleQuant = True,
    compute_dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    length: Annotated[int, typer.Option(help="tokens a sequence, at most")] = 512,
    sequences: Annotated[int, typer.Option(help="sequences, at most")] = 64,
    as_json: AsJson = False,
) -> None:
    """Perplexity of a model, quantised or not, with an adapter or without, on a text."""
    from qlora_ref.data import read_examples, tokenize
    from qlora_ref.evaluate import evaluate as run
    from qlora_ref.models import load_tokenizer

    examples = read_examples(data)
    tokenizer = load_tokenizer(model)
    text = tokenize(examples, tokenizer, length)[:sequences]
    loaded = _load(model, codebook, block_size, double_quant, compute_dtype)
    if adapter is not None:
        from qlora_ref.adapter import load_adapter

        load_adapter(loaded, adapter)
    found = run(loaded, text, tokenizer.pad_token_id or 0)
    report = {"loss": found.loss, "perplexity": found.perplexity, "tokens": found.tokens}
    if as_json:
        return _print_json(report)
    _console.print(
        f"perplexity {found.perplexity:.3f} ({found.loss:.4f} nats, {found.tokens} tokens)"
    )


@app.command()
def merge(
    model: Model,
    adapter: Annotated[Path, typer.Option(help="directory of an adapter")],
    output: Annotated[Path, typer.Option(help="directory to write; must not exist")],
    to: Annotated[str, typer.Option(help="float: exact; 4bit: quantised anew")] = "float",
    codebook: Annotated[str, typer.Option(help="of the base it was trained on")] = "nf4",
    block_size: BlockSize = 64,
    double_quant: DoubleQuant = True,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its 4-bit base and write the model, dense or in 4 bits."""
    from qlora_ref.adapter import load_adapter
    from qlora_ref.merging import merge_to_directory

    if output.exists():
        raise ValueError(f"{output} exists already: choose another directory")
    loaded = _load(model, codebook, block_size, double_quant, "float32")
    load_adapter(loaded, adapter)
    report = merge_to_directory(loaded, model, output, to)
    if as_json:
        return _print_json(report)
    _console.print(f"wrote {escape(str(output))}: {report['layers']} layers merged to {to}")
    if report["worst_snr_db"] is not None:
        _console.print(f"signal to quantisation noise at worst: {report['worst_snr_db']:.2f} dB")


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="checkpoint directory, safetensors file, or model")],
    original: Annotated[
        Optional[str], typer.Option(help="the unquantised model, to compare with")  # noqa: UP045
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What a checkpoint holds: shape, codebook, block size, bytes, bits per parameter, error."""
    from qlora_ref.inspection import inspect_source

    rows = inspect_source(source, original)
    if as_json:
        return _print_json([row.as_dict() for row in rows])
    table = Table(
        Column("tensor", overflow="fold"), "shape", "codebook", "block", "bytes", "bits", "SNR dB"
    )
    for row in rows:
        table.add_row(
            row.name,
            "x".join(map(str, row.shape)),
            row.codebook or row.dtype,
            str(row.block_size or ""),
            f"{row.nbytes:,}",
            f"{row.bits_per_parameter:.3f}",
            "" if row.snr_db is None else f"{row.snr_db:.2f}",
        )
    _console.print(table)
    _console.print(f"{len(rows)} tensors, {sum(row.nbytes for row in rows):,} bytes")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What was found on this machine, which backend serves each operation and why."""
    from qlora_ref.doctor import diagnose

    facts = diagnose()
    if as_json:
        return _print_json(facts)
    for section in ("machine", "packages", "tools"):
        _console.print(f"[bold]{section}[/bold]")
        for name, value in facts[section].items():
            _console.print(f"  {name:<14} {value}", highlight=False)
    for device, operations in facts["operations"].items():
        _console.print(f"[bold]operations on {device}[/bold]")
        for name, found in operations.items():
            others = [f"{b}: {why}" for b, why in found["reasons"].items() if b != found["backend"]]
            _console.print(
                f"  {name:<16} {found['backend']}  ({'; '.join(others)})", highlight=False
            )
    for line in facts["advice"]:
        _console.print(f"[yellow]advice[/yellow] {line}", highlight=False)


def _load(
    source: str, codebook: str, block_size: int, double_quant: bool, compute_dtype: str
) -> Any:
    import torch

    from qlora_ref.convert import convert_model
    from qlora_ref.models import load_model
    from qlora_ref.module4bit import layers_4bit
    from qlora_ref.settings import choose_dtype

    model = load_model(source, choose_dtype(compute_dtype, torch.device("cpu")))
    if codebook != "none" and not layers_4bit(model):
        convert_model(model, codebook, block_size, double_quant)
    return model


def _parse_targets(text: str) -> str | list[str]:
    """Names separated by commas, one name among them, as a list; the rest as it is."""
    names_alone = text != "all-linear" and re.fullmatch(r"[\w.,]+", text)
    return text.split(",") if names_alone else text


def _plot(output: Path) -> None:
    from qlora_ref.plots import plot_loss

    logs = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    plot_loss(logs, output / "loss.png", "QLoRA fine-tune")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


def _print_result(result: Any) -> None:
    before, after = result.before.perplexity, result.after.perplexity
    _console.print(f"[bold]held-out perplexity {before:.2f} before, {after:.2f} after[/bold]")
    _console.print(f"{result.after.tokens} held-out tokens; {result.lora}", soft_wrap=True)
    _console.print(f"{result.tokens_per_second:.0f} tokens a second (median step)")
    _console.print(str(result.memory), highlight=False, soft_wrap=True)
    if result.paging is not None:
        _console.print(str(result.paging), highlight=False, soft_wrap=True)
    for when, text in result.samples.items():
        _console.print(f"[bold]sample {when}[/bold] {escape(text)}", highlight=False)
    _console.print(f"adapter, log and report in {escape(str(result.output))}")


if __name__ == "__main__":
    main()
