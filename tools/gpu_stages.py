"""Stages of gpu_check.py about whole engines being right: tests, parity, graphs, memory."""

import gc
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from gpu_measure import Check, Result
from gpu_speed import ROOT, draw, model_folder, open_engine

from nanovllm import LLM, SamplingParams
from nanovllm.attention import BACKENDS
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.engine import model_runner
from nanovllm.kernels import why_no_triton
from nanovllm.utils.memory import free_memory

# ----------------------------------------------------------------------------------------------------- tests


def check_tests(check: Check) -> None:
    """Tests marked ``gpu``, and those of the kernels, which run on what they find."""
    workers = ["-n", "6"] if find_spec("xdist") and check.on_cuda else []  # what takes long is compiling
    check.part("gpu", run_pytest, [*workers, "-m", "gpu", "tests" if check.on_cuda else "tests/test_gpu.py"])
    if not check.on_cuda:
        check.note("kernels", "needs CUDA: the tests of kernels are part of the ordinary ones elsewhere")
        return
    for name in ("test_kernels", "test_sampling_kernels", "test_paged_attention", "test_large_caches"):
        check.part(name, run_pytest, [*workers, "-m", "not gpu", f"tests/{name}.py"])


def run_pytest(arguments: list[str]) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=3", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() or [done.stderr[-500:]]
    if done.returncode not in (0, 5):  # 5: no test was chosen
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        raise RuntimeError("\n".join([*lines[-120:], *failed[:8], lines[-1]]))
    return lines[-1].strip("= ")


# ---------------------------------------------------------------------------------------------------- parity


def check_parity(check: Check) -> None:
    """Tokens and log-probabilities against transformers on this device, and answers against the CPU's."""
    from tests.checkpoints import write_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        random = write_checkpoint(
            folder, head_dim=64, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024
        )
        for model, name in ((random, "random"), (Path(DEMO_MODEL_PATH), "demo")):
            for dtype in ("float32", "bfloat16"):
                reference = reference_model(model, check.device, "float32")
                rounded = None if dtype == "float32" else reference_model(model, check.device, dtype)
                for backend in BACKENDS if check.on_cuda else ("matmul",):
                    check.part(f"{name} {backend} {dtype}", compare, check, model, backend, dtype, reference, rounded)
    expected = cpu_answers(check, "cpu", "matmul")
    for backend in BACKENDS if check.on_cuda else ("matmul",):
        check.part(f"answers {backend}", compare_answers, check, backend, expected)


def reference_model(model: Path, device: torch.device, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    options = {"torch_dtype": getattr(torch, dtype), "attn_implementation": "eager"}  # fused kernels may round more
    return AutoModelForCausalLM.from_pretrained(str(model), **options).to(device).eval()


def token_prompts(check: Check, vocab_size: int) -> list[list[int]]:
    lengths = (1, 5, 17, 40) if check.quick else (1, 5, 16, 17, 64, 100, 257, 500)
    return [[7 + (i * 31 + n) % (vocab_size - 20) for i in range(n)] for n in lengths]


def compare(check: Check, model: Path, backend: str, dtype: str, reference: Any, rounded: Any | None) -> Result | str:
    """Log-probabilities of prompts and greedy continuations, of all tokens, against transformers in float32.

    In bfloat16 the measure is what transformers' own bfloat16 differs by.
    """
    prompts = token_prompts(check, reference.config.vocab_size)
    params = SamplingParams(temperature=0, max_tokens=4 if check.quick else 16, ignore_eos=True, logprobs=-1)
    with open_or_reason(model, check, backend, dtype) as llm:
        if isinstance(llm, str):
            return llm
        plain = params.clone()
        plain.logprobs = None
        tokens = [output["token_ids"] for output in llm.generate(prompts, plain, use_tqdm=False)]
        outputs = llm.generate(prompts, params, use_tqdm=False)
    errors, own_errors, equal = [], [], 0
    for prompt, output, alone in zip(prompts, outputs, tokens, strict=True):
        made = output.outputs[0].token_ids
        exact = reference_logprobs(reference, prompt, made)
        positions = output.outputs[0].logprobs or []
        found = torch.stack([dense(position, exact.shape[1]) for position in positions])
        errors.append(float((found - exact).abs().max()))
        equal += made == alone == exact.argmax(dim=-1).tolist()
        if rounded is not None:
            own_errors.append(float((reference_logprobs(rounded, prompt, made) - exact).abs().max()))
    result: Result = {"largest_difference": max(errors), "greedy_equal": f"{equal} of {len(prompts)}"}
    if rounded is not None:
        result["transformers_own"] = max(own_errors)
    limit = 1e-3 if rounded is None else 3 * max(own_errors)
    if not all(error <= limit for error in errors) or (rounded is None and equal < len(prompts)):
        raise RuntimeError(f"{result}; the limit is {limit:.2g}")
    return result


@contextmanager
def open_or_reason(model: Path, check: Check, backend: str, dtype: str, **options: Any) -> Iterator[LLM | str]:
    """An engine, or why this backend cannot be had here."""
    given: dict[str, Any] = {"skip_tokenizer_init": True, "num_kvcache_blocks": 512, "max_num_seqs": 16, **options}
    try:
        llm = LLM(model, device=str(check.device), dtype=dtype, attention_backend=backend, **given)
    except ValueError as error:
        yield f"not here: {error}"
        return
    with llm:
        yield llm


@torch.inference_mode()
def reference_logprobs(model: Any, prompt: list[int], made: list[int]) -> torch.Tensor:
    """transformers' log-probabilities at the positions of ``made``, float64 [len(made), vocab_size] on the CPU."""
    ids = torch.tensor([[*prompt, *made]], device=model.device)
    logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(dim=-1).cpu()


def dense(position: dict[int, Any], vocab_size: int) -> torch.Tensor:
    """A position's log-probabilities, by token."""
    values = torch.full((vocab_size,), torch.nan, dtype=torch.float64)
    for token, entry in position.items():
        values[token] = entry.logprob
    return values


def cpu_answers(check: Check, device: str, backend: str) -> list[list[int]]:
    """Greedy and seeded answers of the demo checkpoint to questions it knows, in float32."""
    prompts = [f"<|im_start|>user\nWhat is {a} + {7 * a}?<|im_end|>\n<|im_start|>assistant\n" for a in range(3, 60, 3)]
    prompts = prompts[: 2 if check.quick else None]
    greedy = SamplingParams(temperature=0, max_tokens=8 if check.quick else 64)
    seeded = SamplingParams(temperature=0.8, max_tokens=8 if check.quick else 32, seed=1)
    with LLM(DEMO_MODEL_PATH, device=device, dtype="float32", attention_backend=backend) as llm:
        outputs = [output for params in (greedy, seeded) for output in llm.generate(prompts, params, use_tqdm=False)]
    return [output["token_ids"] for output in outputs]


def compare_answers(check: Check, backend: str, expected: list[list[int]]) -> str:
    try:
        found = cpu_answers(check, str(check.device), backend)
    except ValueError as error:
        return f"not here: {error}"
    result = f"{sum(a == b for a, b in zip(expected, found, strict=True))} of {len(expected)} equal"
    if found != expected:
        raise RuntimeError(result)
    return result


# ---------------------------------------------------------------------------------------------------- graphs


def check_graphs(check: Check) -> None:
    """Captured decode steps against the same operations launched one by one, and what happens if capturing fails."""
    reason = why_no_triton(check.device)
    if reason is not None:
        check.note("graphs", f"not here: {reason}")
        return
    for dtype in ("float32", "bfloat16") if check.on_cuda else ("float32",):
        check.part(f"tokens {dtype}", compare_graphs, check, dtype)
    check.part("cost", graph_cost, check)
    check.part("fallback", capture_fails, check)


def graph_model(check: Check, folder: str) -> Path:
    from tests.checkpoints import write_checkpoint

    heads = {} if check.quick else {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return write_checkpoint(folder, **heads)


def open_captured(check: Check, model: Path, dtype: str, rows: int, capture: Any = None, **options: Any) -> LLM:
    """An engine with captured steps; without CUDA, what would be captured is called again."""
    given: dict[str, Any] = {"skip_tokenizer_init": True, "max_num_seqs": rows, "num_kvcache_blocks": 8 * rows}
    backend = "auto" if check.on_cuda else "triton"
    llm = LLM(model, device=str(check.device), dtype=dtype, attention_backend=backend, **given, **options)
    if not check.on_cuda and not options.get("enforce_eager"):
        llm.engine.runner.capture_graphs(capture or (lambda function: function))
    return llm


def compare_graphs(check: Check, dtype: str) -> Result:
    """Batches of odd sizes: tokens with and without graphs, and logits of a replay and of the same launches.

    A replay launches the very kernels that it was captured from: its logits are to be equal bit by bit, in every dtype.
    """
    sizes = (1, 3) if check.quick else (1, 2, 3, 5, 7, 12, 31, 100, 200, 300)
    params = SamplingParams(temperature=0, max_tokens=2 if check.quick else 12, ignore_eos=True)
    # Lengths that leave room in the last block: replays beyond the plan must not need another one.
    lengths = [16 * (n % 4) + 1 + n % 6 for n in range(max(sizes))]
    prompts = [[7 + (i * 31 + n) % 190 for i in range(length)] for n, length in enumerate(lengths)]
    result: Result = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = graph_model(check, folder)
        captured = stack.enter_context(open_captured(check, model, dtype, max(sizes)))
        eager = stack.enter_context(open_captured(check, model, dtype, max(sizes), enforce_eager=True))
        if captured.engine.runner.graphs is None:
            raise RuntimeError("no step was captured")
        equal = 0
        differences: list[float] = []
        for size in sizes:
            outputs = [llm.generate(prompts[:size], params, use_tqdm=False) for llm in (captured, eager)]
            tokens = [[output["token_ids"] for output in some] for some in outputs]
            equal += sum(a == b for a, b in zip(*tokens, strict=True))
            differences.append(replay_difference(captured, prompts[:size]))
        result["tokens_equal"] = f"{equal} of {sum(sizes)}"
        result["replay_bitwise_equal"] = f"{sum(d == 0 for d in differences)} of {len(sizes)} batch sizes"
        result["replay_largest_difference"] = max(differences)
        result["backend"] = captured.get_metrics()["attention_backend"]
    if equal < sum(sizes) or any(difference != 0 for difference in differences):
        raise RuntimeError(str(result))
    return result


@torch.inference_mode()
def replay_difference(llm: LLM, prompts: list[list[int]]) -> float:
    """Largest difference of logits between a replayed step and the operations it was captured from, on equal tables."""
    engine, params = llm.engine, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    for prompt in prompts:
        engine.add_request({"prompt_token_ids": prompt}, params)
    while engine.scheduler.waiting:  # all prompts are computed by the step after the last was admitted
        engine.step()
    for _ in range(2):
        engine.step()
    runner = engine.runner
    graphs, state = runner.graphs, runner.batch_state
    assert graphs is not None
    slots = [seq.slot for seq in engine.scheduler.running]
    if runner.device.type == "cuda":
        torch.cuda.synchronize()
    with runner._on_device():
        tables = state.num_computed.clone(), state.token_ids.clone()
        replayed = graphs.replay(slots)[1].clone()
        state.num_computed.copy_(tables[0])
        state.token_ids.copy_(tables[1])
        graphs._run(next(size for size in graphs.sizes if size >= len(slots)))
        launched = graphs.logits[: len(slots)].clone()
    if runner.device.type == "cuda":
        torch.cuda.synchronize()
    engine.reset()
    return float((replayed.float() - launched.float()).abs().max())


def graph_cost(check: Check) -> Result:
    """What capturing takes, for the standard model."""
    if not check.on_cuda:
        return {"needs": "CUDA"}
    requests = draw(check, "4:8-16:4-8")
    engine = open_engine(check, requests)
    metrics = engine.llm.get_metrics()
    engine.close()
    names = ("num_graphs", "graph_capture_seconds", "graph_bytes", "startup_seconds", "num_kvcache_blocks")
    return {name: metrics[name] for name in (*names, "kvcache_bytes", "attention_backend")}


class _RefusedCapture:
    """A capture that does not begin."""

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("capturing was made to fail")


class _BrokenCapture(model_runner.CudaCapture):
    """A capture in whose third graph something is called that cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        self.count += 1
        if self.count < 3:
            return super().__call__(function)

        def waiting() -> None:
            function()
            torch.cuda.synchronize()

        return super().__call__(waiting)


def capture_fails(check: Check) -> Result:
    """An engine whose steps cannot be captured works without."""
    result: Result = {}
    params = SamplingParams(temperature=0, max_tokens=2 if check.quick else 12, ignore_eos=True)
    prompts = [[7, 8, 9], [11] * 20]
    with tempfile.TemporaryDirectory() as folder:
        model = graph_model(check, folder)
        with open_captured(check, model, "float32", 5, enforce_eager=True) as llm:
            expected = [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]
        for capture in (_RefusedCapture, _BrokenCapture) if check.on_cuda else (_RefusedCapture,):
            with (
                patch.object(model_runner, "CudaCapture", capture),
                open_captured(check, model, "float32", 5, capture()) as llm,
            ):
                assert llm.engine.runner.graphs is None
                found = [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]
            result[capture.__name__.strip("_")] = "works without graphs" if found == expected else "FAILED"
            if found != expected:
                raise RuntimeError(f"{capture.__name__}: {found} instead of {expected}")
    return result


# ---------------------------------------------------------------------------------------------------- memory


def check_memory(check: Check) -> None:
    """What is planned and what is taken, what is given back, and what is said when there is too little."""
    check.part("plan", memory_plan, check)
    check.part("too many blocks", too_many_blocks, check)
    if check.on_cuda:
        check.part("beside 30 GB of this process", memory_beside, check, True)
        check.part("beside 30 GB of another process", memory_beside, check, False)
    else:
        check.note("beside", "needs CUDA")


def memory_plan(check: Check) -> Result:
    """The engine with default settings and as many long requests as it takes."""
    if check.on_cuda:
        torch.cuda.init()
    before = free_bytes(check)
    requests = draw(check, "3:8-16:4-8" if check.quick else "512:1024-1024:64-64")
    engine = open_engine(check, requests)
    metrics = engine.llm.get_metrics()
    result: Result = {name: metrics[name] for name in ("kvcache_bytes", "num_kvcache_blocks", "graph_bytes")}
    if check.on_cuda:
        torch.cuda.reset_peak_memory_stats()
    ready = free_bytes(check)
    engine.run(requests)
    if check.on_cuda:
        total = torch.cuda.get_device_properties(check.device).total_memory
        result |= {
            "utilization_wanted": engine.llm.engine.config.gpu_memory_utilization,
            "peak_allocated_share": torch.cuda.max_memory_allocated() / total,
            "peak_reserved_share": torch.cuda.max_memory_reserved() / total,
        }
    result |= {"free_before": before, "free_when_ready": ready, "free_after_a_run": free_bytes(check)}
    engine.close()
    del engine
    gc.collect()
    after = free_bytes(check)
    return result | {"free_after_close": after, "not_given_back": before - after}


def free_bytes(check: Check) -> int:
    return torch.cuda.mem_get_info(check.device)[0] if check.on_cuda else free_memory(check.device)


def too_many_blocks(check: Check) -> str:
    try:
        LLM(
            model_folder(check),
            device=str(check.device),
            skip_tokenizer_init=True,
            num_kvcache_blocks=1 << 40,
            max_num_seqs=8,
        )
    except ValueError as error:
        return f"refused: {error}"
    raise RuntimeError("it was not refused")


def memory_beside(check: Check, same_process: bool) -> Result:
    """An engine while 30 GB of the device are somebody else's."""
    size = 30 * 10**9
    requests = draw(check, "8:100-200:20-40")
    taker = None
    held = None
    if same_process:
        held = torch.empty(size, dtype=torch.uint8, device=check.device)
    else:
        code = f"import torch\nx = torch.empty({size}, dtype=torch.uint8, device='cuda')\nprint(1, flush=True)\ninput()"
        taker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert taker.stdout is not None
        taker.stdout.readline()
    try:
        before = free_bytes(check)
        engine = open_engine(check, requests)
        seconds, _ = engine.run(requests)
        metrics = engine.llm.get_metrics()
        free = free_bytes(check)
        engine.close()
    finally:
        if taker is not None:
            taker.kill()
            taker.wait()
        del held
        gc.collect()
        torch.cuda.empty_cache()
    return {
        "free_before": before,
        "kvcache_bytes": metrics["kvcache_bytes"],
        "free_while_running": free,
        "seconds": seconds,
    }
