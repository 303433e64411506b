"""`qlora-ref bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.markup import escape

from qlora_ref.cli.options import console, messages
from qlora_ref.dispatch import OPERATIONS
from qlora_ref.files import written_aside

if TYPE_CHECKING:
    from qlora_ref.benchmark.report import Measurement

_TARGET = "to this file; -: to standard output, and no tables"


def bench(
    operations: Annotated[str, typer.Option(help="by commas")] = ",".join(OPERATIONS),
    shapes: Annotated[
        Optional[str], typer.Option(help="NxK of the weights, by commas")  # noqa: UP045
    ] = None,
    tokens: Annotated[
        Optional[str], typer.Option(help="rows of x in a product, by commas")  # noqa: UP045
    ] = None,
    dtypes: Annotated[
        Optional[str], typer.Option(help="float32, bfloat16, float16, by commas")  # noqa: UP045
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    threads: Annotated[int, typer.Option(help="of the processor; 0: as many as torch takes")] = 0,
    repeats: Annotated[int, typer.Option(help="rounds of each case")] = 11,
    seconds: Annotated[
        float, typer.Option(help="after which a case begins no further round, once it has three")
    ] = 10.0,
    peers: Annotated[bool, typer.Option(help="other libraries, too")] = True,
    compare: Annotated[
        Optional[Path], typer.Option(help="JSON of before, to be told what changed")  # noqa: UP045
    ] = None,
    json: Annotated[Optional[str], typer.Option(help=f"JSON {_TARGET}")] = None,  # noqa: UP045
    csv: Annotated[Optional[str], typer.Option(help=f"CSV {_TARGET}")] = None,  # noqa: UP045
    markdown: Annotated[Optional[str], typer.Option(help=f"markdown {_TARGET}")] = None,  # noqa: UP045
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="roofline of the products, as PLOT.svg and PLOT.png (needs matplotlib)"),
    ] = None,
) -> None:
    """Time the operations beside other libraries; every result is checked before it is timed."""
    import torch

    from qlora_ref.benchmark.pictures import check_can_draw, roofline
    from qlora_ref.benchmark.plan import make_plan
    from qlora_ref.benchmark.report import read_measurement
    from qlora_ref.plots import save

    what = (operations, shapes, tokens, dtypes, device)
    plan = make_plan(*what, peers=peers, repeats=repeats, seconds=seconds)
    before = None if compare is None else read_measurement(compare)
    targets = {"json": json, "csv": csv, "markdown": markdown}
    if list(targets.values()).count("-") > 1:
        raise ValueError("only one of --json, --csv and --markdown can be -, standard output")
    if plot is not None:
        check_can_draw(plan.operations)
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    measurement = _measure(plan, before, targets)
    if plot is not None:
        save(roofline(measurement), plot)
    wrong = [row for row in measurement.rows if row.ours and row.seconds is None]
    if wrong:
        lines = (f"{' '.join(row.case)}, {row.name}: {row.status}, {row.why}" for row in wrong)
        raise RuntimeError("backends of this package did not pass:\n" + "\n".join(lines))


def _measure(plan: Any, before: Measurement | None, targets: dict[str, str | None]) -> Measurement:
    """Measure case by case: print each when it is done, and write the files anew."""
    import torch

    from qlora_ref.benchmark import compare
    from qlora_ref.benchmark.machine import describe_machine
    from qlora_ref.benchmark.report import Measurement, case_table

    measurement = Measurement(describe_machine(torch.device(plan.device)), [])
    for line in compare.differences(measurement.machine, before.machine) if before else []:
        messages.print(f"[yellow]not the same machine[/yellow] {escape(line)}", highlight=False)
    to_stdout = next((kind for kind, target in targets.items() if target == "-"), None)
    changes: dict[Any, compare.Change] | None = None
    for rows in plan.measure(lambda text: messages.print(escape(text), highlight=False)):
        measurement.rows.extend(rows)
        if before is not None:
            changes = compare.compare(measurement.rows, before.rows)
        if to_stdout is None:
            console.print(case_table(rows, changes))
        for kind, target in targets.items():
            if target not in (None, "-"):
                with written_aside(str(target)) as aside:
                    aside.write_text(measurement.render(kind, changes))
    if to_stdout is not None:
        print(measurement.render(to_stdout, changes), end="")
    return measurement
