"""Has Triton interpret kernels on CPU in this process. Import it before anything of megatronish.kernels.triton."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"
