"""`python -m mopo_kernels.cli`, for launchers that start a module (torchrun -m, accelerate launch -m)."""

from __future__ import annotations

import sys

from mopo_kernels.cli import main

sys.exit(main())
