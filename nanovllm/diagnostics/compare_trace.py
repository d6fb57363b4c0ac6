"""What our model computes, operation by operation, recorded while the engine itself runs it.

Nothing of the model is written a second time here: forward hooks listen to its modules, and what is not a module (the
fused kernels, attention, the sums of the residual stream) is wrapped on the instance while a recording lasts.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from nanovllm.attention.base import AttentionStep, FusedStore
from nanovllm.diagnostics.replacing import one_by_one, replaced
from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams

# In the order in which a layer does them.
LAYER_OPERATIONS = (
    "input_layernorm",
    "q_proj",
    "k_proj",
    "v_proj",
    "q_norm",
    "k_norm",
    "q_rope",
    "k_rope",
    "v_cache",
    "attention",
    "o_proj",
    "attention_residual",
    "post_attention_layernorm",
    "gate_proj",
    "up_proj",
    "activation",
    "down_proj",
    "output",
)
# Whose rows are heads behind one another.
HEAD_OPERATIONS = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "q_rope", "k_rope", "v_cache", "attention")
# Longest prompt of which every attention weight is asked for.
MOST_PROBED_TOKENS = 64


def operation_names(num_layers: int) -> list[str]:
    """The names of all operations, in the order in which a step does them."""
    layers = [f"layers.{layer}.{operation}" for layer in range(num_layers) for operation in LAYER_OPERATIONS]
    return ["embed_tokens", *layers, "norm", "lm_head"]


@dataclass(slots=True)
class Trace:
    """What each operation gave, for the tokens of a run.

    Args:
        path: How it was run: "engine" (prompts, as the engine runs them), "plain" (prompts, each operation by itself,
            without fused kernels) or "decode" (tokens after the prompt, one a step).
        token_ids: The tokens.
        positions: Theirs.
        values: By operation, [tokens, ...] on the CPU. An operation within a fused kernel is not there.
        attention_weights: By layer, [tokens, heads, keys]: what each query took of each key; of short prompts only.
    """

    path: str
    token_ids: list[int]
    positions: list[int]
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    attention_weights: dict[int, torch.Tensor] = field(default_factory=dict)


class Recorder:
    """Notes what a model runner's model computes, step by step, while it is entered.

    Captured and recorded steps run without Python, so within it steps are launched operation by operation.

    Args:
        llm: An engine of one rank.
        plain: Switch the fused kernels off that do several operations at once. (Products keep their packed weights.)
        probe: Find out what each query takes of each key of a short prompt, by asking attention again with values
            that tell the keys apart.
    """

    def __init__(self, llm: LLM, plain: bool = False, probe: bool = False) -> None:
        self.runner: Any = llm.engine.runner
        self.plain, self.probe = plain, probe
        self.steps: list[dict[str, list[torch.Tensor]]] = []
        self.weights: dict[int, torch.Tensor] = {}
        self._undo = ExitStack()

    def __enter__(self) -> "Recorder":
        with ExitStack() as stack:
            self._undo = stack
            stack.enter_context(one_by_one(self.runner))
            if self.plain:
                for owner, name in fused_attributes(self.runner):
                    self._set(owner, name, None)
            self._listen(self.runner.model)
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._undo.close()

    def note(self, name: str, value: torch.Tensor, again: bool = False) -> None:
        """Keep ``value`` [tokens, ...] as what an operation gave in this step; ``again`` appends rows of the same."""
        kept = self.steps[-1].setdefault(name, [])
        if not again:
            kept.clear()
        kept.append(value.detach().to("cpu", copy=True))

    def _set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of an instance until the recording ends."""
        self._undo.enter_context(replaced(owner, name, value))

    def _hook(self, module: torch.nn.Module, heard: Callable[[Any], None]) -> None:
        handle = module.register_forward_hook(lambda _module, _arguments, result: heard(result))
        self._undo.callback(handle.remove)

    def _listen(self, model: Any) -> None:
        def begin(_module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            token_ids, positions, attention, *rest = arguments
            self.steps.append({})
            self.note("token_ids", token_ids)
            self.note("positions", positions)
            return token_ids, positions, RecordingStep(attention, self, positions), *rest

        self._undo.callback(model.register_forward_pre_hook(begin).remove)
        inner, last = model.model, len(model.model.layers) - 1
        self._hook(inner.embed_tokens, lambda rows: self.note("embed_tokens", rows))
        for number, layer in enumerate(inner.layers):
            self._listen_to_layer(f"layers.{number}", layer, f"layers.{number - 1}.output" if number else None)
        self._listen_to_sum(inner.norm, None, f"layers.{last}.output")
        self._hook(inner, lambda hidden: self.note("norm", hidden))
        self._hook(model.lm_head, lambda logits: self.note("lm_head", logits, again=True))
        share = model.lm_head.share

        def noted_share(*arguments: Any, **keywords: Any) -> torch.Tensor:
            logits = share(*arguments, **keywords)
            self.note("lm_head", logits, again=True)
            return logits

        self._set(model.lm_head, "share", noted_share)

    def _listen_to_layer(self, name: str, layer: Any, stream: str | None) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._listen_to_sum(layer.input_layernorm, f"{name}.input_layernorm", stream)
        self._listen_to_sum(
            layer.post_attention_layernorm, f"{name}.post_attention_layernorm", f"{name}.attention_residual"
        )
        self._hook(attention.qkv_proj, lambda qkv: self._note_qkv(name, attention, qkv))
        for norm in ("q_norm", "k_norm"):
            self._hook(getattr(attention, norm), lambda heads, norm=norm: self.note(f"{name}.{norm}", heads))  # type: ignore[misc]
        self._hook(attention.o_proj, lambda hidden: self.note(f"{name}.o_proj", hidden))
        self._hook(mlp.gate_up_proj, lambda both: self._note_gate_up(name, both))
        self._hook(mlp.activation, lambda hidden: self.note(f"{name}.activation", hidden))
        self._hook(mlp.down_proj, lambda hidden: self.note(f"{name}.down_proj", hidden))
        # The next norm adds it up; where there is none before it is needed, so does this.
        self._hook(layer, lambda pair: self.note(f"{name}.output", pair[0] if pair[1] is None else pair[0] + pair[1]))
        fused_linear = layer.fused_linear
        if fused_linear is not None:

            def noted_linear(x: torch.Tensor, weight: torch.Tensor, *rest: Any, **keywords: Any) -> torch.Tensor:
                result = fused_linear(x, weight, *rest, **keywords)
                if weight is attention.qkv_proj.weight:
                    self._note_qkv(name, attention, result)
                elif weight is attention.o_proj.weight:
                    self.note(f"{name}.attention_residual", result)
                elif weight is mlp.gate_up_proj.weight:
                    self.note(f"{name}.activation", result)
                else:
                    self.note(f"{name}.output", result)
                return result

            self._set(layer, "fused_linear", noted_linear)

    def _listen_to_sum(self, norm: Any, name: str | None, stream: str | None) -> None:
        """Note what a norm that also adds to the residual stream gives: the sum, and the norm of it."""
        add = norm.add

        def noted_add(x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            normalised, total = add(x, residual)
            if stream is not None:
                self.note(stream, total)
            if name is not None:
                self.note(name, normalised)
            return normalised, total

        self._set(norm, "add", noted_add)

    def _note_qkv(self, name: str, attention: Any, qkv: torch.Tensor) -> None:
        # The sizes are told by the heads, not by the offsets that the layer itself goes by.
        heads, kv_heads, size = attention.qkv_proj.num_heads, attention.qkv_proj.num_kv_heads, attention.head_dim
        parts = qkv.split((heads * size, kv_heads * size, kv_heads * size), dim=-1)
        for operation, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
            self.note(f"{name}.{operation}", part)

    def _note_gate_up(self, name: str, both: torch.Tensor) -> None:
        for operation, part in zip(("gate_proj", "up_proj"), both.chunk(2, dim=-1), strict=True):
            self.note(f"{name}.{operation}", part)


class RecordingStep(AttentionStep):
    """A step's attention, which does as it does and tells a recorder of it."""

    def __init__(self, inner: AttentionStep, recorder: Recorder, positions: torch.Tensor) -> None:
        self.inner, self.recorder = inner, recorder
        self.probes = recorder.probe and 1 < len(positions) <= MOST_PROBED_TOKENS
        # The keys of a later part of a prompt are not all in the step, so only whole prompts are asked about.
        self.probes = self.probes and positions.tolist() == list(range(len(positions)))
        self.stored: dict[int, Callable[[torch.Tensor], Any]] = {}

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        name = f"layers.{layer}"
        self.recorder.note(f"{name}.q_rope", q)
        self.recorder.note(f"{name}.k_rope", k)
        self.recorder.note(f"{name}.v_cache", v)
        out = self.inner.attend(layer, q, k, v)
        self._finish(layer, out, v, lambda values: self.inner.attend(layer, q, k, values))
        return out

    def fused_store(self, layer: int) -> FusedStore | None:
        fused = self.inner.fused_store(layer)
        if fused is None:
            return None

        def kernel(qkv: torch.Tensor, *rest: Any) -> torch.Tensor:
            q = fused.kernel(qkv, *rest)
            self.recorder.note(f"layers.{layer}.q_rope", q)
            self._note_cached(layer, fused.target, rest[0].shape[0])
            kv_heads, size = rest[-1], rest[0].shape[0]
            self._values = qkv[:, -kv_heads * size :].unflatten(-1, (kv_heads, size))

            def store(values: torch.Tensor) -> None:
                fused.kernel(torch.cat((qkv[:, : -kv_heads * size], values.flatten(1)), dim=1), *rest)

            self.stored[layer] = store
            return q

        return FusedStore(kernel, fused.target)

    def attend_cached(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        out = self.inner.attend_cached(layer, q)

        def again(values: torch.Tensor) -> torch.Tensor:
            self.stored[layer](values)
            return self.inner.attend_cached(layer, q)

        self._finish(layer, out, self._values, again)
        return out

    def fused_attend(self, layer: int) -> Callable[..., torch.Tensor] | None:
        fused = self.inner.fused_attend(layer)
        if fused is None:
            return None

        def attend(qkv: torch.Tensor, *rest: Any, **heads: int) -> torch.Tensor:
            out = fused(qkv, *rest, **heads)
            self._note_cached(layer, self.inner.target(layer), rest[0].shape[0])  # type: ignore[attr-defined]
            self.recorder.note(f"layers.{layer}.attention", out.flatten(1))
            return out

        return attend

    def _note_cached(self, layer: int, target: tuple[Any, ...], head_dim: int) -> None:
        """Note the step's keys and values as the kernel has left them in the cache."""
        keys, values, slots = target[:3]
        keys, values = read_cache(keys, values, slots, head_dim)
        self.recorder.note(f"layers.{layer}.k_rope", keys)
        self.recorder.note(f"layers.{layer}.v_cache", values)

    def _finish(
        self, layer: int, out: torch.Tensor, values: torch.Tensor, again: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self.recorder.note(f"layers.{layer}.attention", out.flatten(1))
        if not self.probes:
            return
        # With a value that is 1 in a place of its own for each key, what comes out is what was taken of each key.
        tokens, _, size = values.shape
        weights = []
        for first in range(0, tokens, size):
            keys = torch.arange(first, min(first + size, tokens), device=values.device)
            apart = torch.zeros_like(values, memory_format=torch.contiguous_format)
            apart[keys, :, keys - first] = 1
            weights.append(again(apart)[..., : len(keys)].detach().to("cpu", copy=True))
        again(values)  # what the cache is to hold
        self.recorder.weights[layer] = torch.cat(weights, dim=-1).float()


def read_cache(
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the tokens at ``slots`` int64 [n]: each [n, kv_heads, head_dim].

    ``keys`` and ``values`` are a layer's, [blocks, kv_heads, block_size, head_dim] or as the ``cpu`` backend lays
    them out, pairs of numbers in the last dimension.
    """
    if keys.dim() == 4:
        block, offset = slots // keys.shape[2], slots % keys.shape[2]
        return keys[block, :, offset], values[block, :, offset]
    block, offset, pair = slots // keys.shape[3], slots % keys.shape[3], keys.shape[4]
    found = values[block, :, offset // pair, :head_dim, offset % pair]
    return keys[block, :, :, offset].flatten(2), found


def fused_attributes(runner: Any) -> list[tuple[Any, str]]:
    """Where a runner's model and attention keep kernels that do several operations at once: (owner, attribute)."""
    owners = [runner.attention, *runner.model.modules()]
    names = ("fused_store", "fused_attend", "fused_add", "fused", "fused_linear")
    return [(owner, name) for owner in owners for name in names if vars(owner).get(name) is not None]


def record(
    llm: LLM, token_ids: list[int], num_decoded: int = 0, plain: bool = False, probe: bool = False
) -> tuple[Trace, Trace | None, list[int]]:
    """Run a prompt through an engine, and note what each operation of the model gives.

    Args:
        llm: The engine: of one rank, and idle.
        token_ids: The prompt.
        num_decoded: Tokens to decode after it, greedily; they are recorded too.
        plain: See :class:`Recorder`.
        probe: See :class:`Recorder`.

    Returns:
        The prompt's trace; that of the decoded tokens, None for none; and the tokens that were decoded, with the one
        that would have come next.
    """
    # Log-probabilities of the prompt are asked for because then every token goes all the way and none is cached.
    params = SamplingParams(
        temperature=0, max_tokens=num_decoded + 1, prompt_logprobs=1, ignore_eos=True, detokenize=False
    )
    llm.reset_prefix_cache()
    with Recorder(llm, plain, probe) as recorder:
        [output] = llm.generate([token_ids], params, use_tqdm=False)
    llm.reset_prefix_cache()
    prompt_steps: list[dict[str, list[torch.Tensor]]] = []
    rows, steps = 0, list(recorder.steps)
    while rows < len(token_ids):
        prompt_steps.append(steps.pop(0))
        rows += len(prompt_steps[-1]["positions"][0])
    steps = steps[:num_decoded]  # one may have been launched ahead
    weights = recorder.weights if len(prompt_steps) == 1 else {}  # of a part of the prompt they tell nothing
    prompt = _joined("plain" if plain else "engine", prompt_steps, weights)
    return prompt, _joined("decode", steps, {}) if steps else None, list(output.outputs[0].token_ids)


def _joined(path: str, steps: list[dict[str, list[torch.Tensor]]], weights: dict[int, torch.Tensor]) -> Trace:
    """The steps' tokens one after another; what not every step has noted is left out."""
    values = {
        name: torch.cat([rows for step in steps for rows in step[name]])
        for name in steps[0]
        if all(name in step for step in steps)
    }
    token_ids, positions = values.pop("token_ids").tolist(), values.pop("positions").tolist()
    return Trace(path, token_ids, positions, values, weights)
