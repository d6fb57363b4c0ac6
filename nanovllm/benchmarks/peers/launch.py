"""Runs a module of this folder in an environment that has neither nanovllm nor what it needs.

    PYTHON launch.py run_llama
    PYTHON launch.py write_gguf CHECKPOINT FILE.gguf bf16

It is run by its path, and imports nothing of the package itself. The module's ``main()`` is called.
"""

import sys
import types
from importlib import import_module
from pathlib import Path


def launch(module: str) -> None:
    """Call ``main()`` of a module of this folder; the package's ``__init__``, which needs torch, is left out."""
    here = Path(__file__).resolve().parent
    # A script's folder comes first among those that imports are looked for in; its files must not hide others' modules.
    sys.path[:] = [folder for folder in sys.path if not folder or Path(folder).resolve() != here]
    package = types.ModuleType("nanovllm")
    package.__path__ = [str(here.parent.parent)]
    sys.modules["nanovllm"] = package
    import_module(f"nanovllm.benchmarks.peers.{module}").main()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: PYTHON launch.py MODULE [ARGUMENT ...]")
    del sys.argv[0]
    launch(sys.argv[0])
