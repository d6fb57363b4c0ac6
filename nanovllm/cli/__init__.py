"""The ``nanovllm`` command: a subcommand a module."""

from nanovllm.cli.main import main

__all__ = ["main"]
