"""The engine: takes requests, runs steps until they are finished, and turns tokens back into text."""

import logging
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import xxhash

from nanovllm.config import EngineConfig
from nanovllm.engine.admission import AdmissionPolicy
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.intake import Intake, default_sampling_params
from nanovllm.engine.metrics import Counters, percentiles
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.parallel_runner import ParallelRunner
from nanovllm.engine.placement import resolve_device
from nanovllm.engine.prompts import Prompt
from nanovllm.engine.request import LostRequest, Owner, PreparedRequest, Request
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_handle import DeviceMemoryError, StepHandle
from nanovllm.engine.step_plan import StepPlan
from nanovllm.engine.tokenizer import load_tokenizer
from nanovllm.engine.turns import Turns
from nanovllm.models.registry import get_model_class
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.model_config import end_token_ids, load_model_config
from nanovllm.utils.text import counted

logger = logging.getLogger(__name__)

DEFAULT_MAX_MODEL_LEN = 4096


class LLMEngine:
    """Runs requests to their end, a step at a time.

    Safe to use from several threads, which take turns a step. Whatever is interrupted or fails in the middle leaves
    it empty and ready for new requests, with the prefix cache intact.

    Args:
        config: What the user asked for.

    Raises:
        ValueError: The configuration cannot be served by this checkpoint or this machine.
        FileNotFoundError: The checkpoint lacks a file.
    """

    def __init__(self, config: EngineConfig) -> None:
        started = time.perf_counter()
        self.config = config
        self.model_config = load_model_config(config.model, config.hf_overrides)
        longest = self.model_config.max_position_embeddings
        self.max_model_len = config.max_model_len or min(DEFAULT_MAX_MODEL_LEN, longest)
        if self.max_model_len > longest:
            raise ValueError(
                f"max_model_len is {self.max_model_len}, but the model has {longest} positions "
                "(max_position_embeddings); lower max_model_len, or extend the model with "
                "hf_overrides={'rope_parameters': {...}, 'max_position_embeddings': ...}"
            )
        # What can be refused quickly is refused before anything large is loaded.
        get_model_class(self.model_config.architecture)
        resolve_device(config.device)
        default_params = default_sampling_params(self.model_config)
        self.eos_token_ids = end_token_ids(self.model_config)
        self.tokenizer = None if config.skip_tokenizer_init else load_tokenizer(config.tokenizer or config.model)
        runner_class = ModelRunner if config.tensor_parallel_size == 1 else ParallelRunner
        self.runner: Any = runner_class(config, self.model_config, self.max_model_len)
        block_manager = BlockManager(
            self.runner.num_kvcache_blocks, self.runner.block_size, config.enable_prefix_caching
        )
        # A step that is replayed costs the host next to nothing, one with a prompt in it as much as launching it does.
        policy = AdmissionPolicy(max(1, self.runner.num_slots // 16)) if self.runner.graphs else AdmissionPolicy()
        self.scheduler = Scheduler(block_manager, self.runner.num_slots, self.runner.max_step_tokens, policy)
        self.intake = Intake(
            self.model_config, self.tokenizer, default_params, self.max_model_len, self.scheduler, config.max_logprobs
        )
        self.counters = Counters()
        self._requests: dict[str, Request] = {}
        self._ready: list[RequestOutput] = []  # finished, of requests without an owner
        self._lost: dict[str, LostRequest] = {}  # of requests without an owner
        self._adding: str | None = None  # a request of whose loss its own call tells
        self._in_flight: deque[_Step] = deque()  # launched, what they give not yet taken in; oldest first
        self._launching = 0.0  # seconds spent in calls that launched a step and took in none, since the last that did
        self._token_texts: dict[int, str] = {}  # of single tokens, for log-probabilities
        self._num_requests = 0
        self._num_sequences = 0
        self._aborting: list[str] = []  # to abort when the step that runs is over
        self.turns = Turns(self._drop_everything, self.runner.is_step_thread)
        self.counters.startup_seconds = time.perf_counter() - started
        logger.info(
            "ready in %.2f s: %s on %s, %s on the host, %s attention, %d KV blocks of %d tokens (%.1f MiB)",
            self.counters.startup_seconds,
            self.runner.dtype,
            self.runner.device,
            counted(self.runner.num_threads(), "thread"),
            self.runner.attention.name,
            self.runner.num_kvcache_blocks,
            self.runner.block_size,
            self.runner.kvcache_bytes() / 2**20,
        )

    @property
    def default_params(self) -> SamplingParams:
        """Sampling parameters of requests without their own: those of the checkpoint's generation_config.json."""
        return self.intake.default_params

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether any request has not ended, or :meth:`step` has still to hand it out or to say that it was lost."""
        return bool(self._ready or self._lost) or self.num_unfinished_requests > 0

    @property
    def num_unfinished_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    @property
    def unfinished_request_ids(self) -> list[str]:
        """Names of the requests that have not ended, in the order in which they were added."""
        return list(self._requests)

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None, request_id: str | None = None) -> str:
        """Check a request and queue it.

        Args:
            prompt: In any of its forms.
            params: None takes the checkpoint's defaults.
            request_id: A name of its own; a number by default.

        Returns:
            The request's id, a string.

        Raises:
            TypeError: Something has the wrong type.
            ValueError: The prompt is empty or does not fit, or the id is taken; the message says what to do.
        """
        [request] = self.intake.prepare([prompt], [params])
        if isinstance(request, Exception):
            raise request
        return self.add_prepared(request, request_id)

    def add_prepared(
        self,
        request: PreparedRequest,
        request_id: str | None = None,
        owner: Owner | None = None,
        prompt_index: int | None = None,
        leader_id: str | None = None,
    ) -> str:
        """Queue what the intake prepared, for ``owner`` or for whoever calls :meth:`step`; returns its id.

        ``leader_id`` names the request that it shares ``num_shared_tokens`` tokens with, if it is still there.
        """
        if request_id is not None and not isinstance(request_id, str):
            raise TypeError(f"request_id is {request_id!r} ({type(request_id).__name__}); it must be a string")
        with self.turns.wait(), self.turns.lock, self.turns.change():
            if request_id is None:
                request_id = str(self._num_requests)
                while request_id in self._requests:  # the user gave that name to another request
                    request_id = f"{request_id}+"
            taken = request_id in self._requests
            if not taken:
                if not self._requests:  # whatever took the device's memory may be gone
                    self.scheduler.restore_limits()
                self._num_requests += 1
                sequences = self._make_sequences(
                    request, request_id, None if leader_id is None else self._requests.get(leader_id)
                )
                tokenizer = self.tokenizer if request.params.detokenize else None
                self._requests[request_id] = Request(
                    request_id,
                    request.prompt,
                    prompt_index,
                    request.params,
                    owner,
                    tokenizer,
                    sequences,
                    self._token_texts,
                )
                self._adding = request_id
                for seq in sequences:
                    self.scheduler.add(seq)
                self._adding = None
        if taken:
            raise ValueError(f"request_id {request_id!r} is taken by a request that has not finished")
        return request_id

    def step(self) -> list[RequestOutput]:
        """Run one step.

        Returns:
            The requests that have ended, of those added with :meth:`add_request`.

        Raises:
            Exception: The step failed or was interrupted, or another call did, whose failure drops all requests. The
                engine is ready for new ones.
        """
        if self._lost:
            with self.turns.wait(), self.turns.lock:  # whoever fails may be in the middle of adding to them
                lost, self._lost = self._lost, {}
            if lost:  # no other thread's step has told them meanwhile
                one = next(iter(lost.values()))
                raise one.error(f"requests were dropped by another call that failed: {', '.join(lost)}: {one.cause!r}")
        self.advance()
        with self.turns.lock:
            ready, self._ready = self._ready, []
        return ready

    def advance(self, owner: Owner | None = None) -> None:
        """Run one step; what it gives goes to the owners of the requests. Raises as :meth:`step` does.

        For an owner for whom something came while another thread's step was waited for, nothing is run.
        """
        with self.turns.wait(), self.turns.lock, self.turns.change(is_step=owner is None):
            if owner is not None and owner.inbox:
                return
            started = time.perf_counter()
            launched = self._launch()
            if self._in_flight and (not launched or len(self._in_flight) > self.runner.overlap_depth):
                self._land(started)
            else:
                self._launching += time.perf_counter() - started
            if self._aborting:
                aborting, self._aborting = self._aborting, []
                self._abort(aborting, deferred=True)
        self.turns.make_way()

    def _launch(self) -> bool:
        """Plan the next step and hand it to the device; returns whether there was any."""
        while (plan := self.scheduler.schedule()) is not None:
            logger.debug("step: %s", plan)
            try:
                handle = self.runner.execute(plan)
            except DeviceMemoryError as error:
                self.scheduler.take_back(plan)
                if not self.scheduler.back_off(plan):
                    raise
                logger.warning(
                    "%s; going on with steps of at most %d tokens of %d sequences",
                    error,
                    self.scheduler.max_num_batched_tokens,
                    self.scheduler.max_num_running,
                )
                continue
            self._in_flight.append(_Step(plan, handle))
            return True
        return False

    def _land(self, started: float) -> None:
        """Take in what the oldest step in flight gives; the call that does so began at ``started``."""
        step = self._in_flight.popleft()
        result = step.handle.result()
        advanced = self.scheduler.update(step.plan, result)
        now = time.perf_counter()
        # Time within calls only: with steps in flight, whoever reads a stream slowly may let time pass in between.
        num_failed = sum(seq.error is not None for seq in advanced) if result.errors else 0
        self.counters.count_step(step.plan, len(advanced) - num_failed, self._launching + now - started)
        self._launching = 0.0
        if step.plan.num_prefill_tokens:  # a decode step gives nobody the first token
            for seq in advanced:
                if seq.metrics.first_token_time is None and seq.error is None:
                    seq.metrics.first_token_time = now
        # Of most sequences nobody reads the tokens before the last one is there.
        requests = self._requests
        advanced = [seq for seq in advanced if seq.finish_reason or requests[seq.request_id].is_followed]
        for seq in advanced:
            self._follow(seq, now)
        for seq in advanced:
            self._report(seq)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now, with finish reason "abort".

        Called from inside a step (a signal handler, a logits processor), it takes effect at the step's end.

        Returns:
            What the request has so far, which its owner gets too; None if no such request is unfinished.

        Raises:
            TypeError: ``request_id`` is not a string.
        """
        if not isinstance(request_id, str):
            raise TypeError(f"request_id is {request_id!r} ({type(request_id).__name__}); it must be a string")
        if self.turns.is_inside():
            self._aborting.append(request_id)
            return None
        with self.turns.wait(), self.turns.lock, self.turns.change():
            outputs = self._abort([request_id])
        return outputs[0] if outputs else None

    def abandon(self, owner: Owner) -> None:
        """Drop all requests of an owner who no longer waits for them."""
        if self.turns.is_inside():  # a generator that is collected there
            self._aborting.extend(self._requests_of(owner))
        elif not self.turns.is_closed and not self.turns.is_forked:
            with self.turns.wait(), self.turns.lock, self.turns.change():
                # Nothing is made of what they have: should we be garbage together, parts of it are finalized already.
                requests = [self._requests[request_id] for request_id in self._requests_of(owner)]
                self._end_all(requests)
                for request in requests:
                    self._forget(request)

    def reset(self) -> None:
        """Drop all requests, and outputs that :meth:`step` has not given yet. The prefix cache stays."""
        with self.turns.wait(), self.turns.lock:
            self.turns.recover()
            self._ready, self._lost = [], {}

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes."""
        with self.turns.wait(), self.turns.lock, self.turns.change():
            self.scheduler.block_manager.reset_prefix_cache()

    def close(self) -> None:
        """Drop all requests and free the model and its KV cache, whoever still holds the engine.

        In a forked process it does nothing: the engine is its parent's.
        """
        if self.turns.is_forked:
            return
        with self.turns.wait(), self.turns.lock:  # in turn, or calls in other threads may end before they hear of it
            if not self.turns.is_closed:
                self.turns.recover(RuntimeError("the engine was closed"))
                self.turns.is_closed = True
                self.runner.close()

    def metrics(self) -> dict[str, Any]:
        """Facts and totals of the engine; see :meth:`nanovllm.LLM.get_metrics`."""
        if self.turns.is_inside():  # in a thread that the one with the lock waits for, perhaps
            return self._metrics()
        self.turns.refuse_if_forked()
        with self.turns.lock:
            self.turns.refuse_if_closed()
            return self._metrics()

    def _metrics(self) -> dict[str, Any]:
        counters, runner, manager = self.counters, self.runner, self.scheduler.block_manager
        return {
            "device": str(runner.device),
            "dtype": str(runner.dtype).removeprefix("torch."),
            "quantization": self.config.quantization,
            "attention_backend": runner.attention.name,
            "num_threads": runner.num_threads(),
            "startup_seconds": counters.startup_seconds,
            "num_kvcache_blocks": manager.num_blocks,
            "kvcache_block_size": manager.block_size,
            "kvcache_bytes": runner.kvcache_bytes(),
            "num_graphs": len(runner.graphs.sizes) if runner.graphs else 0,
            "graph_bytes": runner.graph_bytes,
            "graph_capture_seconds": runner.graphs.capture_seconds if runner.graphs else 0.0,
            "kvcache_blocks_used": manager.num_used_blocks,
            "peak_kvcache_blocks_used": manager.peak_num_used_blocks,
            "waiting_requests": len({seq.request_id for seq in self.scheduler.waiting}),
            "running_requests": len({seq.request_id for seq in self.scheduler.running}),
            "output_tokens": counters.output_tokens,
            "prefill_tokens": counters.prefill_tokens,
            "decode_tokens": counters.decode_tokens,
            "prefill_seconds": counters.prefill_seconds,
            "decode_seconds": counters.decode_seconds,
            "prompt_tokens": counters.prompt_tokens,
            "cached_tokens": counters.cached_tokens,
            "prefix_hit_rate": counters.cached_tokens / counters.prompt_tokens if counters.prompt_tokens else 0.0,
            "finished_requests": counters.finished_requests,
            "num_preemptions": self.scheduler.num_preemptions,
            "time_to_first_token": percentiles(counters.first_token_seconds),
            "time_per_output_token": percentiles(counters.output_token_seconds),
        }

    def _drop_everything(self, cause: BaseException, is_told: bool) -> None:
        """Drop all requests, and tell their owners why; the next :meth:`step` is told of the others, if ``is_told``."""
        self._in_flight.clear()  # the device runs them to their end, before whatever is launched next
        self.scheduler.reset()
        self._aborting.clear()
        for request in self._requests.values():
            if request.owner is not None:
                request.owner.inbox.append(LostRequest(request.request_id, cause))
            elif is_told and request.request_id != self._adding:  # who added it sees nothing of this
                self._lost[request.request_id] = LostRequest(request.request_id, cause)
        self._requests.clear()
        self._adding = None

    def _requests_of(self, owner: Owner) -> list[str]:
        return [request.request_id for request in self._requests.values() if request.owner is owner]

    def _make_sequences(self, request: PreparedRequest, request_id: str, leading: Request | None) -> list[Sequence]:
        """A sequence a completion; the first follows that of another request, if one is given, the others the first."""
        params = request.params
        sequences: list[Sequence] = []
        for index in range(params.n):
            number, self._num_sequences = self._num_sequences, self._num_sequences + 1
            seed = params.seed
            sequences.append(
                Sequence(
                    request_id,
                    number,
                    request.prompt_token_ids,
                    params,
                    max_output_tokens=request.max_output_tokens,
                    eos_token_ids=() if params.ignore_eos else self.eos_token_ids,
                    noise_key=noise_key("request", seed, index)
                    if seed is not None
                    else noise_key("engine", self.config.seed, number),
                    arrival_time=time.perf_counter(),
                    index=index,
                    leader=sequences[0] if index else leading.sequences[0] if leading else None,
                    num_shared_tokens=len(request.prompt_token_ids) if index else request.num_shared_tokens,
                    first_logprob=None if index else request.first_logprob,
                    bad_words=request.bad_words,
                )
            )
        return sequences

    def _follow(self, seq: Sequence, now: float) -> None:
        """Take note of a sequence's newest token: its text, and whether that ends it."""
        stop = self._requests[seq.request_id].follow(seq)
        if stop is not None:
            self.scheduler.finish(seq, "stop")
            seq.finish_reason, seq.stop_reason = "stop", stop
        if seq.finished:
            seq.metrics.finished_time = now

    def _report(self, seq: Sequence) -> None:
        """Tell whoever waits for a request what is new of one of its sequences."""
        request = self._requests[seq.request_id]
        request.num_unfinished -= seq.finished
        if seq.error is not None:
            logger.warning("request %s ended with an error: %s", seq.request_id, seq.error)
        output = self._finish(request) if request.num_unfinished == 0 else None
        owner = request.owner
        if owner is not None and owner.stream:
            piece = request.stream_output(seq)
            if piece is not None:
                piece.output = output
                owner.inbox.append(piece)
        elif output is not None:
            (self._ready if owner is None else owner.inbox).append(output)

    def _finish(self, request: Request) -> RequestOutput:
        """What an ended request gives back; the engine forgets it."""
        output = request.output()
        self._forget(request)
        return output

    def _forget(self, request: Request) -> None:
        del self._requests[request.request_id]
        self.counters.count_request(request.sequences)
        if not self._requests:  # stops are seen late: what is still in flight is for nobody
            self._in_flight.clear()
            self.scheduler.forget_surplus()

    def _end_all(self, requests: list[Request]) -> list[list[Sequence]]:
        """Abort what of requests has not ended; returns those sequences of each."""
        ending = [[seq for seq in request.sequences if not seq.finished] for request in requests]
        self.scheduler.finish_all([seq for sequences in ending for seq in sequences], "abort")
        now = time.perf_counter()
        for sequences in ending:
            for seq in sequences:
                seq.metrics.finished_time = now
        return ending

    def _abort(self, request_ids: Iterable[str], deferred: bool = False) -> list[RequestOutput]:
        """End requests; what they have goes to their owners, or, ``deferred``, to the next :meth:`step`."""
        request_ids = dict.fromkeys(request_ids)
        requests = [self._requests[request_id] for request_id in request_ids if request_id in self._requests]
        outputs = []
        for request, sequences in zip(requests, self._end_all(requests), strict=True):
            output = self._finish(request)
            outputs.append(output)
            owner = request.owner
            if owner is not None and owner.stream:
                pieces = [piece for seq in sequences if (piece := request.stream_output(seq)) is not None]
                pieces[-1].output = output
                owner.inbox.extend(pieces)
            elif owner is not None:
                owner.inbox.append(output)
            elif deferred:
                self._ready.append(output)
        return outputs


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that was launched."""

    plan: StepPlan
    handle: StepHandle


def noise_key(kind: str, seed: int, index: int) -> int:
    """64-bit key of a request's sampling noise: of its own seed and sample index, or the engine's and its number."""
    return xxhash.xxh3_64_intdigest(f"{kind}:{seed}:{index}".encode())
