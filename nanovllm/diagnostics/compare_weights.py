"""The weights that an engine computes with, against the tensors of its checkpoint.

Merged projections are taken apart by the sizes in config.json, not by the offsets that the loader itself goes by.
Weights that are packed for the processor are unpacked, or asked for by multiplying with ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open

from nanovllm.layers.product import PackableProduct
from nanovllm.llm import LLM
from nanovllm.utils.loader import COPY, find_shards
from nanovllm.utils.model_config import ModelConfig

# Rows of ones that exist at a time.
ROWS_AT_A_TIME = 64
# In eight bits a weight is off by half a step, of which an output has 127.
INT8_STEP = 0.51 / 127


@dataclass(slots=True)
class WeightComparison:
    """A tensor of the checkpoint, and what the engine has of it.

    Args:
        name: Its name in the checkpoint.
        parameter: The parameter here, with the part of it where there are several.
        shape: Of the tensor.
        mean, std, largest: Of its elements, of the largest by magnitude.
        difference: The largest difference; 0 if all are equal.
        differing: Elements that differ (with int8, by more than rounding explains).
        hint: What was found instead.
    """

    name: str
    parameter: str
    shape: list[int]
    mean: float
    std: float
    largest: float
    difference: float
    differing: int
    hint: str = ""

    @property
    def equal(self) -> bool:
        return self.differing == 0


@torch.inference_mode()
def compare_weights(llm: LLM) -> list[WeightComparison]:
    """Compare every tensor of the checkpoint that the model uses, in the files' order; for an engine of one rank."""
    runner: Any = llm.engine.runner
    config: ModelConfig = runner.model_config
    is_int8 = runner.config.quantization == "int8"
    loaded = _Loaded(runner.model, config)
    found = []
    for name, tensor in _tensors(config.path):
        target = runner.model.resolve_weight(name)
        if target is None:
            continue
        ours, parameter = loaded.part(*target)
        right = tensor.to(runner.dtype).float()
        shape, values = list(tensor.shape), right.flatten()
        comparison = WeightComparison(
            name,
            parameter,
            shape,
            mean=float(values.mean()),
            std=float(values.std(correction=0)),
            largest=float(values.abs().max()),
            difference=0.0,
            differing=0,
        )
        found.append(comparison)
        if list(ours.shape) != shape:
            comparison.differing, comparison.difference = values.numel(), float("inf")
            comparison.hint = f"has shape {list(ours.shape)} here" if ours.numel() else "is missing here"
            continue
        difference = (ours - right).abs()
        difference[ours.isnan() & right.isnan() | (ours == right)] = 0.0
        tolerated = torch.zeros(())
        if is_int8 and loaded.is_packed(target[0]):
            tolerated = INT8_STEP * right.abs().amax(dim=-1, keepdim=True)
        comparison.difference = float(difference.nan_to_num(nan=float("inf")).max())
        comparison.differing = int((~(difference <= tolerated)).sum())
        if comparison.differing:
            comparison.hint = _hint(name, ours, right, config.path, runner.dtype)
    return found


class _Loaded:
    """The parameters of a model, as plain float32 tensors on the CPU."""

    def __init__(self, model: Any, config: ModelConfig) -> None:
        self.model = model
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        mlp = config.intermediate_size
        self.places = {
            "q": slice(0, q),
            "k": slice(q, q + kv),
            "v": slice(q + kv, q + 2 * kv),
            "gate": slice(0, mlp),
            "up": slice(mlp, 2 * mlp),
        }
        self.vocab_size = config.vocab_size
        self._latest: tuple[str, torch.Tensor] = "", torch.empty(0)  # checkpoints have the parts close together

    def is_packed(self, parameter: str) -> bool:
        module = self.model.get_submodule(parameter.rpartition(".")[0])
        return parameter.endswith("weight") and getattr(module, "packed", None) is not None

    def part(self, parameter: str, shard: str) -> tuple[torch.Tensor, str]:
        """A parameter's part that one tensor of the checkpoint fills, and what to call it."""
        if self._latest[0] != parameter:
            self._latest = parameter, self._whole(parameter)
        whole = self._latest[1]
        if shard in self.places:
            return whole[self.places[shard]], f"{parameter}[{shard}]"
        return whole, f"{parameter} (a copy)" if shard == COPY else parameter

    def _whole(self, parameter: str) -> torch.Tensor:
        path, _, leaf = parameter.rpartition(".")
        module: Any = self.model.get_submodule(path)
        if not self.is_packed(parameter):
            found = getattr(module, leaf, None)
            plain = torch.empty(0) if found is None else found.detach().float().cpu()
            return plain[: self.vocab_size] if hasattr(module, "vocab_size") else plain
        is_product = isinstance(module, PackableProduct)
        if not is_product:  # an embedding that shares the head's
            return module.packed.rows(torch.arange(self.vocab_size)).float()
        norm = self.model.model.norm.weight  # of the dtype and device
        inputs = module.span.length if hasattr(module, "span") else len(norm)  # of a row-parallel layer, or another
        outputs = module.product(torch.zeros(1, inputs, dtype=norm.dtype, device=norm.device)).shape[1]
        outputs = min(outputs, self.vocab_size) if hasattr(module, "vocab_size") else outputs
        rows = module.packed.rows(torch.arange(outputs))
        if rows is not None:
            return rows.float()
        pieces = []
        for first in range(0, inputs, ROWS_AT_A_TIME):
            ones = torch.zeros(min(ROWS_AT_A_TIME, inputs - first), inputs, dtype=norm.dtype, device=norm.device)
            ones[:, first:].fill_diagonal_(1)
            pieces.append(module.product(ones, dtype=torch.float32).cpu())
        return torch.cat(pieces).t()[:outputs]


def _tensors(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    for shard in find_shards(path):
        with torch.device("cpu"), safe_open(shard, framework="pt") as file:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)


def _hint(name: str, ours: torch.Tensor, right: torch.Tensor, path: str, dtype: torch.dtype) -> str:
    """What is there instead of a tensor."""
    if not ours.any():
        return "is all zeros here"
    if ours.dim() == 2 and ours.shape[0] == ours.shape[1] and torch.equal(ours.t(), right):
        return "is transposed here"
    for other, tensor in _tensors(path):
        if other != name and tensor.shape == right.shape and torch.equal(tensor.to(dtype).float(), ours):
            return f"is {other} here"
    rows = (ours != right).flatten(1).any(dim=1) if ours.dim() == 2 else ours != right
    wrong = rows.nonzero().flatten().tolist()
    return f"differs in {len(wrong)} of {len(rows)} rows, from {wrong[0]} to {wrong[-1]}" if wrong else ""
