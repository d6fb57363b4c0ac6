"""How long torch's threads spin while they wait for one another."""

import os
import sys
from collections.abc import MutableMapping

# What says so. GNU's library, which torch has on Linux, reads it once, when torch is imported.
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
# About half a millisecond; it would be four. Where other programs use the cores, one of our threads may be waiting for
# the very core that another one spins on: with two such programs on two cores, 1,408 tokens of the demo checkpoint took
# 4.4 s, and take 0.35 s. On an idle machine nothing changes: between two kernels less time passes.
SPINS = "40000"


def spin_briefly(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let threads that wait give way sooner, unless torch is there already, or the environment says how they wait."""
    if "torch" not in sys.modules and not any(environ.get(name) for name in VARIABLES):
        environ["GOMP_SPINCOUNT"] = SPINS


def as_it_was(environ: MutableMapping[str, str]) -> dict[str, str]:
    """An environment for other programs: without what :func:`spin_briefly` has put there."""
    return {name: value for name, value in environ.items() if (name, value) != ("GOMP_SPINCOUNT", SPINS)}
