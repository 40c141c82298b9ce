"""What ships inside the package: the tiny base model and the demo data. Made by scripts/embedded/."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

_HERE = Path(__file__).resolve().parent


def tiny_path() -> Path:
    """The folder of the tiny base, as Hugging Face's save_pretrained lays it out."""
    return _HERE / "tiny"


def demo_path(split: Literal["train", "eval"]) -> Path:
    """The CSV file of the demo's training or held-out rows: columns owner, mr, ref."""
    return _HERE / "demo" / f"{split}.csv"
