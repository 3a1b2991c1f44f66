"""Settings of the whole test run."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: its kernels then run on CPU tensors
sys.path.insert(0, str(Path(__file__).parent))  # tests share helper modules
