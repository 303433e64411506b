"""The command `qlora-ref`. A command has a name; one file of that name holds one function of it.

Each reads its options, calls one function of the package, and prints. program.py lists them;
options.py holds what they share.
"""

from qlora_ref.cli.program import app as app
from qlora_ref.cli.program import main as main
