"""Where the host's time goes within steps: functions of the engine and of the model, timed without what they call."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from nanovllm.diagnostics.replacing import replaced
from nanovllm.engine.request import Request
from nanovllm.engine.step_handle import StepHandle
from nanovllm.engine.step_plan import StepPlan
from nanovllm.llm import LLM

ENGINE, BETWEEN = "rest of the engine", "between operations"
# In the order of a step; what is not of the model is host work whatever the device.
HOST_PARTS = ("schedule", "batch state", "attention layout")
MODEL_PARTS = (
    "embedding",
    "rotary",
    "norms",
    "qkv_proj",
    "attention",
    "o_proj",
    "mlp gate_up",
    "mlp activation",
    "mlp down",
    "lm_head",
    "sampling",
)
PARTS = (*HOST_PARTS, *MODEL_PARTS, BETWEEN, "wait", "update", "detokenise", ENGINE)
MOST_SLICES = 40_000


class Slice(NamedTuple):
    """A call: its part, when it began and ended (seconds of ``time.perf_counter``)."""

    part: str
    begin: float
    end: float


@dataclass(slots=True)
class StepTimes:
    """One step.

    Args:
        is_prefill: Whether prompt tokens were in it, whatever else was.
        rows: Sequences in it.
        tokens: Tokens that it computed.
        seconds: How long it took.
        parts: By part, the seconds in it and not in another that it called.
        calls: By part.
    """

    is_prefill: bool
    rows: int
    tokens: int
    seconds: float
    parts: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)


class StepTimer:
    """Times the parts of an engine's steps.

    Args:
        device: Whose work is waited for at the end of each part, where it runs behind the host; None to wait for none.
        annotate: Whether parts are named for torch's profiler.

    Attributes:
        steps: Those seen so far.
        slices: Calls, the first ``MOST_SLICES``.
    """

    def __init__(self, device: torch.device | None = None, annotate: bool = False) -> None:
        self.steps: list[StepTimes] = []
        self.slices: list[Slice] = []
        self.annotate = annotate
        self._wait: Callable[[], None] = _waiter(device)
        self._children: list[float] = []  # seconds within calls of calls that have not ended, outermost first
        self._parts: dict[str, float] = {}  # of the step that is going on
        self._calls: dict[str, int] = {}
        self._plan: StepPlan | None = None

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed as ``part``."""
        children, clock = self._children, time.perf_counter

        def call(*arguments: Any, **keywords: Any) -> Any:
            children.append(0.0)
            begin = clock()
            try:
                with torch.profiler.record_function(part) if self.annotate else nullcontext():
                    result = function(*arguments, **keywords)
                    self._wait()
                    return result
            finally:
                end = clock()
                inside = children.pop()
                if children:
                    children[-1] += end - begin
                self._parts[part] = self._parts.get(part, 0.0) + end - begin - inside
                self._calls[part] = self._calls.get(part, 0) + 1
                if len(self.slices) < MOST_SLICES:
                    self.slices.append(Slice(part, begin, end))

        return call

    @contextmanager
    def watching(self, llm: LLM, model: bool = True) -> Iterator["StepTimer"]:
        """Time an engine's steps until the end of the context; with ``model``, the parts of its model too."""
        engine = llm.engine
        runner = engine.runner
        with ExitStack() as stack:

            def watch(part: str, owner: Any, name: str) -> None:
                # An AttributeError for one that is not there: left out, its time would be told as another part's.
                stack.enter_context(replaced(owner, name, self.timed(part, getattr(owner, name))))

            watch("schedule", engine.scheduler, "schedule")
            watch("batch state", runner.batch_state, "apply")
            watch("wait", StepHandle, "result")
            watch("update", engine.scheduler, "update")
            watch("detokenise", Request, "_decode")
            if model:
                watch("batch state", runner.batch_state, "step_input")
                watch("attention layout", runner.attention, "begin_step")
                _watch_model(watch, runner)
                for layer in runner.model.model.layers:
                    if getattr(layer, "fused_linear", None) is not None:
                        stack.enter_context(replaced(layer, "fused_linear", self.fused(layer)))
            stack.enter_context(replaced(runner, "execute", self._noting(self.timed(BETWEEN, runner.execute))))
            stack.enter_context(replaced(engine, "advance", self._step_of(self.timed(ENGINE, engine.advance))))
            yield self

    def fused(self, layer: Any) -> Callable[..., Any]:
        """A layer's product for few rows, norms and gate included, timed as the projection that its weight is of."""
        attention, mlp = layer.self_attn, layer.mlp
        projections = {
            "qkv_proj": attention.qkv_proj,
            "o_proj": attention.o_proj,
            "mlp gate_up": mlp.gate_up_proj,
            "mlp down": mlp.down_proj,
        }
        original = layer.fused_linear
        timed = {id(module.weight): self.timed(part, original) for part, module in projections.items()}

        def call(x: torch.Tensor, weight: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
            return timed.get(id(weight), original)(x, weight, *arguments, **keywords)

        return call

    def _noting(self, execute: Callable[[StepPlan], Any]) -> Callable[[StepPlan], Any]:
        def call(plan: StepPlan) -> Any:
            self._plan = plan
            return execute(plan)

        return call

    def _step_of(self, advance: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            self._parts, self._calls, self._plan = {}, {}, None
            begin = time.perf_counter()
            advance(*arguments)
            self._count(time.perf_counter() - begin)

        return call

    def _count(self, seconds: float) -> None:
        """Note a call that ran a step, or only took in what the last one gave."""
        plan = self._plan
        if plan is not None:
            is_prefill = plan.num_prefill_tokens > 0
            self.steps.append(
                StepTimes(is_prefill, len(plan.slots), plan.num_tokens, seconds, self._parts, self._calls)
            )
        elif self.steps:
            last = self.steps[-1]
            last.seconds += seconds
            for part, spent in self._parts.items():
                last.parts[part] = last.parts.get(part, 0.0) + spent
                last.calls[part] = last.calls.get(part, 0) + self._calls[part]


def _watch_model(watch: Callable[[str, Any, str], None], runner: Any) -> None:
    """Watch the parts of a decoder and what makes tokens of its logits."""
    model = runner.model
    decoder = model.model
    watch("embedding", decoder.embed_tokens, "forward")
    watch("rotary", decoder.rotary, "forward")
    watch("norms", decoder.norm, "add")
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        watch("norms", layer.input_layernorm, "add")
        watch("norms", layer.post_attention_layernorm, "add")
        watch("qkv_proj", attention.qkv_proj, "forward")
        watch("attention", attention, "attend")
        watch("o_proj", attention.o_proj, "forward")
        watch("mlp gate_up", mlp.gate_up_proj, "forward")
        watch("mlp activation", mlp.activation, "forward")
        watch("mlp down", mlp.down_proj, "forward")
    watch("lm_head", model, "compute_share")
    watch("sampling", runner.drawing, "_draw_whole")
    watch("sampling", runner.plain_sampler, "forward")
    watch("sampling", runner.drawing, "draw_again")


def _waiter(device: torch.device | None) -> Callable[[], None]:
    if device is not None and device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    if device is not None and device.type == "mps":
        return torch.mps.synchronize
    return lambda: None


@contextmanager
def timed_kernels(seconds: dict[str, float], calls: dict[str, int] | None = None) -> Iterator[None]:
    """Add up the seconds, and the number, of launches of the CPU's kernels by name; of none where there are none."""
    try:
        from nanovllm.kernels.cpu import launch
    except ImportError:  # no numba
        yield
        return
    original = launch.Kernel.__call__

    def timed(kernel: launch.Kernel, tasks: int, *arguments: int) -> None:
        start = time.perf_counter()
        original(kernel, tasks, *arguments)
        seconds[kernel.name] = seconds.get(kernel.name, 0.0) + time.perf_counter() - start
        if calls is not None:
            calls[kernel.name] = calls.get(kernel.name, 0) + 1

    with replaced(launch.Kernel, "__call__", timed):
        yield
