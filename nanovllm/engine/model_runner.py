"""Runs plans: the model, its KV cache and the batch state of one rank."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch

from nanovllm import kernels
from nanovllm.attention import AttentionSpec, select_backend
from nanovllm.attention.base import AttentionMetadata
from nanovllm.attention.cpu import CpuAttention
from nanovllm.config import EngineConfig
from nanovllm.engine.batch_state import BatchState, StepInput
from nanovllm.engine.cuda_graphs import Capture, CudaCapture, DecodeGraphs, wants_graphs
from nanovllm.engine.drawing import Drawing
from nanovllm.engine.kv_sizing import KVSizing
from nanovllm.engine.placement import resolve_device, resolve_dtype
from nanovllm.engine.recorded_steps import RecordedSteps
from nanovllm.engine.step_handle import DeviceMemoryError, StepHandle
from nanovllm.engine.step_plan import SlotEntry, StepPlan
from nanovllm.layers.parallel import ParallelGroup
from nanovllm.layers.product import Int8Weight, pack_weights
from nanovllm.layers.sampler import Sampler, SamplingRows, ShardedSampler
from nanovllm.models.registry import get_model_class
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils import huge_pages
from nanovllm.utils.loader import load_weights
from nanovllm.utils.memory import free_memory, held_memory, is_out_of_memory, memory_summary, must_fit
from nanovllm.utils.model_config import ModelConfig
from nanovllm.utils.threads import ThreadLimit
from nanovllm.utils.transfer import settle_mps

logger = logging.getLogger(__name__)

# Most tokens of a step on the CPU: with more, the activations no longer fit the caches. 2,528 prompt tokens of
# Qwen3-0.6B in bfloat16 took 7.3 s in steps of 512 and 8.6 s in one (2 Zen 4 cores).
CPU_STEP_TOKENS = 512

# What the size of the residents' tables, and of a KV cache that is sized for them, goes with.
RESIDENTS = ("max_num_seqs", "max_model_len")


class ModelRunner:
    """Loads a model onto a device and runs steps of it.

    Args:
        config: The engine's configuration.
        model_config: The checkpoint's.
        max_model_len: Most tokens of a sequence.
        parallel: Which share of the model it holds.
        agree: Given a number of its own, the least that any rank has.

    Raises:
        ValueError: The device, dtype, architecture or backend cannot be had, or memory is too small.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        max_model_len: int,
        parallel: ParallelGroup = ParallelGroup(),  # noqa: B008  # it is frozen
        agree: Callable[[int], int] = lambda number: number,
    ) -> None:
        self.parallel, self._agree = parallel, agree
        self.config = config
        self.model_config = model_config
        self.max_model_len = max_model_len
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, model_config, self.device)
        # A stream of our own: steps run in order whichever thread launches them, in whatever context of the caller's.
        self._stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            elsewhere = "end other processes on the device, or choose another device"
            with must_fit(self.device, "what CUDA itself keeps there for a process", elsewhere):
                self._stream = _take_stream(self.device)
        self._threads = ThreadLimit(parallel.size) if self.device.type == "cpu" else None
        self.graphs: DecodeGraphs | None = None
        self.graph_bytes = 0
        self.recorded: RecordedSteps | None = None
        self._logits: torch.Tensor | None = None
        # Whether the device runs behind the host, which must then wait for nothing on the way of a step.
        self._runs_behind = self.device.type in ("cuda", "mps")
        # One at a time: profiling, and what others capture, disturb each other.
        lock = _construction if self._stream is not None else nullcontext()
        with lock, self._on_device(), self._as_asked():
            self._load()
            self._agree(0)  # all have loaded: what follows waits for others no longer than a step may
            self._allocate()
            self._agree(0)  # all have room: a rank that has none is heard of here, not missed in a sum
            if self.device.type == "cuda":
                self.warm_up()
            if self._wants_graphs():
                self.capture_graphs(CudaCapture())
                rows = self._agree(self.graphs.max_rows if self.graphs else 0)  # ranks replay together or not at all
                if self.graphs is not None:
                    self.graphs = self.graphs.up_to(rows) if rows else None
            alone = parallel.size == 1  # what ranks send each other is not recorded
            is_recorded = alone and not config.enforce_eager and kernels.is_enabled("graphs")
            if is_recorded and isinstance(self.attention, CpuAttention):
                self.recorded = RecordedSteps(self.model, self.attention, self.num_slots)
            kernels.finish_compiling(self.device)
        # Steps in flight before the results of the first are taken in. The CPU would gain nothing: it is the device.
        self.overlap_depth = 1 if self._runs_behind and kernels.is_enabled("overlap") else 0

    def _load(self) -> None:
        """Choose the attention backend, and load the model."""
        config, model_config = self.config, self.model_config
        parallel = self.parallel
        model_class = get_model_class(model_config.architecture)
        spec = AttentionSpec(
            num_layers=model_config.num_hidden_layers,
            num_heads=model_config.num_attention_heads // parallel.size,
            num_kv_heads=max(1, model_config.num_key_value_heads // parallel.size),
            head_dim=model_config.head_dim,
            dtype=self.dtype,
            device=self.device,
            block_size=config.kvcache_block_size,
        )
        if config.quantization == "int8" and (reason := Int8Weight.why_not(self.dtype, self.device)) is not None:
            raise ValueError(f"quantization is 'int8', but {reason}")
        backend_class = select_backend(config.attention_backend, spec)
        self.block_size = config.kvcache_block_size or backend_class.default_block_size
        self.attention = backend_class(replace(spec, block_size=self.block_size))
        reason = kernels.why_not_fused(self.device)
        if reason is not None:
            logger.warning(
                "torch's operators replace the fused kernels on %s, which is slower: %s", self.device, reason
            )
        self.sizing = KVSizing(
            config,
            model_config,
            parallel,
            self.device,
            self.dtype,
            self.max_model_len,
            self.block_size,
            self.attention.bytes_per_token(),
            captures=self._wants_graphs(),
            held_before=held_memory(self.device),
        )
        self.sizing.check_tables()
        started = time.perf_counter()
        elsewhere = "end other processes on the device, choose a smaller dtype or another device"
        with must_fit(self.device, f"the weights of {model_config.path} in {self.dtype}", elsewhere):
            self.model = model_class(model_config, self.max_model_len, parallel, self.dtype, self.device)
            self.sampler = Sampler(model_config.vocab_size, self.device)  # now: its kernels, too, take time to compile
            load_weights(self.model, model_config.path, self.model.resolve_weight)
            self.model.eval()
            pack_weights(self.model, config.quantization)
            self.plain_sampler = self.sampler
            if parallel.size > 1:
                self.plain_sampler = ShardedSampler(self.model.lm_head.rows, self.device, parallel)
        logger.info("loaded %s in %.2f s", model_config.path, time.perf_counter() - started)

    def _allocate(self) -> None:
        """Size and allocate the KV cache, and the batch state."""
        budget = self.config.max_num_batched_tokens
        self.max_step_tokens = min(budget, CPU_STEP_TOKENS) if self.device.type == "cpu" else budget
        self.num_kvcache_blocks = blocks = self._agree(self._size_kv_cache())
        is_given = self.config.num_kvcache_blocks is not None
        remedy = self.sizing.remedy(*(() if is_given else RESIDENTS), num_blocks=blocks)
        with must_fit(self.device, f"a KV cache of {blocks} blocks, {self.kvcache_bytes():,} bytes", remedy):
            self.attention.allocate_cache(blocks)
        self.num_slots = min(self.sizing.num_slots, blocks)
        apart = self._runs_behind or self.parallel.size > 1  # the CPU draws row by row anyway
        remedy = self.sizing.remedy(*RESIDENTS, num_blocks=blocks)
        with must_fit(self.device, f"the tables of {self.num_slots} sequences beside the KV cache", remedy):
            self.batch_state = BatchState(
                self.num_slots, self.max_model_len, self.block_size, self.model_config.vocab_size, self.device
            )
            self.drawing = Drawing(self.model, self.batch_state, self.sampler, self.plain_sampler, self.parallel, apart)

    def warm_up(self) -> None:
        """Run prompts and a token after each, so that no request waits for kernels, which are compiled at first use.

        In each way of sampling, and of each number of rows, and of tokens, that has variants of its own.

        Raises:
            ValueError: There is no memory for it.
        """
        remedy = self.sizing.remedy(*RESIDENTS, num_blocks=self.num_kvcache_blocks)
        with must_fit(self.device, "a few small steps beside the KV cache", remedy):
            self._warm_up()

    @torch.inference_mode()
    def _warm_up(self) -> None:
        length = min(17, self.num_kvcache_blocks * self.block_size, self.max_model_len) - 2
        if length < 1:
            return
        blocks = list(range(-(-(length + 1) // self.block_size)))  # for all rows: what they hold is of no interest
        plain, bounded = SamplingParams(), SamplingParams(top_k=20, top_p=0.95)
        few = range(1, kernels.FEW_ROWS + 1)
        batches = [([length] * rows, plain) for rows in few if rows <= self.num_slots]
        batches += [([tokens], plain) for tokens in few if tokens <= length]
        ways = bounded, SamplingParams(top_p=0.5), SamplingParams(top_p=0.5, min_p=0.01)
        batches += [([length], params) for params in ways]
        for lengths, params in batches:
            slots, starts, samples = list(range(len(lengths))), [0] * len(lengths), [True] * len(lengths)
            entered = [
                SlotEntry(slot, [0] * tokens, blocks, params, noise_key=0, num_prompt_tokens=tokens)
                for slot, tokens in enumerate(lengths)
            ]
            prompts = StepPlan([], entered, [], slots, starts, lengths, samples, sum(lengths))
            decode = StepPlan([], [], [], slots, lengths, [1] * len(lengths), samples)
            for plan in (prompts, decode):
                self._execute(plan).result()
            self.batch_state.apply(StepPlan(released=slots))
        self.attention.warm_up()

    def _wants_graphs(self) -> bool:
        return wants_graphs(self.config, self.device, type(self.attention))

    @torch.inference_mode()
    def capture_graphs(self, capture: Capture) -> None:
        """Capture decode steps; should that fail, they are launched operation by operation as before."""
        before = free_memory(self.device)
        try:
            self.graphs = DecodeGraphs(
                self.model, self.attention, self.plain_sampler, self.batch_state, self.num_slots, self.dtype, capture
            )
        except Exception as error:  # whatever the driver objects to, the engine works without
            self.graphs = None
            logger.warning(
                "decode steps could not be captured in CUDA graphs and run slower without (enforce_eager=True does not "
                "try): %s: %s",
                type(error).__name__,
                error,
            )
            return
        self.graph_bytes = max(0, before - free_memory(self.device))
        logger.info(
            "captured decode steps of %d sizes up to %d rows in %.2f s and %.0f MiB",
            len(self.graphs.sizes),
            self.graphs.max_rows,
            self.graphs.capture_seconds,
            self.graph_bytes / 2**20,
        )

    def is_step_thread(self) -> bool:
        """Whether steps run in a thread of their own, and the caller is in it."""
        return False

    def execute(self, plan: StepPlan) -> StepHandle:
        """Apply a plan's changes, run its rows, and sample. Returns without waiting for the device.

        Raises:
            DeviceMemoryError: The step does not fit the device's memory. The plan can be taken back.
        """
        try:
            if self._stream is not None and any(entry.params.logits_processors for entry in plan.entered):
                # They may hold tensors that the caller's stream is still to compute.
                self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with _InferenceMode(True), self._on_device(), self._as_asked():
                return self._execute(plan)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            message = (
                f"a step of {plan.num_tokens} tokens of {len(plan.slots)} sequences does not fit the memory of "
                f"{self.device}: {memory_summary(self.device)} (lower gpu_memory_utilization, "
                "max_num_batched_tokens or max_num_seqs, or end other processes on the device)"
            )
            raise DeviceMemoryError(message) from error

    def _execute(self, plan: StepPlan) -> StepHandle:
        state = self.batch_state
        state.apply(plan)
        if self.graphs is not None and plan.is_decode and len(plan.slots) <= self.graphs.max_rows:
            return self._replay(self.graphs, plan)
        step = state.step_input(plan)
        rows = None if step.prompt_logprobs else step.hidden_rows
        hidden = self._forward(step, rows)
        prompt_logprobs = {row.row: self.drawing.prompt_logprobs(hidden, row) for row in step.prompt_logprobs}
        places = step.places
        if places is None:
            return StepHandle(None, prompt_logprobs=prompt_logprobs)
        if rows is None:
            hidden = hidden.index_select(0, step.hidden_rows)  # no other rows have logits
        logits = self.model.compute_share(hidden, self._logits_buffer(len(hidden)))
        return self.drawing.draw(logits, places, prompt_logprobs)

    def _forward(self, step: StepInput, rows: torch.Tensor | None) -> torch.Tensor:
        """Hidden states of a step's tokens, or of those that ``rows`` int64 [n] names in ascending order."""
        tokens = len(step.token_ids)
        if rows is not None and len(rows) == tokens:
            rows = None
        if self.recorded is not None and tokens == len(step.attention.query_lengths):
            hidden = self.recorded.forward(step.token_ids, step.positions, step.attention)
            if hidden is not None:
                return hidden if rows is None else hidden.index_select(0, rows)
        return self.model(step.token_ids, step.positions, self.attention.begin_step(step.attention), rows)

    def _logits_buffer(self, rows: int) -> torch.Tensor | None:
        """Where logits go; None for new memory.

        On the CPU it is kept from step to step: 64 rows of Qwen3's are 39 MB, and fresh pages for them, step by step,
        cost as much as the product itself.
        """
        if self.device.type != "cpu":
            return None
        if self._logits is None or len(self._logits) < rows:
            self._logits = huge_pages.empty((rows, self.model.lm_head.rows), torch.float32)
        return self._logits[:rows]

    def _replay(self, graphs: DecodeGraphs, plan: StepPlan) -> StepHandle:
        """A decode step in one piece."""
        tokens, logits = graphs.replay(plan.slots)
        return self.drawing.draw_again(tokens, logits, plan.slots, max(plan.starts) + 1, {})

    def _on_device(self) -> AbstractContextManager[Any]:
        """Where this runner does everything, construction included: its stream on CUDA, its threads on the CPU."""
        if self._threads is not None:
            return self._threads
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _as_asked(self) -> AbstractContextManager[Any]:
        """The dtypes that were asked for, whatever the caller's autocast makes of its own operations."""
        if torch.is_autocast_enabled(self.device.type):
            return torch.autocast(self.device.type, enabled=False)
        return nullcontext()

    def close(self) -> None:
        """Free the model, the KV cache and the batch state. Nothing can be run afterwards."""
        if self._stream is not None:
            with suppress(RuntimeError):  # a device that has failed cannot be waited for
                self._stream.synchronize()
        self.graphs = self.recorded = self._logits = None
        if self.device.type == "mps":
            settle_mps()
        del self.model, self.attention, self.batch_state, self.drawing, self.sampler, self.plain_sampler
        if self.device.type == "mps":
            torch.mps.empty_cache()
        if self._stream is not None:
            with suppress(RuntimeError):
                torch.cuda.empty_cache()
            _idle_streams.setdefault(self.device, []).append(self._stream)
            self._stream = None

    def num_threads(self) -> int:
        """Threads of the host that torch computes with in a step."""
        return torch.get_num_threads() if self._threads is None else self._threads.num_threads()

    def kvcache_bytes(self) -> int:
        """Size of the KV cache."""
        return self.num_kvcache_blocks * self.block_size * self.attention.bytes_per_token()

    def _size_kv_cache(self) -> int:
        """Blocks of the KV cache."""
        return self.sizing.num_blocks(self._profile_activations)

    def _profile_activations(self) -> int:
        """Bytes a worst-case step takes on a CUDA device beyond the weights: a full budget of prompt tokens."""
        remedy = self.sizing.remedy("max_num_batched_tokens", *RESIDENTS)
        tokens = self.config.max_num_batched_tokens
        with must_fit(self.device, f"the largest step, of {tokens} tokens, beside the weights", remedy):
            return self._peak_activations()

    @torch.inference_mode()
    def _peak_activations(self) -> int:
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        logits = self.run_without_cache(self.config.max_num_batched_tokens)
        self.sampler(logits, SamplingRows.worst_case(len(logits), self.device))
        torch.cuda.current_stream(self.device).synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def run_without_cache(self, num_tokens: int) -> torch.Tensor:
        """Run ``num_tokens`` tokens as prompts of at most ``max_model_len``; logits of the first ``max_num_seqs``."""
        lengths = [self.max_model_len] * (num_tokens // self.max_model_len)
        if num_tokens % self.max_model_len:
            lengths.append(num_tokens % self.max_model_len)
        positions = torch.cat([torch.arange(n, device=self.device) for n in lengths])
        nowhere = torch.zeros(len(lengths), 0, dtype=torch.int64, device=self.device)
        metadata = AttentionMetadata(lengths, list(lengths), nowhere, torch.zeros_like(positions))
        hidden = self.model(torch.zeros_like(positions), positions, self.attention.begin_step(metadata))
        rows = min(self.config.max_num_seqs, num_tokens)
        return self.model.compute_logits(hidden[:rows])


# torch.inference_mode is Python, and interrupted on its way out it leaves the caller's thread in that mode. The guard
# inside it is not public, but cannot be interrupted.
_InferenceMode: Any = getattr(torch._C, "_InferenceMode", torch.inference_mode)

_construction = threading.Lock()

# Streams of engines that were closed, for the next ones: cuBLAS keeps a workspace of some MiB for each it was used on.
_idle_streams: dict[torch.device, list[torch.cuda.Stream]] = {}


def _take_stream(device: torch.device) -> torch.cuda.Stream:
    try:
        return _idle_streams[device].pop()
    except (KeyError, IndexError):
        return torch.cuda.Stream(device)
