"""Run parts of the study one after the other; write the page and the figures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlora_ref.files import written_aside
from qlora_ref.study import codebook_errors, fine_tuning, loss_rise, real_weights, said
from qlora_ref.study.options import Options
from qlora_ref.study.pictures import draw
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
    """What a run found."""

    options: Options
    parts: list[Part]
    seconds: dict[int, float]

    @property
    def claims(self) -> list[Claim]:
        """The claims of all parts."""
        return [claim for part in self.parts for claim in part.claims]

    def markdown(self) -> str:
        """The page."""
        parts = ",".join(str(part.number) for part in self.parts)
        whole = self.options.parts == Options().parts
        command = "qlora-ref study" + ("" if whole else f" --parts {parts}")
        command += " --quick" if self.options.quick else ""
        blocks = [_HEAD.format(command=command)]
        if len(self.parts) > 1 and self.claims:
            blocks.append("## In short\n\n" + claims_table(self.claims).markdown())
        blocks += [part.markdown() for part in self.parts]
        return "\n\n".join(blocks) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """The figures, unrounded."""
        return {
            "options": asdict(self.options),
            "torch": torch.__version__,
            "parts": [part.as_dict() for part in self.parts],
            "seconds": self.seconds,
        }

    def write(self, directory: Path) -> None:
        """Write study.md and study.json, each aside and then renamed."""
        texts = {
            "study.md": self.markdown(),
            "study.json": json.dumps(self.as_dict(), indent=1) + "\n",
        }
        for name, text in texts.items():
            with written_aside(directory / name) as aside:
                aside.write_text(text)

    def draw(self, directory: Path) -> list[str]:
        """Write the pictures; returns their names. Raises ImportError without matplotlib."""
        return draw({part.number: part.data for part in self.parts}, directory)


def run(options: Options, tell: Callable[[str], None] = lambda text: None) -> Study:
    """Run the parts that the options name; what is not installed is skipped and said."""
    parts, seconds = [], {}
    with one_thread():
        for number in sorted(set(options.parts)):
            began = time.perf_counter()
            part = STUDIES[number](options, partial(_tell, tell, number))
            for reason in part.skipped:
                _tell(tell, number, f"skipped: {reason}")
            parts.append(part)
            seconds[number] = time.perf_counter() - began
    return Study(options, parts, seconds)


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
