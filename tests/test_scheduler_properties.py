"""Whatever the workload, the scheduler loses nothing, shares nothing wrongly and keeps its limits.

Random workloads run on a simulated device that checks every key and value it reads (``tests/simulation.py``), with
the books checked after every operation. ``SCHEDULES`` of them with the real hash of prefixes, and ``COLLIDING`` with
a hash so weak that most blocks collide.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanovllm.engine import block_manager, scheduler
from nanovllm.engine.admission import AdmissionPolicy
from tests.simulation import VOCAB_SIZE, Simulation

SCHEDULES = 1000  # with COLLIDING: the number of generated schedules
COLLIDING = 400

# derandomize: the same workloads on every machine; a failure elsewhere is a failure here.
checked = settings(deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])

# What prompts are cut from, so that they share prefixes and repeat blocks within themselves.
TEXTS = [[1] * 80, [1, 2, 3, 4] * 20, [1] * 3 + [2] * 3 + [1] * 74, [5, 0, 6, 0, 3] * 16]


@dataclass(frozen=True)
class Workload:
    """An engine's limits, and what happens to it: kinds of operations, each with bytes that give the details."""

    limits: dict[str, Any]
    headroom: int  # a small one makes preemptions common
    operations: list[tuple[str, bytes]]


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    limits = {
        "block_size": draw(st.sampled_from([1, 2, 3, 16])),
        "num_blocks": draw(st.one_of(st.integers(2, 4), st.integers(5, 40))),
        "max_num_seqs": draw(st.integers(1, 5)),
        "max_num_batched_tokens": draw(st.sampled_from([1, 7, 64])),
        "enable_prefix_caching": draw(st.sampled_from([True, True, True, False])),
        "depth": draw(st.integers(0, 2)),  # 1 is overlap
        "policy": draw(st.builds(AdmissionPolicy, st.integers(1, 5), st.sampled_from([0, 3, 32]), st.booleans())),
    }
    kinds = ["add"] * 9 + ["step"] * 9 + ["launch", "launch", "land", "land", "abort", "fail", "forget prefixes"]
    kinds += ["abort many", "reset", "refuse"]
    operation = st.tuples(st.sampled_from(kinds), st.binary(min_size=4, max_size=4))
    return Workload(limits, draw(st.sampled_from([0, 16])), draw(st.lists(operation, min_size=10, max_size=50)))


def perform(simulation: Simulation, kind: str, details: bytes) -> None:
    """Do one thing to the engine."""
    a, b, c, d = details
    if kind == "add":
        longest = simulation.scheduler.max_tokens_per_sequence()
        ending = [token % VOCAB_SIZE for token in (a, b, c)[: d % 4]]
        prompt = (TEXTS[a % len(TEXTS)][: 1 + (b + 5) % 50] + ending)[: max(1, (longest - 1) // (4 - d // 64))]
        most = min(60, longest - len(prompt))
        max_tokens = most - c % most
        eos = [(), (0,), (0, 1)][d % 3]
        first_logprob = 1 + b % len(prompt) if a % 5 == 0 else None
        leader = simulation.add(prompt, max_tokens, eos=eos, noise_key=c % 2, first_logprob=first_logprob)
        for index in range(max(0, b % 8 - 4)):  # further completions of the prompt
            simulation.add(prompt, max_tokens, eos=eos, noise_key=2 + index, leader=leader)
    elif kind == "step":
        simulation.step()
    elif kind == "launch" and len(simulation.in_flight) <= simulation.depth:
        simulation.launch()
    elif kind == "land" and simulation.in_flight:
        simulation.land()
    elif kind == "abort" and simulation.sequences:
        simulation.abort(simulation.sequences[-1 - a % min(6, len(simulation.sequences))])
    elif kind == "fail" and simulation.in_flight:
        simulation.land(failing=a)
    elif kind == "abort many":
        simulation.abort(*simulation.sequences[-1 - a % 6 :: 2])
    elif kind == "forget prefixes":
        simulation.manager.reset_prefix_cache()
        simulation.scheduler.check_integrity()
    elif kind == "refuse" and len(simulation.in_flight) <= simulation.depth:
        simulation.refuse()
    elif kind == "reset" and a < 100:
        simulation.reset()


def run(workload: Workload) -> Simulation:
    """Run a workload to its end and check what must hold."""
    simulation = Simulation(**workload.limits)
    with mock.patch.object(scheduler, "HEADROOM_TOKENS", workload.headroom):
        for kind, details in workload.operations:
            perform(simulation, kind, details)
        simulation.run()
    simulation.check_finished()
    assert simulation.first_tokens == sorted(simulation.first_tokens), "served out of order"
    return simulation


@settings(checked, max_examples=SCHEDULES)
@given(workloads())
def test_any_workload_is_served_in_order_within_limits_and_with_the_right_tokens(workload: Workload) -> None:
    hashed: list[bytes] = []

    def digest(data: bytes) -> bytes:
        hashed.append(data)
        return xxhash.xxh3_128_digest(data)

    with mock.patch.object(block_manager, "xxhash", SimpleNamespace(xxh3_128_digest=digest)):
        simulation = run(workload)
    full_blocks = sum(seq.num_tokens // simulation.manager.block_size for seq in simulation.sequences)
    assert len(hashed) <= full_blocks, "a block was hashed twice"


@settings(checked, max_examples=COLLIDING)
@given(workloads(), st.integers(1, 3))
def test_colliding_hashes_never_give_a_sequence_the_kv_of_another_prefix(workload: Workload, num_hashes: int) -> None:
    def digest(data: bytes) -> bytes:
        return bytes([xxhash.xxh3_64_intdigest(data) % num_hashes])

    with mock.patch.object(block_manager, "xxhash", SimpleNamespace(xxh3_128_digest=digest)):
        run(workload)
