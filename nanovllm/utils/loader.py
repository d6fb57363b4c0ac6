"""Loads safetensors checkpoints straight into a model's parameters, one memory-mapped tensor at a time.

A parameter made by :func:`new_parameter` knows how to load itself from a checkpoint tensor, or from several when
it is fused of them. The model says by what names: ``checkpoint_name -> (parameter_name, shard_id)``.
"""

import json
import logging
import math
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
PLACEHOLDER_START = b"version https://git-lfs"
_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_PLAIN_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Shard id of a tensor that is read only to be compared: its parameter is filled by another one, which it must equal.
COPY = "copy"
_COMPARED_BYTES = 2**24  # at a time


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


class TensorError(ValueError):
    """A checkpoint tensor is not what the model needs; ``kind`` heads the list of its like."""

    kind: str


class ShapeMismatchError(TensorError):
    """A checkpoint tensor does not have the shape that the configuration says."""

    kind = "of the wrong shape"


class QuantizedTensorError(TensorError):
    """A checkpoint tensor is of a dtype whose numbers are not weights without the scales that belong to them."""

    kind = "quantized, which is not supported"


class DifferentCopyError(TensorError):
    """A checkpoint tensor is not the copy of another one that the configuration makes of it."""

    kind = "at odds with config.json"


Loader = Callable[[nn.Parameter, TensorSource, str], None]


def new_parameter(
    shape: tuple[int, ...], dtype: torch.dtype, device: Any, load: Loader, shard_ids: tuple[str, ...] = ("",)
) -> nn.Parameter:
    """An uninitialised parameter that ``load(parameter, source, shard_id)``, a method of its layer, fills.

    It is called once a shard id, and for ``COPY`` where the model resolves a tensor to that.

    Raises:
        ValueError: There is no memory for it.
    """
    try:
        data = torch.empty(shape, dtype=dtype, device=device)
    except (RuntimeError, TypeError) as error:  # out of memory, or out of the range of a size
        raise ValueError(
            f"a weight of shape {list(shape)} takes {math.prod(shape) * dtype.itemsize:,} bytes, which {device} cannot "
            f"give; check the sizes in config.json and hf_overrides, or use a device with more memory ({error})"
        ) from error
    parameter = nn.Parameter(data, requires_grad=False)
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
    target.copy_(_read_span(target, source, dim, span))


def equals_rows(target: torch.Tensor, source: TensorSource, span: Span) -> bool:
    """Whether rows ``span`` of ``source`` would leave ``target`` as it is; raises what :func:`copy_span` does."""
    rows = max(1, _COMPARED_BYTES // (target[:1].nbytes or 1))
    bits = torch.int16 if target.element_size() == 2 else torch.int32  # which are compared sooner than numbers
    for start in range(0, span.length, rows):
        mine = target[start : start + rows]
        piece = _read_span(mine, source, 0, Span(span.start + start, len(mine), span.total))
        if not torch.equal(mine.view(bits), piece.to(mine).view(bits)):
            return False
    return True


def _read_span(target: torch.Tensor, source: TensorSource, dim: int, span: Span) -> torch.Tensor:
    """``span`` of ``source`` along ``dim``, which is to have ``target``'s shape."""
    expected = list(target.shape)
    expected[dim] = span.total
    if source.get_shape() != expected:
        raise ShapeMismatchError(f"has shape {source.get_shape()}, expected {expected}")
    index = (slice(None),) * dim + (slice(span.start, span.start + span.length),)
    tensor = source[index]
    if tensor.dtype not in _PLAIN_DTYPES:
        raise QuantizedTensorError(f"has dtype {str(tensor.dtype).removeprefix('torch.')}")
    return tensor


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
        except (ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
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
    with open_shard(find_shards(path)[0]) as file:
        for name in file.keys():  # noqa: SIM118  (a safetensors handle is not iterable)
            return _SAFETENSORS_DTYPES.get(file.get_slice(name).get_dtype(), "float32")
    return "float32"


def load_weights(model: nn.Module, path: str, resolve: Callable[[str], tuple[str, str] | None]) -> None:
    """Fill every parameter of ``model`` from the checkpoint in ``path``, and use every tensor of it.

    Args:
        model: A model whose parameters were made by :func:`new_parameter`.
        path: Directory of the checkpoint.
        resolve: Maps a checkpoint tensor's name to (parameter name, shard id); None for one to be left out. The
            shard id ``COPY`` has it compared with the parameter.

    Raises:
        FileNotFoundError: A file is absent.
        ValueError: A file is damaged, or tensors are missing, unexpected or of the wrong shape: all are listed. If
            there is none of these, copies are compared, and listed if they differ.
    """
    parameters = dict(model.named_parameters())
    wanted = {(name, shard) for name, parameter in parameters.items() for shard in parameter.shard_ids}  # type: ignore[attr-defined]
    problems: dict[str, list[str]] = {"missing": [], "unexpected": []}
    copies: list[tuple[str, str, tuple[str, str]]] = []

    def load(file: Any, name: str, target: tuple[str, str]) -> None:
        parameter = parameters[target[0]]
        try:
            parameter.load(parameter, file.get_slice(name), target[1])  # type: ignore[attr-defined]
        except TensorError as error:
            problems.setdefault(error.kind, []).append(f"{name} {error}")

    for shard_path in find_shards(path):
        # safetensors makes its tensors on torch's default device, which may be another, or none at all ("meta")
        with torch.device("cpu"), open_shard(shard_path) as file:
            for name in file.keys():  # noqa: SIM118
                target = resolve(name)
                if target is None:
                    logger.debug("%s is left out: the model does not need it", name)
                elif target[1] == COPY:
                    copies.append((shard_path, name, target))
                elif target not in wanted:
                    problems["unexpected"].append(name)
                else:
                    wanted.discard(target)
                    load(file, name, target)
    problems["missing"] = [f"{name}[{shard}]" if shard else name for name, shard in wanted]
    if not any(problems.values()):
        for shard_path, name, target in copies:  # last: what they must equal may come after them, in another file
            with torch.device("cpu"), open_shard(shard_path) as file:
                load(file, name, target)
    lists = [f"{kind}: {'; '.join(sorted(names))}" for kind, names in problems.items() if names]
    if lists:
        raise ValueError(
            f"the weights in {path} do not fit its config.json. Tensors {'. Tensors '.join(lists)}. "
            "Check that config.json and the safetensors files belong together and are complete"
        )


def open_shard(path: str) -> Any:
    """Open a safetensors file; ValueError naming it if it is damaged, FileNotFoundError if it is not there."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        if os.path.islink(path) and not os.path.exists(path):  # as in a cache that was cleared in part
            raise FileNotFoundError(
                f"{path} is a link to {os.path.realpath(path)}, which is not there; download it again"
            ) from error
        if isinstance(error, FileNotFoundError):
            raise
        if _is_placeholder(path):
            raise ValueError(
                f"{path} is what git puts in place of a large file: fetch the file itself (git lfs pull), or download "
                "it (nanovllm download)"
            ) from error
        raise ValueError(f"{path} is damaged or cut short ({error}); download it again") from error


def _is_placeholder(path: str) -> bool:
    """Whether a file is the text by which Git LFS stands for one that has not been fetched."""
    try:
        with open(path, "rb") as file:
            return file.read(len(PLACEHOLDER_START)) == PLACEHOLDER_START
    except OSError:
        return False
