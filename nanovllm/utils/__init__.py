"""Helpers that know nothing of the engine: logging, memory, configuration files, checkpoints."""
