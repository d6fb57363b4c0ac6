"""Loads safetensors checkpoints straight into a model's parameters, one memory-mapped tensor at a time.

A parameter made by :func:`new_parameter` knows how to load itself from a checkpoint tensor, or from several when
it is fused of them. The model says by what names: ``checkpoint_name -> (parameter_name, shard_id)``.
"""

import json
import logging
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

logger = logging.getLogger(__name__)

INDEX_FILE = "model.safetensors.index.json"
_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_PLAIN_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class TensorSource(Protocol):
    """A tensor that is read slice by slice, such as safetensors' slices of a file."""

    def get_shape(self) -> list[int]: ...

    def __getitem__(self, index: Any) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Span:
    """Rows or columns ``start : start + length`` of a checkpoint tensor that has ``total`` of them."""

    start: int
    length: int
    total: int

    @classmethod
    def whole(cls, total: int) -> "Span":
        return cls(0, total, total)


class ShapeMismatchError(ValueError):
    """A checkpoint tensor does not have the shape that the configuration says."""


class QuantizedTensorError(ValueError):
    """A checkpoint tensor is of a dtype whose numbers are not weights without the scales that belong to them."""


Loader = Callable[[nn.Parameter, TensorSource, str], None]


def new_parameter(
    shape: tuple[int, ...], dtype: torch.dtype, device: Any, load: Loader, shard_ids: tuple[str, ...] = ("",)
) -> nn.Parameter:
    """An uninitialised parameter that ``load(parameter, source, shard_id)``, a method of its layer, fills.

    It is called once a shard id.
    """
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
    # The parameter must not hold its layer, which holds it: in such a circle the weights outlive the model.
    method = weakref.WeakMethod(load)

    def load_weakly(parameter: nn.Parameter, source: TensorSource, shard_id: str) -> None:
        bound = method()
        assert bound is not None, "the layer is gone"
        bound(parameter, source, shard_id)

    parameter.load = load_weakly  # type: ignore[attr-defined]
    parameter.shard_ids = shard_ids  # type: ignore[attr-defined]
    return parameter


def copy_span(target: torch.Tensor, source: TensorSource, dim: int, span: Span) -> None:
    """Copy ``span`` of ``source`` along ``dim`` into ``target``, reading no more than that.

    Raises:
        ShapeMismatchError: ``source`` has another shape than ``target`` with ``span.total`` along ``dim``.
        QuantizedTensorError: Its elements are not floating-point numbers of at least 16 bits.
    """
    expected = list(target.shape)
    expected[dim] = span.total
    if source.get_shape() != expected:
        raise ShapeMismatchError(f"has shape {source.get_shape()}, expected {expected}")
    index = (slice(None),) * dim + (slice(span.start, span.start + span.length),)
    tensor = source[index]
    if tensor.dtype not in _PLAIN_DTYPES:
        raise QuantizedTensorError(f"has dtype {str(tensor.dtype).removeprefix('torch.')}")
    target.copy_(tensor)


def find_shards(path: str) -> list[str]:
    """The safetensors files of a checkpoint, by its index if it has one.

    Raises:
        FileNotFoundError: There are none, or the index names one that is absent.
    """
    index_path = os.path.join(path, INDEX_FILE)
    single = os.path.join(path, "model.safetensors")
    if os.path.exists(single):  # as transformers does, whatever else lies there
        return [single]
    if os.path.exists(index_path):
        try:
            with open(index_path, encoding="utf-8") as file:
                names = sorted(set(json.load(file)["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index_path} is not a valid safetensors index; download it again") from error
        if not names or any(os.path.basename(str(name)) != name for name in names):
            raise ValueError(f"{index_path} names files outside its directory, or none; download it again")
        absent = [name for name in names if not os.path.exists(os.path.join(path, name))]
        if absent:
            raise FileNotFoundError(
                f"{path} lacks {', '.join(absent)}, which {INDEX_FILE} names; download the missing files"
            )
    else:
        names = sorted(name for name in os.listdir(path) if name.endswith(".safetensors"))
        if not names:
            raise FileNotFoundError(
                f"{path} has no *.safetensors file; download the weights, or convert a .bin checkpoint with "
                "transformers' save_pretrained"
            )
    return [os.path.join(path, name) for name in names]


def checkpoint_dtype(path: str) -> str:
    """Name of the dtype of a checkpoint's first tensor, for a config.json that names none."""
    with _open(find_shards(path)[0]) as file:
        for name in file.keys():  # noqa: SIM118  (a safetensors handle is not iterable)
            return _SAFETENSORS_DTYPES.get(file.get_slice(name).get_dtype(), "float32")
    return "float32"


def load_weights(model: nn.Module, path: str, resolve: Callable[[str], tuple[str, str] | None]) -> None:
    """Fill every parameter of ``model`` from the checkpoint in ``path``, and use every tensor of it.

    Args:
        model: A model whose parameters were made by :func:`new_parameter`.
        path: Directory of the checkpoint.
        resolve: Maps a checkpoint tensor's name to (parameter name, shard id); None for one to be left out.

    Raises:
        FileNotFoundError: A file is absent.
        ValueError: A file is damaged, or tensors are missing, unexpected or of the wrong shape: all are listed.
    """
    parameters = dict(model.named_parameters())
    wanted = {(name, shard) for name, parameter in parameters.items() for shard in parameter.shard_ids}  # type: ignore[attr-defined]
    unexpected: list[str] = []
    misshapen: list[str] = []
    quantized: list[str] = []
    for shard_path in find_shards(path):
        # safetensors makes its tensors on torch's default device, which may be another, or none at all ("meta")
        with torch.device("cpu"), _open(shard_path) as file:
            for name in file.keys():  # noqa: SIM118
                target = resolve(name)
                if target is None:
                    logger.debug("%s is left out: the model does not need it", name)
                    continue
                if target not in wanted:
                    unexpected.append(name)
                    continue
                wanted.discard(target)
                parameter = parameters[target[0]]
                try:
                    parameter.load(parameter, file.get_slice(name), target[1])  # type: ignore[attr-defined]
                except ShapeMismatchError as error:
                    misshapen.append(f"{name} {error}")
                except QuantizedTensorError as error:
                    quantized.append(f"{name} {error}")
    problems = [
        f"{kind}: {'; '.join(sorted(names))}"
        for kind, names in (
            ("missing", [f"{name}[{shard}]" if shard else name for name, shard in wanted]),
            ("unexpected", unexpected),
            ("of the wrong shape", misshapen),
            ("quantized, which is not supported", quantized),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"the weights in {path} do not fit its config.json. Tensors {'. Tensors '.join(problems)}. "
            "Check that config.json and the safetensors files belong together and are complete"
        )


def _open(path: str) -> Any:
    """Open a safetensors file; ValueError naming it if it is damaged."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} is damaged or cut short ({error}); download it again") from error
