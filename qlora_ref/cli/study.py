"""`qlora-ref study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.markdown import Markdown
from rich.markup import escape

from qlora_ref.cli.options import AsJson, console, messages, print_json
from qlora_ref.study.options import PARTS, Options

_DEFAULT = Options()


def study(
    parts: Annotated[
        str,
        typer.Option(
            help="1 errors of codebooks, 2 real weights, 3 loss of a small model, "
            "4 fine-tuning, 5 what is said and what is so"
        ),
    ] = ",".join(map(str, PARTS)),
    quick: Annotated[
        bool, typer.Option("--quick", help="fewer samples: about a minute, wider errors")
    ] = False,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="directory for study.md and study.json"),
    ] = None,
    plots: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="directory for pictures, SVG and PNG (needs matplotlib)"),
    ] = None,
    model: Annotated[str, typer.Option(help="small model of parts 3 and 4")] = _DEFAULT.model,
    text: Annotated[str, typer.Option(help="its text, held out in part")] = _DEFAULT.text,
    fine_tune_text: Annotated[
        str, typer.Option(help="what part 4 trains on")
    ] = _DEFAULT.fine_tune_text,
    seed: Annotated[int, typer.Option(help="of everything random")] = _DEFAULT.seed,
    as_json: AsJson = False,
) -> None:
    """Work out or measure what QLoRA's claims come to; say which hold, and how strongly."""
    if plots is not None:
        import matplotlib  # noqa: F401  # fails now if it is missing, not after the study
    from qlora_ref.study.run import run

    try:
        chosen = tuple(int(part) for part in parts.split(","))
    except ValueError as error:
        raise ValueError(f"parts must be numbers with commas, as 1,3, got {parts!r}") from error
    options = Options(chosen, quick, model, text, fine_tune_text, seed)
    found = run(options, lambda line: messages.print(escape(line), highlight=False))
    if plots is not None:
        messages.print(f"drew {', '.join(found.draw(plots))} in {escape(str(plots))}")
    if output is not None:
        found.write(output, plots)
    if as_json:
        print_json(found.as_dict())
    elif output is None:
        console.print(Markdown(found.markdown()))
    else:
        console.print(f"wrote study.md and study.json to {escape(str(output))}")
