"""What a run of the study covers."""

from __future__ import annotations

from dataclasses import dataclass

PARTS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Options:
    """What a run of the study covers.

    parts           numbers from PARTS
    quick           a tenth of the samples, or less: minutes become seconds, standard errors grow
    model           the small language model of parts 3 and 4
    text            its text; of every ten chunks of 4,096 characters the last was held out
    fine_tune_text  what part 4 trains on
    seed            of everything random
    """

    parts: tuple[int, ...] = PARTS
    quick: bool = False
    model: str = "tests/data/tiny_llama"
    text: str = "tests/data/shakespeare.txt"
    fine_tune_text: str = "tests/data/devils_dictionary.jsonl"
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.parts) - set(PARTS))
        if unknown or not self.parts:
            raise ValueError(f"parts must be some of {PARTS}, got {self.parts}")
