"""The tensors of a checkpoint: what they hold, which parameter each fills, what is missing and what is of no use."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanovllm.config import EngineConfig
from nanovllm.diagnostics.inspect.findings import Findings, by_layer
from nanovllm.diagnostics.inspect.statistics import Statistics, pieces, read_statistics
from nanovllm.diagnostics.inspect.support import model_without_memory
from nanovllm.utils.loader import COPY, INDEX_FILE, TensorError, find_shards, open_shard
from nanovllm.utils.model_config import ModelConfig
from nanovllm.utils.random_checkpoint import parameter_shapes
from nanovllm.utils.text import counted

# safetensors' names of dtypes, with torch's of those that are weights by themselves.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

# What becomes of a tensor.
FILLS, COPIES, LEFT_OUT, UNEXPECTED = "fills", "copy", "left out", "unexpected"


@dataclass(slots=True)
class TensorInfo:
    """A tensor of the checkpoint.

    Args:
        name: Its name there.
        file: The file that holds it.
        dtype: As safetensors names it.
        shape: Its shape.
        use: "fills" a parameter; "copy" of one that another tensor fills; "left out", as the model computes it itself;
            "unexpected" if nothing uses it.
        parameter: The parameter it fills or is to equal, or None.
        shard: Which part of that, of a fused one: "q", "k", "v", "gate", "up".
        statistics: Of its elements; None if they were not read.
    """

    name: str
    file: str
    dtype: str
    shape: list[int]
    use: str = UNEXPECTED
    parameter: str | None = None
    shard: str = ""
    statistics: Statistics | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(slots=True)
class FileInfo:
    """A safetensors file: its size, the tensors in it, and whether it could be opened."""

    name: str
    num_bytes: int
    num_tensors: int = 0
    readable: bool = True


@dataclass(slots=True)
class ParametersSection:
    """The section "parameters".

    Args:
        files: The files of weights.
        tensors: In the order of the files.
        missing: Names of tensors that the model needs and no file holds.
        tied: Whether output head and embedding share a table; None if config.json could not be understood.
        head_stored: Whether a tensor of the output head's is in the files.
        num_parameters: Numbers in the model; a tied table counts once. 0 if it could not be made.
    """

    files: list[FileInfo] = field(default_factory=list)
    tensors: list[TensorInfo] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    tied: bool | None = None
    head_stored: bool = False
    num_parameters: int = 0

    def find(self, name: str) -> TensorInfo | None:
        return next((tensor for tensor in self.tensors if tensor.name == name), None)


class _Header:
    """Stands for a tensor of which only shape and dtype are known, where a parameter is asked to load it."""

    def __init__(self, tensor: TensorInfo) -> None:
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return self.tensor.shape

    def __getitem__(self, index: Any) -> torch.Tensor:
        return torch.empty(self.tensor.shape, dtype=DTYPES.get(self.tensor.dtype, torch.uint8), device="meta")[index]


def inspect_parameters(
    config: EngineConfig, model: ModelConfig | None, findings: Findings, dtype: torch.dtype | None, *, statistics: bool
) -> ParametersSection:
    """The section "parameters".

    Args:
        config: The engine's configuration.
        model: The checkpoint's; None if it could not be understood, and the tensors are only listed.
        findings: What is wrong goes here.
        dtype: What the engine would hold the weights in, if that is known.
        statistics: Whether to read the tensors, a piece at a time.
    """
    section = read_headers(config.model, findings)
    if model is not None:
        section.tied = model.tie_word_embeddings
        try:
            network = model_without_memory(config, model)
        except ValueError as error:
            findings.problem("parameters", "unsupported", error)
        else:
            section.num_parameters = sum(parameter.numel() for parameter in network.parameters())
            _assign(network, model, section, config.model, findings)
    section.head_stored = section.find("lm_head.weight") is not None
    if statistics:
        _read_all(config.model, section, findings, dtype)
    _note_dtypes(model, section, findings)
    return section


def read_headers(path: str, findings: Findings) -> ParametersSection:
    """List the files and tensors of a checkpoint; what cannot be read is a problem."""
    section = ParametersSection()
    for file_path in _files(path, findings):
        size = os.path.getsize(file_path) if os.path.exists(file_path) else 0  # a link to nothing
        info = FileInfo(os.path.basename(file_path), size)
        section.files.append(info)
        try:
            with open_shard(file_path) as file:
                for name in file.keys():  # noqa: SIM118  (a safetensors handle is not iterable)
                    part = file.get_slice(name)
                    section.tensors.append(TensorInfo(name, info.name, str(part.get_dtype()), list(part.get_shape())))
                    info.num_tensors += 1
        except (ValueError, FileNotFoundError) as error:
            info.readable = False
            message = str(error).replace(f"{path}{os.sep}", "")
            lost = _indexed(path, info.name)
            kind = "damaged file" if isinstance(error, ValueError) else "missing file"
            findings.problem("parameters", kind, f"{message}{_lost(lost)}")
    return section


def _files(path: str, findings: Findings) -> list[str]:
    """The files the engine would read, as far as they are there."""
    try:
        return find_shards(path)
    except FileNotFoundError as error:
        index = Path(path, INDEX_FILE)
        absent = [name for name in _weight_map(path).values() if not Path(path, name).exists()]
        for name in sorted(set(absent)):
            lost = _lost(_indexed(path, name))
            findings.problem("parameters", "missing file", f"{name}, which {index.name} names, is not there{lost}")
        if not absent:
            findings.problem("parameters", "missing file", error)
    except ValueError as error:
        findings.problem("parameters", "damaged file", error)
    return [str(file) for file in sorted(Path(path).glob("*.safetensors"))]


def _weight_map(path: str) -> dict[str, str]:
    """Which file holds each tensor, as the index says; empty if there is no index, or none that can be read."""
    try:
        found = json.loads(Path(path, INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in found.items()}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return {}


def _indexed(path: str, file: str) -> list[str]:
    """Tensors that the index places in a file."""
    return [name for name, where in _weight_map(path).items() if where == file]


def _lost(names: list[str]) -> str:
    return f" (it is to hold {counted(len(names), 'tensor')}: {', '.join(by_layer(names))})" if names else ""


def _assign(network: Any, model: ModelConfig, section: ParametersSection, path: str, findings: Findings) -> None:
    """Say of each tensor which parameter it fills, by the model's own word, as the loader does."""
    parameters = dict(network.named_parameters())
    wanted = {(name, shard) for name, parameter in parameters.items() for shard in parameter.shard_ids}
    filled: dict[tuple[str, str], str] = {}
    unexpected = []
    for tensor in section.tensors:
        target = network.resolve_weight(tensor.name)
        if target is None:
            tensor.use = LEFT_OUT
            continue
        if target[1] == COPY:
            tensor.use, tensor.parameter = COPIES, target[0]
        elif target in wanted and target not in filled:
            filled[target] = tensor.name
            tensor.use, (tensor.parameter, tensor.shard) = FILLS, target
        else:
            twice = f" (in {tensor.file}; {filled[target]} has filled its parameter)" if target in filled else ""
            unexpected.append(tensor.name + twice)
            continue
        _check(parameters[target[0]], tensor, findings)
    for line in by_layer(unexpected):
        findings.problem("parameters", "unexpected tensor", f"{line}: no parameter of the model takes it")
    names = {network.resolve_weight(name): name for name, _ in parameter_shapes(model.values | _plain(model))}
    absent = wanted - filled.keys()
    section.missing = [name for target, name in names.items() if target in absent]
    section.missing += sorted(f"{name}[{shard}]" for name, shard in absent - names.keys())
    # What a file was to hold that is damaged or gone has been told with the file.
    gone = {file.name for file in section.files if not file.readable}
    there = {file.name for file in section.files if file.readable}
    index = _weight_map(path)
    told = {name for name in section.missing if index.get(name) is not None and index[name] not in there}
    if (gone and not index) or not section.files:
        told = set(section.missing)
    for line in by_layer(name for name in section.missing if name not in told):
        findings.problem("parameters", "missing tensor", f"{line}: no file holds it")


def _plain(model: ModelConfig) -> dict[str, Any]:
    """What a list of the published tensors is made of, defaults filled in."""
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names += ["num_key_value_heads", "head_dim", "attention_bias", "tie_word_embeddings"]
    return {name: getattr(model, name) for name in names}


def _check(parameter: Any, tensor: TensorInfo, findings: Findings) -> None:
    """Have the parameter look at the tensor's shape and dtype."""
    name = next(iter(parameter.shard_ids)) if tensor.use == COPIES else tensor.shard
    try:
        parameter.load(parameter, _Header(tensor), name)
    except TensorError as error:
        known = tensor.dtype in DTYPES
        kind = "wrong shape" if error.kind == "of the wrong shape" else "quantized tensor"
        message = str(error) if known or kind == "wrong shape" else f"has dtype {tensor.dtype}"
        more = "" if kind == "wrong shape" else ", which is not supported; use the unquantized checkpoint"
        findings.problem("parameters", kind, f"{tensor.name} {message}{more}")


def _read_all(path: str, section: ParametersSection, findings: Findings, dtype: torch.dtype | None) -> None:
    """Statistics of every tensor, and a comparison of copies."""
    for info in section.files:
        mine = [tensor for tensor in section.tensors if tensor.file == info.name and tensor.dtype in DTYPES]
        if not mine:
            continue
        with torch.device("cpu"), open_shard(os.path.join(path, info.name)) as file:
            for tensor in mine:
                tensor.statistics = read_statistics(file.get_slice(tensor.name))
                _judge(tensor, tensor.statistics, findings, dtype)
    for tensor in section.tensors:
        if tensor.use == COPIES:
            _compare(path, tensor, section, findings, dtype or torch.float32)


def _judge(tensor: TensorInfo, found: Statistics, findings: Findings, dtype: torch.dtype | None) -> None:
    """Say what is wrong with the numbers of a tensor."""
    counts = [f"{found.nan:,} NaN"] * bool(found.nan) + [f"{found.infinite:,} infinite"] * bool(found.infinite)
    if counts:
        kind = "NaN" if found.nan else "infinity"
        findings.problem(
            "parameters", kind, f"{tensor.name} has {' and '.join(counts)} of {counted(found.count, 'element', ',')}"
        )
    largest = max(abs(found.min or 0.0), abs(found.max or 0.0))
    if dtype is not None and largest > torch.finfo(dtype).max:
        name = str(dtype).removeprefix("torch.")
        findings.problem(
            "parameters",
            "overflow",
            f"{tensor.name} has elements as large as {largest:.3g}, which are infinite in {name}",
        )
    if len(tensor.shape) > 1 and found.count and found.zeros == found.count:
        findings.note("parameters", f"{tensor.name} is zero everywhere")


def _compare(path: str, copy: TensorInfo, section: ParametersSection, findings: Findings, dtype: torch.dtype) -> None:
    """Whether a tensor that must be a copy is one, in the dtype that the engine holds it in."""
    original = next((one for one in section.tensors if one.use == FILLS and one.parameter == copy.parameter), None)
    if original is None or original.shape != copy.shape or not {original.dtype, copy.dtype} <= DTYPES.keys():
        return  # which is a problem already
    for one, other in zip(_read(path, original), _read(path, copy), strict=True):
        if not torch.equal(one.to(dtype).nan_to_num(), other.to(dtype).nan_to_num()):
            findings.problem(
                "parameters",
                "different copy",
                f"{copy.name} differs from {original.name}, though tie_word_embeddings is true (pass hf_overrides="
                "{'tie_word_embeddings': False} to use it, or delete it from the file to go without it)",
            )
            return


def _read(path: str, tensor: TensorInfo) -> Iterator[torch.Tensor]:
    with torch.device("cpu"), open_shard(os.path.join(path, tensor.file)) as file:
        yield from pieces(file.get_slice(tensor.name))


def _note_dtypes(model: ModelConfig | None, section: ParametersSection, findings: Findings) -> None:
    """Tensors of another dtype than config.json says."""
    said = "" if model is None or model.dtype is None else str(model.dtype).removeprefix("torch.")
    stored = sorted({str(DTYPES[one.dtype]).removeprefix("torch.") for one in section.tensors if one.dtype in DTYPES})
    if said and stored and stored != [said]:
        findings.note("parameters", f"config.json says dtype {said}; the tensors are {', '.join(stored)}")
