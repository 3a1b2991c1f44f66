"""Where the tests find verl and OpenRLHF: scripts/peers.sh installs them beside the environment, not into it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from absent import absent

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv" / "peers"


def need(name):
    """Have `name` importable. Where it is not installed a CI run fails, and any other skips."""
    os.environ.setdefault("VERL_USE_EXTERNAL_PLUGINS", "none")  # in this process the tests say when verl is patched
    if importlib.util.find_spec(name) is None and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))  # after everything else: only what the environment lacks comes from there
        importlib.invalidate_caches()
    if importlib.util.find_spec(name) is None:
        absent(f"{name} is not installed: scripts/peers.sh", module=True)


def environment(*folders, **variables):
    """Return the environment of a process that imports verl: its folder before everything else, one thread."""
    path = os.pathsep.join(map(str, [*folders, ROOT, FOLDER]))
    quiet = {"OMP_NUM_THREADS": "1", "RAY_DISABLE_IMPORT_WARNING": "1", "TOKENIZERS_PARALLELISM": "false"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")}
    return {**inherited, "PYTHONPATH": path, **quiet, **variables}


def python(*arguments, env, timeout=240):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=env, capture_output=True, text=True, timeout=timeout, check=False
    )
