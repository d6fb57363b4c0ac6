"""Workloads that have a name, and whether an engine did what one asked. Needs the standard library only."""

PRESETS = {"full": "256:100-1024:100-1024", "mini": "16:64-256:64-128"}


def check_lengths(engine: str, made: list[int], asked: list[int]) -> None:
    """RuntimeError if outputs are not as long as they were to be: speed would not be that of the workload."""
    if made != asked:
        raise RuntimeError(f"{engine} returned {sum(made)} output tokens; {sum(asked)} were asked for")


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
