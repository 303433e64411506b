"""Run a program with this library in the place of bitsandbytes.

python -m qlora_ref.as_bitsandbytes script.py arguments
python -m qlora_ref.as_bitsandbytes -m module arguments
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from qlora_ref.stand_in import as_bitsandbytes


def main(arguments: list[str]) -> None:
    """Run `script.py ...` or `-m module ...` as Python itself would."""
    as_module = arguments[:1] == ["-m"]
    target = arguments[int(as_module) :]
    if not target or target[0] in ("-h", "--help"):
        raise SystemExit(__doc__)
    as_bitsandbytes()
    sys.argv = target
    if as_module:
        sys.path[0] = ""
        runpy.run_module(target[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(target[0]).resolve().parent)
        runpy.run_path(target[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
