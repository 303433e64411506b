"""as_bitsandbytes(): programs that import bitsandbytes get this library's layers."""

from __future__ import annotations

import sys


def as_bitsandbytes() -> None:
    """From now on `import bitsandbytes` gives integrations/bitsandbytes, and so does asking for it.

    For this process and the Python processes that it starts, whether or not bitsandbytes is
    installed. On the command line: `python -m qlora_ref.as_bitsandbytes script.py arguments`.

    Raises RuntimeError if bitsandbytes itself has been imported already: call this before.
    """
    from qlora_ref.integrations.stand_in import sitecustomize

    loaded = sys.modules.get(sitecustomize.NAME)
    if loaded is not None and not loaded.__name__.startswith("qlora_ref."):
        raise RuntimeError(
            "bitsandbytes is imported already: call qlora_ref.as_bitsandbytes() at the very start "
            "of the program, before transformers or peft"
        )
    sitecustomize.install()
