"""What kernels a GPU needs to serve requests was compiled when the engine was made.

Triton compiles a kernel anew for other constants, dtypes, and whether addresses and sizes are multiples of 16: a step
that is the first to need one waits for a compiler. What would be compiled is told here by what is launched in Triton's
interpreter.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.kernels import is_interpreted
from nanovllm.layers.sampler import SamplingRows
from tests.checkpoints import write_checkpoint
from tests.test_cuda_graphs import all_kernels, open_llm
from tests.threads import one_thread  # noqa: F401

pytest.importorskip("triton", reason="the package triton is not installed")
if torch.cuda.is_available() or not is_interpreted():
    pytest.skip("this is worked out in triton's interpreter", allow_module_level=True)

import triton.runtime.interpreter as interpreter

# What tells a kernel's variant from its others.
Variant = tuple[Any, ...]


def variant(function: Any, arguments: tuple[Any, ...], named: dict[str, Any], constants: list[str]) -> Variant:
    """What a launch would have compiled on a GPU: its kernel, and what Triton looks at of each argument."""
    kernel = getattr(import_module(function.__module__), function.__name__)
    varying = kernel.rewriter.kwargs.get("do_not_specialize") or ()
    parameters = inspect.signature(function).parameters
    given = dict(zip(parameters, arguments, strict=False)) | named  # options of the launch included
    return (
        function.__name__,
        *(
            (name, value if name in constants or name not in parameters else _told(value, name in varying))
            for name, value in given.items()
        ),
    )


def _told(value: Any, varies: bool) -> Any:
    """What tells variants apart of the value of an argument that is no constant."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return float
    if isinstance(value, int):
        return int if varies else 1 if value == 1 else (int, value % 16 == 0)
    return value  # None


@contextmanager
def variants() -> Iterator[set[Variant]]:
    """Those that are launched within."""
    found: set[Variant] = set()
    call = interpreter.GridExecutor.__call__

    def noting(self: Any, *arguments: Any, **named: Any) -> None:
        found.add(variant(self.fn, arguments, named, self.constexprs))
        call(self, *arguments, **named)

    with patch.object(interpreter.GridExecutor, "__call__", noting):
        yield found


@torch.inference_mode()
def start(runner: ModelRunner) -> None:
    """What a runner does on a GPU when it is made and captures nothing; decode steps that it captured, it replays."""
    with patch.object(runner.attention, "cache", None):
        logits = runner.run_without_cache(20)
        runner.sampler(logits, SamplingRows.worst_case(len(logits), runner.device))
    runner.warm_up()


def serve(llm: LLM) -> None:
    """Steps of any small number of rows: prompts, prompts of a token, prompts beside rows that decode."""

    def params(max_tokens: int) -> SamplingParams:
        return SamplingParams(temperature=1.0, max_tokens=max_tokens, ignore_eos=True)

    engine = llm.engine
    most = engine.runner.num_slots
    for rows in range(1, most + 1):
        for length in (1, 4 + rows % 2):
            llm.generate([[7 + row] * length for row in range(rows)], params(2), use_tqdm=False)
    llm.generate([[7, 8, 9]], params(1), use_tqdm=False)
    engine.add_request([3, 4], params(4))
    engine.step()
    engine.add_request([5, 6, 7], params(2))
    while engine.has_unfinished_requests:
        engine.step()


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 5])
def test_no_step_waits_for_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slots: int) -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    checkpoint = write_checkpoint(tmp_path, **sizes, num_key_value_heads=1, head_dim=16)
    with all_kernels(monkeypatch), open_llm(checkpoint, attention_backend="triton", max_num_seqs=slots) as llm:
        llm.engine.runner.drawing.apart = True
        with variants() as compiled:
            start(llm.engine.runner)
        with variants() as needed:
            serve(llm)
    late = [(name, dict(told)) for name, *told in needed - compiled]
    assert late == []
    assert {name for name, *_ in needed} >= {"_decode_few_rows_kernel", "_fused_linear_kernel", "_draw_kernel"}
