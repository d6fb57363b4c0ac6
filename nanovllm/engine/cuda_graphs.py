"""Decode steps captured whole: from the residents' tables to their next tokens, one replay.

A captured step reads and writes nothing but tables that stay where they are, so the host only says which slots decode,
and only when they change. Positions, context lengths and where keys and values go are derived on the device, block
tables are read as they are at each replay, and the sampled tokens are in place before the next step starts.
"""

import bisect
import gc
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from nanovllm import kernels
from nanovllm.attention.base import AttentionBackend, DecodeMetadata
from nanovllm.config import EngineConfig
from nanovllm.engine.batch_state import NUM_PARAMS, BatchState
from nanovllm.utils.garbage import collection_paused
from nanovllm.utils.transfer import to_device

logger = logging.getLogger(__name__)

# Given a function that launches work on the device, something that launches the same work again.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


def batch_sizes(most: int) -> list[int]:
    """Numbers of rows that are captured; a batch takes the next larger one, so that every batch up to ``most`` fits.

    Small batches are captured tightly, for each row more costs them a share that shows. Rows beyond the batch read no
    keys and values, which is what large batches spend their time on.
    """
    sizes = [1, 2, 4, 8, *range(16, 257, 16), *range(288, most + 32, 32)]
    return [*(size for size in sizes if size < most), most]


def wants_graphs(config: EngineConfig, device: torch.device, backend: type[AttentionBackend]) -> bool:
    """Whether decode steps are to be captured in CUDA graphs."""
    return device.type == "cuda" and backend.can_capture and not config.enforce_eager and kernels.is_enabled("graphs")


class CudaCapture:
    """Captures CUDA graphs on the current stream, all in one memory pool.

    Graphs that share a pool may reuse each other's memory: they are replayed one after another, and nothing in the
    pool is read once a replay is over.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = self._begin()
        try:
            function()
        except BaseException:
            with suppress(Exception):  # what went wrong in ``function`` says more
                graph.capture_end()
            self._clear_up()
            raise
        try:
            graph.capture_end()
        except BaseException:
            self._clear_up()
            raise
        return graph.replay

    def _begin(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(False):  # torch makes tensors here that captures of others use as well
            # thread_local: another engine in another thread may go on using the device meanwhile.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        return graph

    def _clear_up(self) -> None:
        """After a capture that failed: torch may believe that it goes on."""
        device = torch.cuda.current_device()
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):  # not public: what is not there is not needed
            with suppress(Exception):
                getattr(torch._C, name)(device, self.pool)
        self.pool = torch.cuda.graph_pool_handle()
        with suppress(Exception):  # one that succeeds puts torch's random numbers right
            graph = self._begin()
            torch.zeros(1, device="cuda")
            graph.capture_end()
        self.pool = torch.cuda.graph_pool_handle()  # that graph's is gone with it


class DecodeGraphs:
    """Captured decode steps for every number of rows.

    Args:
        model: The model.
        attention: Its attention, with a cache.
        sampler: Draws tokens for rows that ask for nothing but a temperature.
        state: The residents' tables.
        max_rows: Largest batch; ``max_rows`` afterwards is the largest that there was memory for.
        dtype: Of the logits.
        capture: How a step is captured.

    Raises:
        Exception: A capture failed. What was captured before is freed.
    """

    def __init__(
        self,
        model: Any,
        attention: AttentionBackend,
        sampler: nn.Module,
        state: BatchState,
        max_rows: int,
        dtype: torch.dtype,
        capture: Capture,
    ) -> None:
        self.model, self.attention, self.sampler, self.state = model, attention, sampler, state
        device = state.device
        self._decode_inputs = kernels.load_or_reference("decode_inputs", device)
        self._decode_outputs = kernels.load_or_reference("decode_outputs", device)

        def buffer(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(max_rows, *shape, dtype=dtype, device=device)

        self.slots = buffer(torch.int32).fill_(-1)
        self.input_ids, self.positions, self.slot_mapping = (buffer(torch.int64) for _ in range(3))
        self.context_lengths, self.sampled = (buffer(torch.int32) for _ in range(2))
        self.params = buffer(torch.int32, state.params.shape[1])
        self.logits = buffer(dtype, model.lm_head.rows)
        self._slots_sent = [-1] * max_rows  # what ``slots`` holds
        self._replays: dict[int, Callable[[], None]] = {}
        started = time.perf_counter()
        self._capture_all(batch_sizes(max_rows), capture)
        self.sizes = sorted(self._replays)
        self.max_rows = self.sizes[-1]
        self.capture_seconds = time.perf_counter() - started

    def up_to(self, max_rows: int) -> "DecodeGraphs":
        """These, without what was captured for larger batches."""
        self.sizes = [size for size in self.sizes if size <= max_rows]
        self._replays = {size: self._replays[size] for size in self.sizes}
        self.max_rows = self.sizes[-1]
        return self

    @staticmethod
    def num_bytes(max_rows: int, num_columns: int, dtype: torch.dtype) -> int:
        """Bytes of the static buffers; ``num_columns`` of logits."""
        return max_rows * (num_columns * dtype.itemsize + 36 + 4 * NUM_PARAMS)

    def replay(self, slots: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode the sequences in ``slots``, whose tables are up to date.

        Returns:
            The sampled tokens, int32 [rows], drawn by temperature alone, and the logits [rows, vocab_size] they were
            drawn from: both are overwritten by the next replay.
        """
        rows = len(slots)
        size = self.sizes[bisect.bisect_left(self.sizes, rows)]
        wanted = slots + [-1] * (size - rows)
        if self._slots_sent[:size] != wanted:
            self._slots_sent[:size] = [-2] * size  # an interrupt before they are noted must not leave others noted
            self.slots[:size] = to_device(wanted, torch.int32, self.slots.device)
            self._slots_sent[:size] = wanted
        self._replays[size]()
        return self.sampled[:rows], self.logits[:rows]

    def _capture_all(self, sizes: list[int], capture: Capture) -> None:
        """Capture the sizes that fit, the largest first: the others then find room in its memory."""
        gc.collect()
        with collection_paused():  # what it would finalise may use the device in ways that no capture allows
            for size in reversed(sizes):
                try:
                    # Once before: kernels are compiled, and libraries set up, at their first call, which cannot be
                    # captured. No slot is named yet, so nothing is read from the tables nor written to them.
                    self._run(size)
                    self._replays[size] = capture(lambda size=size: self._run(size))  # type: ignore[misc]
                except torch.OutOfMemoryError:
                    # A small one may fail alone: few rows leave the most partial results of attention.
                    if size == sizes[0] and not self._replays:
                        raise
                    logger.warning("no memory to capture decode steps of %d rows, which run slower without", size)

    def _run(self, rows: int) -> None:
        """A decode step of the first ``rows`` of ``slots``, in static buffers."""
        state, slots, positions = self.state, self.slots[:rows], self.positions[:rows]
        metadata = DecodeMetadata(slots, self.context_lengths[:rows], state.block_tables, self.slot_mapping[:rows])
        self._decode_inputs(
            slots,
            state.num_computed,
            state.token_ids,
            state.block_tables,
            state.block_size,
            state.params,
            self.input_ids[:rows],
            positions,
            metadata.slot_mapping,
            metadata.context_lengths,
            self.params[:rows],
        )
        hidden = self.model(self.input_ids[:rows], positions, self.attention.begin_decode(metadata))
        logits = self.model.compute_share(hidden, out=self.logits[:rows])
        plain = state.plain_rows(self.params[:rows], metadata.context_lengths)  # whose next positions these are
        tokens = self.sampler(logits, plain)
        self._decode_outputs(slots, tokens, state.num_computed, state.token_ids, self.sampled[:rows])
