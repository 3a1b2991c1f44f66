"""``python scripts/gpu_check``."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(
        Path(__file__).resolve().parents[1]
    )  # the folder that holds the package, instead of the package itself
    from gpu_check.cli import main

    sys.exit(main())
