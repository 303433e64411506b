"""What programs get that say `import bitsandbytes` under `qlora_ref.as_bitsandbytes()`.

The public 4-bit, 8-bit blockwise and optimizer names of bitsandbytes 0.50.2, each a few lines over
this library. What it does not have, LLM.int8, raises NotImplementedError. Behaviour is matched from
the outside; the code is our own.
"""

from qlora_ref.integrations.bitsandbytes import (
    autograd,
    cextension,
    functional,
    module_paths,
    nn,
    operators,
    optim,
    utils,
)
from qlora_ref.integrations.bitsandbytes.autograd import MatmulLtState, matmul, matmul_4bit

__version__ = "0.50.2"  # of the surface; the library's own is qlora_ref.__version__

features = {"multi_backend"}
supported_torch_devices = {"cpu", "cuda", "meta"}

module_paths.define(__name__)

modules, adam = nn.modules, optim.adam  # type: ignore[attr-defined]  # their older names

__all__ = [
    "MatmulLtState",
    "autograd",
    "cextension",
    "features",
    "functional",
    "matmul",
    "matmul_4bit",
    "nn",
    "operators",
    "optim",
    "supported_torch_devices",
    "utils",
]
