"""What callers may want to catch by name."""


class EngineDeadError(RuntimeError):
    """A tensor-parallel rank ended, failed or hung; the message says which, and why.

    It is raised by every call that is going on, in whatever thread, within seconds. No process is left; close the
    ``LLM`` and make a new one.
    """
