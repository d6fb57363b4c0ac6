"""The bundled demo checkpoint: a real, trained, tiny Qwen3 that answers short questions offline."""

from pathlib import Path

DEMO_MODEL_PATH = str(Path(__file__).resolve().parent)

__all__ = ["DEMO_MODEL_PATH"]
