"""What callers may want to catch by name."""


class EngineDeadError(RuntimeError):
    """A tensor-parallel rank ended, failed or hung. The engine is closed; make a new one."""
