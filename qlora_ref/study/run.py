"""Run parts of the study one after the other; write the page and the figures."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlora_ref.files import written_aside
from qlora_ref.plots import save
from qlora_ref.plots.canvas import Figure
from qlora_ref.study import codebook_errors, fine_tuning, loss_rise, real_weights, said
from qlora_ref.study.options import Options
from qlora_ref.study.pictures import CAPTIONS, figures
from qlora_ref.study.report import Claim, Part, claims_table

STUDIES = {
    1: codebook_errors.study,
    2: real_weights.study,
    3: loss_rise.study,
    4: fine_tuning.study,
    5: said.study,
}

_HEAD = """\
# What QLoRA's claims come to

Every figure on this page was worked out or measured by `{command}`, on the CPU, on one thread. \
*t* is a difference in its standard errors; a sign counts as settled where |t| > 3. Weights, \
texts and seeds are fixed, so that a run repeats."""


@dataclass(frozen=True)
class Study:
    """What a run found; seconds of CPU that each part took, in all its processes."""

    options: Options
    parts: list[Part]
    cpu_seconds: dict[int, float]

    @property
    def claims(self) -> list[Claim]:
        """The claims of all parts."""
        return [claim for part in self.parts for claim in part.claims]

    def markdown(self, pictures: str | None = None) -> str:
        """The page; pictures is where they are, as seen from it."""
        blocks = [_HEAD.format(command=self._command())]
        if len(self.parts) > 1 and self.claims:
            blocks.append("## In short\n\n" + claims_table(self.claims).markdown())
        drawn = self.drawn() if pictures is not None else {}
        for part in self.parts:
            blocks.append(part.markdown())
            for name in drawn:
                number, caption = CAPTIONS[name]
                if number == part.number:
                    blocks.append(f"![{caption}]({pictures}/{name}.svg)")
        return "\n\n".join(blocks) + "\n"

    def _command(self) -> str:
        whole = self.options.parts == Options().parts
        parts = "" if whole else " --parts " + ",".join(str(part.number) for part in self.parts)
        return "qlora-ref study" + parts + (" --quick" if self.options.quick else "")

    def drawn(self) -> dict[str, Figure]:
        """The pictures by their names. Raises ImportError without matplotlib."""
        return figures({part.number: part.data for part in self.parts})

    def as_dict(self) -> dict[str, Any]:
        """The figures, unrounded."""
        return {
            "options": asdict(self.options),
            "torch": torch.__version__,
            "parts": [part.as_dict() for part in self.parts],
            "cpu_seconds": self.cpu_seconds,
        }

    def write(self, directory: Path, plots: Path | None = None) -> None:
        """Write study.md and study.json, each aside and then renamed; the page shows the plots."""
        shown = None if plots is None else Path(os.path.relpath(plots, directory)).as_posix()
        texts = {
            "study.md": self.markdown(shown),
            "study.json": json.dumps(self.as_dict(), indent=1) + "\n",
        }
        for name, text in texts.items():
            with written_aside(directory / name) as aside:
                aside.write_text(text, encoding="utf-8")

    def draw(self, directory: Path) -> list[str]:
        """Write the pictures, SVG and PNG; returns their names."""
        drawn = self.drawn()
        for name, figure in drawn.items():
            save(figure, directory / name)
        return list(drawn)


def run(options: Options, tell: Callable[[str], None] = lambda text: None) -> Study:
    """Run the parts that the options name; what is not installed is skipped and said."""
    parts, cpu_seconds = [], {}
    with one_thread():
        for number in sorted(set(options.parts)):
            began = _cpu_seconds()
            part = STUDIES[number](options, partial(_tell, tell, number))
            for reason in part.skipped:
                _tell(tell, number, f"skipped: {reason}")
            parts.append(part)
            cpu_seconds[number] = _cpu_seconds() - began
    return Study(options, parts, cpu_seconds)


def _cpu_seconds() -> float:
    return sum(os.times()[:4])  # of this process and of those that it has waited for


def _tell(tell: Callable[[str], None], number: int, text: str) -> None:
    tell(f"part {number}: {text}")


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order, whatever the machine: everything inside runs on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
