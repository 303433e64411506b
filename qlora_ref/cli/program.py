"""All commands in the order in which help lists them, and what becomes of an error."""

from __future__ import annotations

import sys

import typer
from rich.markup import escape

from qlora_ref.cli.bench import bench
from qlora_ref.cli.doctor import doctor
from qlora_ref.cli.evaluate import evaluate
from qlora_ref.cli.finetune import finetune
from qlora_ref.cli.inspect import inspect
from qlora_ref.cli.memory import memory
from qlora_ref.cli.merge import merge
from qlora_ref.cli.options import messages
from qlora_ref.cli.quantize import quantize
from qlora_ref.cli.study import study

COMMANDS = (finetune, quantize, evaluate, merge, inspect, memory, study, bench, doctor)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="QLoRA: fine-tune a model whose frozen weights are held in 4 bits.",
)
for command in COMMANDS:
    app.command()(command)


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
        messages.print(f"[red]error:[/red] {text}", highlight=False, soft_wrap=True)
        sys.exit(1)
