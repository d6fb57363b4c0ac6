"""The block manager shares exactly what is alike, evicts in the right order and loses no block."""

import time
from collections.abc import Callable

import pytest
import xxhash

from nanovllm.engine import block_manager
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams
from tests.simulation import interrupt_at_lines

BLOCK_SIZES = [1, 16, 256]


def sequence(token_ids: list[int]) -> Sequence:
    return Sequence("a request", 0, token_ids, SamplingParams(), max_output_tokens=64)


def tokens(num_tokens: int, seed: int = 0) -> list[int]:
    """Token ids without repetition; other seeds have none in common."""
    return list(range(seed * 100_000, seed * 100_000 + num_tokens))


def hold(manager: BlockManager, token_ids: list[int]) -> Sequence:
    """A sequence that holds blocks for its tokens, none of them computed but those it shares."""
    seq = sequence(token_ids)
    manager.take_prefix(seq, manager.match_prefix(seq))
    manager.allocate(seq, seq.num_tokens)
    return seq


def compute(manager: BlockManager, token_ids: list[int]) -> Sequence:
    """A sequence whose tokens are all computed."""
    seq = hold(manager, token_ids)
    manager.publish(seq, seq.num_tokens)
    return seq


def cached(manager: BlockManager, token_ids: list[int]) -> list[int]:
    """Blocks that a prompt which goes on after ``token_ids`` would share."""
    return manager.match_prefix(sequence([*token_ids, 0]))


@pytest.fixture
def hash_calls(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What has been hashed."""
    calls: list[bytes] = []
    digest = xxhash.xxh3_128_digest
    monkeypatch.setattr(block_manager.xxhash, "xxh3_128_digest", lambda data: calls.append(data) or digest(data))
    return calls


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_a_prompt_shares_the_full_blocks_of_the_prefix_it_has_in_common(size: int) -> None:
    manager = BlockManager(16, size)
    first = compute(manager, tokens(3 * size + size // 2))
    assert cached(manager, tokens(3 * size)) == first.block_table[:3]
    assert cached(manager, tokens(2 * size) + tokens(size, seed=1)) == first.block_table[:2]
    assert cached(manager, tokens(size, seed=1) + tokens(2 * size)) == []
    second = compute(manager, tokens(3 * size) + tokens(2 * size, seed=1))
    assert second.block_table[:3] == first.block_table[:3]
    assert not set(second.block_table[3:]) & set(first.block_table)
    manager.check_integrity([first, second])


@pytest.mark.parametrize("size", BLOCK_SIZES)
@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_a_fully_cached_prompt_leaves_its_last_token_to_compute(size: int, num_blocks: int) -> None:
    manager = BlockManager(8, size)
    compute(manager, tokens(num_blocks * size))
    exact = sequence(tokens(num_blocks * size))
    assert len(manager.match_prefix(exact)) == num_blocks - 1
    assert len(manager.match_prefix(exact)) * size < exact.num_tokens


def test_a_block_is_shared_only_when_it_is_full_and_computed() -> None:
    manager = BlockManager(8, 4)
    seq = hold(manager, tokens(12))
    for computed, shared in [(0, 0), (3, 0), (4, 1), (7, 1), (12, 3)]:
        manager.publish(seq, computed)
        assert cached(manager, tokens(12)) == seq.block_table[:shared]


def test_twins_that_run_in_one_step_keep_a_copy_each() -> None:
    manager = BlockManager(8, 4)
    twins = [hold(manager, tokens(8)) for _ in range(2)]
    for twin in twins:
        manager.publish(twin, 8)
        manager.check_integrity(twins)
    assert not set(twins[0].block_table) & set(twins[1].block_table)
    assert cached(manager, tokens(8)) == twins[0].block_table
    manager.free(twins[0])
    manager.free(twins[1])
    manager.check_integrity([])
    assert len(cached(manager, tokens(8))) == 2  # the first one's copy is still there


def test_a_twin_can_go_on_where_the_first_copy_ended() -> None:
    manager = BlockManager(8, 4)
    short, long = hold(manager, tokens(4)), hold(manager, tokens(8))
    manager.publish(short, 4)
    manager.publish(long, 8)
    assert cached(manager, tokens(8)) == [short.block_table[0], long.block_table[1]]


def test_without_prefix_caching_nothing_is_shared_or_hashed(hash_calls: list[bytes]) -> None:
    manager = BlockManager(8, 4, enable_prefix_caching=False)
    compute(manager, tokens(8))
    assert cached(manager, tokens(8)) == []
    assert hash_calls == []


def test_a_hash_collision_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_manager.xxhash, "xxh3_128_digest", lambda data: b"the same for all")
    manager = BlockManager(8, 4)
    seq = compute(manager, tokens(4) + tokens(4))
    assert cached(manager, tokens(4, seed=1)) == []
    assert cached(manager, tokens(4)) == seq.block_table[:1]
    assert cached(manager, tokens(4) + tokens(4)) == seq.block_table[:1]  # and not the same block twice


def test_two_prefixes_that_once_collided_are_told_apart_ever_after(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs, common = tokens(4), tokens(4, seed=1), tokens(4, seed=2)
    alike = {sequence(t).token_ids.tobytes() for t in (ours, theirs)}
    monkeypatch.setattr(
        block_manager.xxhash,
        "xxh3_128_digest",
        lambda data, digest=xxhash.xxh3_128_digest: digest(b"" if data in alike else data),
    )
    manager = BlockManager(8, 4)
    us = compute(manager, ours)
    them = compute(manager, theirs + common)
    assert cached(manager, ours + common) == us.block_table  # the common block was computed after other tokens
    manager.check_integrity([us, them])


def test_free_blocks_without_reusable_content_are_taken_first() -> None:
    manager = BlockManager(4, 4)
    seq = compute(manager, tokens(6))
    full, partial = seq.block_table
    manager.free(seq)
    taken = hold(manager, tokens(12, seed=1)).block_table
    assert taken[0] == partial
    assert full not in taken
    assert cached(manager, tokens(4)) == [full]


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    manager = BlockManager(3, 4)
    for seed in (1, 2, 3):
        manager.free(compute(manager, tokens(4, seed)))
    hold(manager, tokens(4, seed=4))
    assert [bool(cached(manager, tokens(4, seed))) for seed in (1, 2, 3)] == [False, True, True]


def test_using_a_cached_prefix_makes_it_recent() -> None:
    manager = BlockManager(4, 4)
    for seed in (1, 2, 3):
        manager.free(compute(manager, tokens(4, seed)))
    manager.free(hold(manager, [*tokens(4, seed=1), 0]))
    hold(manager, tokens(8, seed=4))
    assert [bool(cached(manager, tokens(4, seed))) for seed in (1, 2, 3)] == [True, False, True]


def test_the_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    manager = BlockManager(4, 4)
    seq = compute(manager, tokens(16))
    blocks = list(seq.block_table)
    manager.free(seq)
    for num_taken in (1, 2, 3, 4):
        hold(manager, tokens(4, seed=num_taken))
        assert cached(manager, tokens(16)) == blocks[: 4 - num_taken]


def test_a_block_that_somebody_holds_is_never_evicted() -> None:
    manager = BlockManager(4, 4)
    first = compute(manager, tokens(8))
    second = hold(manager, [*tokens(8), 0])
    manager.free(first)
    manager.check_integrity([second])
    assert manager.num_free_blocks == 1
    assert not set(hold(manager, tokens(4, seed=1)).block_table) & set(second.block_table)
    assert cached(manager, tokens(8)) == second.block_table[:2]


def test_a_reused_block_is_not_found_under_what_it_held_before() -> None:
    manager = BlockManager(2, 4)
    manager.free(compute(manager, tokens(8)))
    seq = hold(manager, tokens(8, seed=1))
    assert cached(manager, tokens(8)) == []
    assert cached(manager, tokens(8, seed=1)) == []  # taken, but not computed
    manager.publish(seq, 8)
    assert cached(manager, tokens(8, seed=1)) == seq.block_table


def test_blocks_to_share_are_not_counted_as_free_to_allocate() -> None:
    manager = BlockManager(6, 4)
    holder = compute(manager, tokens(4))
    manager.free(compute(manager, tokens(8)))
    matched = cached(manager, tokens(8))
    assert manager.num_free_blocks == 5
    assert manager.num_allocatable_after(matched) == 4  # one of the two is free now, the other is held anyway
    manager.check_integrity([holder])


def test_forgetting_the_prefixes_takes_nothing_from_those_who_hold_them() -> None:
    manager = BlockManager(6, 4)
    holder = compute(manager, tokens(8))
    manager.free(compute(manager, tokens(8, seed=1)))
    manager.reset_prefix_cache()
    manager.check_integrity([holder])
    assert cached(manager, tokens(8)) == cached(manager, tokens(8, seed=1)) == []
    assert len(holder.block_table) == 2
    manager.free(holder)
    manager.check_integrity([])
    assert manager.num_free_blocks == 6


def test_releasing_everything_keeps_the_prefixes() -> None:
    manager = BlockManager(6, 4)
    blocks = list(compute(manager, tokens(8)).block_table)
    hold(manager, tokens(8, seed=1))
    manager.release_everything()
    manager.check_integrity([])
    assert manager.num_free_blocks == 6
    assert cached(manager, tokens(8)) == blocks
    assert not set(hold(manager, tokens(16, seed=1)).block_table) & set(blocks)  # they are still the last to be taken


def test_releasing_everything_mends_what_an_interrupt_anywhere_left_half_changed() -> None:
    def use(manager: BlockManager) -> None:
        first = compute(manager, tokens(10))
        second = compute(manager, [*tokens(8), *tokens(8, seed=1)])
        manager.free(first)
        third = hold(manager, tokens(8, seed=2))
        manager.free(second)
        hold(manager, tokens(8, seed=3))
        manager.publish(third, 8)
        manager.reset_prefix_cache()

    managers = []

    def start() -> Callable[[], None]:
        managers.append(BlockManager(6, 4))
        return lambda: use(managers[-1])

    num_interrupts = 0
    for _ in interrupt_at_lines(start):
        manager = managers[-1]
        manager.release_everything()
        manager.check_integrity([])
        assert manager.num_free_blocks == 6
        manager.check_integrity([compute(manager, tokens(24, seed=5))])
        num_interrupts += 1
    assert num_interrupts > 40


@pytest.mark.parametrize("damage", ["leak", "wrong count", "stale prefix", "held twice"])
def test_the_integrity_check_notices(damage: str) -> None:
    manager = BlockManager(6, 4)
    seq = compute(manager, tokens(8))
    manager.check_integrity([seq])
    if damage == "leak":
        seq.block_table.pop()
    elif damage == "wrong count":
        manager._ref_counts[seq.block_table[0]] += 1
    elif damage == "stale prefix":
        manager._keys[seq.block_table[0]] = None
    elif damage == "held twice":
        seq.block_table[1] = seq.block_table[0]
    with pytest.raises(RuntimeError):
        manager.check_integrity([seq])


def test_a_block_is_hashed_once_however_often_its_sequence_waits_or_is_preempted(hash_calls: list[bytes]) -> None:
    manager = BlockManager(8, 4)
    seq = sequence(tokens(18))
    for _ in range(5):  # waits
        manager.match_prefix(seq)
    assert len(hash_calls) <= 1  # nothing is cached: the first miss settles it
    for _ in range(3):  # runs, is preempted, runs again
        manager.take_prefix(seq, manager.match_prefix(seq))
        manager.allocate(seq, seq.num_tokens)
        manager.publish(seq, 18)
        manager.free(seq)
    assert len(hash_calls) == 4


def test_taking_and_giving_back_blocks_costs_the_same_in_a_large_pool() -> None:
    def seconds(num_blocks: int) -> float:
        """Of taking and giving back cached blocks, which lie behind all other free blocks."""
        manager = BlockManager(num_blocks, 1)
        manager.free(compute(manager, tokens(8)))
        seq, matched = sequence(tokens(9)), cached(manager, tokens(8))
        assert len(matched) == 8
        best = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            for _ in range(20):
                manager.take_prefix(seq, matched)
                manager.allocate(seq, 9)
                manager.free(seq)
            best = min(best, time.perf_counter() - started)
        return best

    assert seconds(300_000) < 10 * seconds(300)
