"""The study of QLoRA's claims, as a program: the same as `qlora-ref study`.

    python benchmarks/quality.py --parts 1 --quick

What it works out and how: qlora_ref/study/.
"""

import sys

from qlora_ref.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "study")
    main()
