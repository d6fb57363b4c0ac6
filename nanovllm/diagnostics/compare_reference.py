"""transformers' model of a checkpoint: what it computes, and each of its operations done again from given inputs."""

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch

from nanovllm.diagnostics.compare_trace import LAYER_OPERATIONS, Trace


class Reference:
    """A checkpoint as transformers runs it: exactly, in float32, and in the dtype that is to be judged.

    Args:
        path: The checkpoint.
        dtype: The engine's. The float32 model has the weights rounded to it, as the engine has.
        overrides: Replaces entries of config.json.
        device: Where it runs.

    Raises:
        ValueError: transformers cannot load it.
    """

    def __init__(
        self, path: str, dtype: torch.dtype, overrides: dict[str, Any] | None = None, device: str = "cpu"
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        try:
            config = AutoConfig.from_pretrained(path, **(overrides or {}))
            model = AutoModelForCausalLM.from_pretrained(
                path, config=config, torch_dtype=dtype, attn_implementation="eager"
            ).to(device)
        except Exception as error:  # whatever its parsers raise
            raise ValueError(
                f"transformers cannot load {path} onto {device}: {type(error).__name__}: {error}"
            ) from error
        self.dtype = dtype
        self.rounded: Any = model.eval()
        self.exact: Any = self.rounded if dtype == torch.float32 else copy.deepcopy(self.rounded).float()

    def models(self) -> list[Any]:
        """The exact one, and the one of the engine's dtype if that is another."""
        return [self.exact] if self.exact is self.rounded else [self.exact, self.rounded]


@torch.inference_mode()
def trace_reference(model: Any, token_ids: list[int]) -> Trace:
    """What each operation of transformers' model gives for a text, under the names of :class:`Trace`."""
    trace = Trace("reference", token_ids, list(range(len(token_ids))))
    handles: list[Any] = []

    def note(name: str, value: Any) -> None:
        trace.values[name] = value[0].detach().cpu()

    def after(module: Any, name: str) -> None:
        handles.append(module.register_forward_hook(lambda _m, _a, out, name=name: note(name, out)))  # type: ignore[misc]

    def before(module: Any, name: str) -> None:
        handles.append(module.register_forward_pre_hook(lambda _m, args, name=name: note(name, args[0])))  # type: ignore[misc]

    inner = model.model
    after(inner.embed_tokens, "embed_tokens")
    for number, layer in enumerate(inner.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for parent in (layer, attention, mlp):
            for operation in LAYER_OPERATIONS:
                if isinstance(getattr(parent, operation, None), torch.nn.Module):
                    after(getattr(parent, operation), f"layers.{number}.{operation}")
        before(attention.o_proj, f"layers.{number}.attention")
        before(layer.post_attention_layernorm, f"layers.{number}.attention_residual")
        before(mlp.down_proj, f"layers.{number}.activation")
        before(
            inner.layers[number + 1].input_layernorm if number + 1 < len(inner.layers) else inner.norm,
            f"layers.{number}.output",
        )
    after(inner.norm, "norm")
    after(model.lm_head, "lm_head")
    try:
        model(torch.tensor([token_ids], device=next(model.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for number in range(len(inner.layers)):
        redone = Redone(model, trace)
        for operation in ("q_rope", "k_rope", "v_cache"):
            name = f"layers.{number}.{operation}"
            trace.values[name] = redone.expected(name).cpu()
    return trace


class Redone:
    """Each operation as transformers' model does it from what another model had before it.

    So an operation that is right gives the right result here even where its inputs were wrong, and one that is wrong
    shows although what follows it is right.

    Args:
        model: transformers'.
        trace: What the other model had. What it lacks (of fused kernels) is computed from what was before.
        context: The same of the tokens before those of ``trace``, whose keys and values they attend to.
    """

    def __init__(self, model: Any, trace: Trace, context: "Redone | None" = None) -> None:
        self.model, self.trace, self.context = model, trace, context
        weight = next(model.parameters())
        self.dtype, self.device = weight.dtype, weight.device
        self._expected: dict[str, torch.Tensor] = {}
        self._weights: dict[int, torch.Tensor] = {}
        self._rotation: tuple[torch.Tensor, torch.Tensor] | None = None

    def value(self, name: str) -> torch.Tensor:
        """What the other model had, [tokens, ...]; else what it should have had, from what it had before."""
        found = self.trace.values.get(name)
        return self.expected(name) if found is None else found.to(self.device, self.dtype)

    @torch.inference_mode()
    def expected(self, name: str) -> torch.Tensor:
        """What an operation gives, done as transformers does it, [tokens, ...]."""
        if name not in self._expected:
            *_, operation = name.split(".")
            if name in ("embed_tokens", "norm", "lm_head"):
                self._expected[name] = self._outside(name)
            else:
                layer = int(name.split(".")[1])
                self._expected[name] = self._compute(layer, operation)
        return self._expected[name]

    def forget(self) -> None:
        """Give the memory back of what was computed; it can be computed again."""
        self._expected.clear()

    def attention_weights(self, layer: int) -> torch.Tensor:
        """[tokens, heads, keys] from the recorded queries and keys."""
        self._compute(layer, "attention")
        return self._weights.pop(layer)

    def linear(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(weight [outputs, inputs], x [tokens, inputs]) of an operation that is a product; None for another."""
        inputs = {
            **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "input_layernorm"),
            **dict.fromkeys(("gate_proj", "up_proj"), "post_attention_layernorm"),
            "o_proj": "attention",
            "down_proj": "activation",
        }
        if name == "lm_head":
            return self.model.lm_head.weight, self.value("norm")
        prefix, _, operation = name.rpartition(".")
        if operation not in inputs:
            return None
        layer = self.model.model.layers[int(prefix.split(".")[1])]
        parent = layer.mlp if operation in ("gate_proj", "up_proj", "down_proj") else layer.self_attn
        return getattr(parent, operation).weight, self.value(f"{prefix}.{inputs[operation]}")

    def _outside(self, name: str) -> torch.Tensor:
        inner = self.model.model
        if name == "embed_tokens":
            return inner.embed_tokens(torch.tensor(self.trace.token_ids, device=self.device))
        if name == "norm":
            return inner.norm(self.value(f"layers.{len(inner.layers) - 1}.output"))
        return self.model.lm_head(self.value("norm"))

    def _compute(self, number: int, operation: str) -> torch.Tensor:
        layer, name = self.model.model.layers[number], f"layers.{number}"
        attention, mlp = layer.self_attn, layer.mlp

        def of(before: str) -> torch.Tensor:
            return self.value(f"{name}.{before}")

        def stream() -> torch.Tensor:
            return self.value(f"layers.{number - 1}.output" if number else "embed_tokens")

        def heads(before: str) -> torch.Tensor:
            return of(before).unflatten(-1, (-1, attention.head_dim))

        how: dict[str, Callable[[], torch.Tensor]] = {
            "input_layernorm": lambda: layer.input_layernorm(stream()),
            "q_proj": lambda: attention.q_proj(of("input_layernorm")),
            "k_proj": lambda: attention.k_proj(of("input_layernorm")),
            "v_proj": lambda: attention.v_proj(of("input_layernorm")),
            "q_norm": lambda: attention.q_norm(heads("q_proj")),
            "k_norm": lambda: attention.k_norm(heads("k_proj")),
            "q_rope": lambda: self.rotated(of("q_norm")),
            "k_rope": lambda: self.rotated(of("k_norm")),
            "v_cache": lambda: heads("v_proj"),
            "attention": lambda: self._attend(number),
            "o_proj": lambda: attention.o_proj(of("attention")),
            "attention_residual": lambda: stream() + of("o_proj"),
            "post_attention_layernorm": lambda: layer.post_attention_layernorm(of("attention_residual")),
            "gate_proj": lambda: mlp.gate_proj(of("post_attention_layernorm")),
            "up_proj": lambda: mlp.up_proj(of("post_attention_layernorm")),
            "activation": lambda: mlp.act_fn(of("gate_proj")) * of("up_proj"),
            "down_proj": lambda: mlp.down_proj(of("activation")),
            "output": lambda: of("attention_residual") + of("down_proj"),
        }
        return how[operation]()

    def rotated(self, heads: torch.Tensor, shift: int = 0) -> torch.Tensor:
        """``heads`` [tokens, heads, head_dim] turned by the angles of the tokens' positions, ``shift`` added."""
        if self._rotation is None or shift:
            positions = torch.tensor([self.trace.positions], device=self.device) + shift
            rotation = self.model.model.rotary_emb(heads[None], positions)
            self._rotation = self._rotation if shift else rotation
        else:
            rotation = self._rotation
        turn = self._module().apply_rotary_pos_emb
        turned, _ = turn(heads.transpose(0, 1)[None], heads.transpose(0, 1)[None], *rotation)
        return turned[0].transpose(0, 1)

    def _attend(self, number: int) -> torch.Tensor:
        attention = self.model.model.layers[number].self_attn
        q = self.value(f"layers.{number}.q_rope")
        k, v = (self._with_context(f"layers.{number}.{name}") for name in ("k_rope", "v_cache"))
        before = [] if self.context is None else self.context.trace.positions
        keys = torch.tensor([*before, *self.trace.positions], device=self.device)
        queries = torch.tensor(self.trace.positions, device=self.device)
        mask = torch.zeros(len(queries), len(keys), dtype=self.dtype, device=self.device)
        mask.masked_fill_(keys[None, :] > queries[:, None], torch.finfo(self.dtype).min)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        attend = self._module().eager_attention_forward
        out, weights = attend(attention, q, k, v, mask[None, None], scaling=attention.scaling, dropout=0.0)
        self._weights[number] = weights[0].transpose(0, 1).float()
        return out[0].flatten(1)

    def _with_context(self, name: str) -> torch.Tensor:
        here = self.value(name)
        return here if self.context is None else torch.cat((self.context.value(name), here))

    def _module(self) -> Any:
        return sys.modules[type(self.model).__module__]
