"""Throughput benchmark: output tokens a second on random token ids, every request run to its full length.

    python bench.py --preset mini                                # the demo checkpoint: seconds
    python bench.py --preset mini --random-weights qwen3-0.6b    # a published shape: about half a minute
    python bench.py --preset mini --random-weights qwen3-0.6b --engine nanovllm,hf --repeats 3
    python bench.py --random-weights qwen3-0.6b --engine nanovllm,hf-cb --separately
    python bench.py --model PATH --workload 64:16-64:16-64 --workload 32:1-16:32-32:1024 --json results.json

Engines that are compared run in one process and take turns on the same requests, because machines drift; or, with
--separately, one after the other, for a GPU whose memory each wants for itself.
"""

import argparse
import gc
import json
import logging
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers

from nanovllm import LLM, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.kernels import DISABLE_VARIABLE
from nanovllm.utils.environment import hardware, versions
from nanovllm.utils.memory import peak_cpu_memory
from nanovllm.utils.random_checkpoint import SHAPES, cached_random_checkpoint

MAX_TOKEN_ID = 10_000  # prompts draw from 0 to this, and wrap round in a smaller vocabulary
PRESETS = {"full": "256:100-1024:100-1024", "mini": "16:64-256:64-128"}
INTEGER_OPTIONS = (  # of nanovllm, passed on as they are
    "tensor_parallel_size",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "kvcache_block_size",
    "num_kvcache_blocks",
)
OTHER_OPTIONS = ("attention_backend", "gpu_memory_utilization", "enforce_eager", "enable_prefix_caching")
COUNTERS = ("prefill_tokens", "prefill_seconds", "decode_tokens", "decode_seconds", "num_preemptions")


@dataclass
class Requests:
    """What every engine is given: prompts of token ids, and how many tokens to generate for each."""

    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def output_tokens(self) -> int:
        return sum(self.output_lens)

    @property
    def longest(self) -> int:
        return max(len(prompt) + n for prompt, n in zip(self.prompts, self.output_lens, strict=True))

    def warm_up(self) -> "Requests":
        """A few short requests that fit wherever these fit."""
        prompts = [prompt[:32] for prompt in self.prompts[:4]]
        return Requests(prompts, [min(n, 8) for n in self.output_lens[:4]])


@dataclass(frozen=True)
class Workload:
    """How many requests, and the ranges that prompt and output lengths are drawn from.

    Each prompt starts with the same ``shared_prefix`` tokens, on top of its own length.
    """

    num_requests: int
    prompt_len: tuple[int, int]
    output_len: tuple[int, int]
    shared_prefix: int = 0

    @classmethod
    def parse(cls, spec: str) -> "Workload":
        """Read ``N:PROMPT_LO-PROMPT_HI:OUTPUT_LO-OUTPUT_HI[:SHARED_PREFIX]``."""
        number, *lengths = spec.split(":")
        try:
            if len(lengths) not in (2, 3):
                raise argparse.ArgumentTypeError(f"it has {len(lengths) + 1} parts")
            prefix = whole_number(0)(lengths[2]) if len(lengths) == 3 else 0
            return cls(whole_number(1)(number), length_range(lengths[0]), length_range(lengths[1]), prefix)
        except argparse.ArgumentTypeError as error:
            form = f"N:PROMPT_LO-PROMPT_HI:OUTPUT_LO-OUTPUT_HI[:SHARED_PREFIX], e.g. {PRESETS['mini']}"
            raise argparse.ArgumentTypeError(f"{spec!r} is not {form}: {error}") from None

    def __str__(self) -> str:
        (prompt_lo, prompt_hi), (output_lo, output_hi) = self.prompt_len, self.output_len
        prefix = f":{self.shared_prefix}" if self.shared_prefix else ""
        return f"{self.num_requests}:{prompt_lo}-{prompt_hi}:{output_lo}-{output_hi}{prefix}"

    def draw(self, seed: int, vocab_size: int) -> Requests:
        """The requests of this seed: the order of the draws is fixed, so that figures stay comparable."""
        rng = random.Random(seed)

        def tokens(number: int) -> list[int]:
            return [rng.randint(0, MAX_TOKEN_ID) % vocab_size for _ in range(number)]

        prefix = tokens(self.shared_prefix)
        prompts = [prefix + tokens(rng.randint(*self.prompt_len)) for _ in range(self.num_requests)]
        return Requests(prompts, [rng.randint(*self.output_len) for _ in range(self.num_requests)])


class NanovllmEngine:
    """The engine of this repository."""

    name = "nanovllm"

    def __init__(self, model: Path, longest: int, args: argparse.Namespace) -> None:
        options: dict[str, Any] = {"dtype": args.dtype, "device": args.device, "seed": args.seed}
        for name in INTEGER_OPTIONS + OTHER_OPTIONS:
            if getattr(args, name) is not None:
                options[name] = getattr(args, name)
        if longest > 4096:  # the default limit
            options.setdefault("max_model_len", longest)
        self.temperature = args.temperature
        start = time.perf_counter()
        self.llm = LLM(str(model), skip_tokenizer_init=True, **options)
        self.startup_seconds = time.perf_counter() - start

    def describe(self) -> str:
        m = self.llm.get_metrics()
        blocks = f"{m['num_kvcache_blocks']} KV blocks of {m['kvcache_block_size']} tokens"
        where = f"{m['device']}, {m['dtype']}, attention {m['attention_backend']}"
        return f"{blocks} ({gib(m['kvcache_bytes'])}), {where}"

    def run(self, requests: Requests) -> tuple[float, dict[str, Any]]:
        common: dict[str, Any] = {"temperature": self.temperature, "ignore_eos": True}
        prompts = [{"prompt_token_ids": prompt} for prompt in requests.prompts]
        params = [SamplingParams(max_tokens=n, **common) for n in requests.output_lens]
        self.llm.reset_prefix_cache()  # or a repeat would find all of its prompts computed
        before = self.llm.get_metrics()
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=sys.stderr.isatty())
        seconds = time.perf_counter() - start  # the last token of all is on the host by now
        check_lengths("nanovllm", [len(out.outputs[0].token_ids) for out in outputs], requests.output_lens)
        after = self.llm.get_metrics()
        return seconds, {name: after[name] - before[name] for name in COUNTERS}

    def totals(self) -> dict[str, Any]:
        return self.llm.get_metrics()

    def close(self) -> None:
        self.llm.close()


class HFEngine:
    """transformers' generate on left-padded batches, each of which runs until its longest output is done."""

    name = "hf"

    def __init__(self, model: Path, longest: int, args: argparse.Namespace) -> None:
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        version = tuple(map(int, transformers.__version__.split(".")[:2]))
        dtype_keyword = "dtype" if version >= (4, 56) else "torch_dtype"
        dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
        self.device = pick_device(args.device)
        self.seed, self.batch_size = args.seed, args.hf_batch_size
        if args.temperature > 0:
            sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}
        else:  # None, because transformers warns of values that greedy search ignores
            sampling = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        self.options: dict[str, Any] = {"pad_token_id": 0, **sampling}
        start = time.perf_counter()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(str(model), **{dtype_keyword: dtype})
        self.model.to(self.device).eval()
        self.startup_seconds = time.perf_counter() - start

    def describe(self) -> str:
        batch = f"batches of {self.batch_size}" if self.batch_size else "one batch a workload"
        return f"{self.device}, {str(self.model.dtype).removeprefix('torch.')}, {batch}"

    def run(self, requests: Requests) -> tuple[float, dict[str, Any]]:
        torch.manual_seed(self.seed)
        size = self.batch_size or len(requests.prompts)
        start = time.perf_counter()
        for first in range(0, len(requests.prompts), size):
            outputs = requests.output_lens[first : first + size]
            made = self._generate(requests.prompts[first : first + size], max(outputs))
            check_lengths("hf", made, [max(outputs)] * len(outputs))
        return time.perf_counter() - start, {}

    def _generate(self, prompts: list[list[int]], new_tokens: int) -> list[int]:
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        with torch.inference_mode():
            output = self.model.generate(
                ids.to(self.device),
                attention_mask=mask.to(self.device),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                **self.options,
            ).cpu()  # waits for the device
        return [len(row) - width for row in output]

    def totals(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        del self.model


class HFContinuousEngine(HFEngine):
    """transformers' continuous batching: a paged cache, and requests that join and leave as others finish."""

    name = "hf-cb"

    def __init__(self, model: Path, longest: int, args: argparse.Namespace) -> None:
        if not hasattr(transformers.generation, "ContinuousBatchingConfig"):
            raise ValueError(
                f"--engine hf-cb: transformers {transformers.__version__} has no continuous batching of this kind "
                "(use hf, or a newer transformers)"
            )
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        super().__init__(model, longest, args)
        start = time.perf_counter()
        options: dict[str, Any] = {}
        if self.device == "cpu":  # by default its cache takes most of the memory
            options["continuous_batching_config"] = transformers.generation.ContinuousBatchingConfig(
                max_memory_percent=0.02, max_batch_tokens=512
            )
        # Token -1 never comes: every request runs to its full length.
        config = transformers.GenerationConfig(max_new_tokens=longest, eos_token_id=-1, **self.options)
        self.manager = self.model.init_continuous_batching(generation_config=config, **options)
        if self.device == "cuda" and hasattr(self.manager, "warmup"):
            self.manager.warmup()
        self.manager.start()
        self.startup_seconds += time.perf_counter() - start

    def describe(self) -> str:
        attention = self.model.config._attn_implementation
        return f"{self.device}, {str(self.model.dtype).removeprefix('torch.')}, attention {attention}"

    def run(self, requests: Requests) -> tuple[float, dict[str, Any]]:
        start = time.perf_counter()
        asked = zip(requests.prompts, requests.output_lens, strict=True)
        ids = [self.manager.add_request(prompt, max_new_tokens=n) for prompt, n in asked]
        done: dict[str, Any] = {}
        while len(done) < len(ids):
            result = self.manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error:
                    raise RuntimeError(f"hf-cb: a request failed: {result.error}")
                done[result.request_id] = result
            elif result is None and not self.manager.is_running():
                raise RuntimeError("hf-cb: the thread that generates has ended")
        seconds = time.perf_counter() - start
        check_lengths(self.name, [len(done[name].generated_tokens) for name in ids], requests.output_lens)
        return seconds, {}

    def close(self) -> None:
        self.manager.stop(block=True)
        if hasattr(self.manager, "destroy"):
            self.manager.destroy()
        del self.manager
        super().close()


Engine = NanovllmEngine | HFEngine
ENGINES: dict[str, type[Engine]] = {one.name: one for one in (NanovllmEngine, HFEngine, HFContinuousEngine)}


def check_lengths(engine: str, made: list[int], asked: list[int]) -> None:
    if made != asked:
        raise RuntimeError(f"{engine} returned {sum(made)} output tokens; {sum(asked)} were asked for")


def pick_device(device: str) -> str:
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name in present if present[name])
    if not present[device]:
        raise ValueError(f"--device {device}: this machine, or this build of torch, has none")
    return device


def measure(engines: dict[str, Engine], held: dict[str, int], requests: Requests, repeats: int) -> dict[str, Any]:
    """Time every engine on the requests, in turns, and take each one's median.

    ``held`` is the GPU memory that each holds between its turns; what others hold is not its own.
    """
    times: dict[str, list[float]] = {name: [] for name in engines}
    results: dict[str, dict[str, Any]] = {name: {} for name in engines}
    for _ in range(repeats):
        for name, engine in engines.items():
            before = allocated_gpu_memory()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            seconds, details = engine.run(requests)
            times[name].append(seconds)
            results[name] |= details  # of the last repeat
            if torch.cuda.is_available():
                results[name]["peak_gpu_memory_bytes"] = held[name] + torch.cuda.max_memory_allocated() - before
    for name, result in results.items():
        result["seconds"] = times[name]
        result["median_seconds"] = statistics.median(times[name])
        result["output_tokens_per_second"] = requests.output_tokens / result["median_seconds"]
    return results


def compare(workload: Workload, requests: Requests, results: dict[str, Any]) -> dict[str, Any]:
    """What the report says of a workload; ratios are the first engine's to the others."""
    first, *others = results
    rates = {name: result["output_tokens_per_second"] for name, result in results.items()}
    return {
        "workload": str(workload),
        "num_requests": len(requests.prompts),
        "prompt_tokens": requests.prompt_tokens,
        "output_tokens": requests.output_tokens,
        "results": results,
        "ratios": {f"{first}/{other}": rates[first] / rates[other] for other in others},
    }


def allocated_gpu_memory() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def free_gpu_memory() -> None:
    """Give the device what closed engines have left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def print_machine(report: dict[str, Any]) -> None:
    machine, software = report["hardware"], {k: v for k, v in report["versions"].items() if v}
    print("model    ", report["model"])
    print("machine  ", ", ".join([machine["cpu"], *machine["gpus"]]), end=", ")
    print(f"{machine['cores']} cores, {machine['threads']} threads, {gib(machine['ram_bytes'])} RAM")
    print("software ", ", ".join(f"{name} {version}" for name, version in software.items()), "\n", flush=True)


def print_workload(workload: Workload, requests: Requests, repeats: int) -> None:
    tokens = f"{requests.prompt_tokens} prompt + {requests.output_tokens} output tokens"
    print(f"\nworkload {workload}: {tokens}{f', {repeats} times' if repeats > 1 else ''}", flush=True)


def print_results(results: dict[str, Any]) -> None:
    for name, result in results.items():
        speed = f"{result['output_tokens_per_second']:10.2f} output tok/s"
        line = f"  {name:<9}{result['median_seconds']:9.2f} s {speed}"
        if len(result["seconds"]) > 1:
            low, high = min(result["seconds"]), max(result["seconds"])
            line += f", median of {len(result['seconds'])} ({low:.2f}-{high:.2f} s)"
        if result.get("num_preemptions"):
            line += f", {result['num_preemptions']} preemptions"
        if "peak_gpu_memory_bytes" in result:
            line += f", GPU memory {gib(result['peak_gpu_memory_bytes'])}"
        print(line)
    sys.stdout.flush()


def print_ratios(ratios: dict[str, float]) -> None:
    for pair, ratio in ratios.items():
        print(f"  ratio {pair.replace('/', ' / ')}: {ratio:.2f}x output tok/s")
    sys.stdout.flush()


def print_totals(report: dict[str, Any]) -> None:
    print()
    if kv := report["engines"].get("nanovllm"):
        blocks = f"{kv['peak_kvcache_blocks_used']} of {kv['num_kvcache_blocks']}"
        print(f"KV blocks in use at the peak: {blocks}, of {kv['kvcache_block_size']} tokens each")
    print(f"peak memory of the process: {gib(report['peak_process_memory_bytes'])}")


def whole_number(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return parse


def length_range(text: str) -> tuple[int, int]:
    """Read ``LO-HI``, or one length."""
    low, _, high = text.partition("-")
    bounds = whole_number(1)(low), whole_number(1)(high or low)
    if bounds[0] > bounds[1]:
        raise argparse.ArgumentTypeError(f"{text!r} runs backwards")
    return bounds


def engine_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in ENGINES:
            raise argparse.ArgumentTypeError(f"invalid choice: {name!r} (choose from {', '.join(ENGINES)})")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} names an engine twice")
    return names


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is a page long."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count, natural = whole_number(1), whole_number(0)

    add = parser.add_argument_group("workload").add_argument
    presets = "; ".join(f"{name} is {spec}" for name, spec in PRESETS.items())
    add("--preset", choices=PRESETS, help=f"{presets} (default: full)")
    add("--num-requests", type=count, metavar="N", help="instead of the preset's")
    add("--prompt-len", type=length_range, metavar="LO-HI", help="instead of the preset's")
    add("--output-len", type=length_range, metavar="LO-HI", help="instead of the preset's")
    add("--shared-prefix", type=natural, metavar="N", help="tokens put before every prompt (default: 0)")
    spec = "N:LO-HI:LO-HI[:PREFIX]"
    spec_help = "all of that in short: requests, prompt and output lengths, shared prefix; may be repeated"
    add("--workload", type=Workload.parse, action="append", metavar=spec, help=spec_help)
    add("--seed", type=natural, default=0, help="of prompts, lengths and sampling (default: 0)")
    add("--temperature", type=float, default=0.6, help="0 is greedy (default: 0.6)")

    demo = "Without --model and --random-weights, the bundled demo checkpoint: tiny, ready in seconds."
    group = parser.add_argument_group("model", demo)
    which = group.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, metavar="PATH", help="a checkpoint folder")
    shapes = "bfloat16, written on first use (0.6b: 1.2 GB), without a download"
    which.add_argument("--random-weights", choices=SHAPES, type=str.lower, help=shapes)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanovllm" / "random-weights"
    cache_help = "where random weights are kept for the next run (default: %(default)s)"
    add = group.add_argument
    add("--weights-cache", type=Path, default=cache, metavar="DIR", help=cache_help)
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")

    add = parser.add_argument_group("run").add_argument
    engine_help = "nanovllm (the default), hf (transformers), hf-cb (its continuous batching); of several, ratios"
    add("--engine", type=engine_names, default=["nanovllm"], metavar="NAME[,NAME]", help=engine_help)
    add("--separately", action="store_true", help="close each engine before the next is opened, instead of turns")
    add("--repeats", type=count, default=1, metavar="N", help="report medians (default: 1)")
    add("--json", type=Path, metavar="FILE", help="write all figures, versions and hardware here")
    add("--hf-batch-size", type=count, metavar="N", help="(default: all of a workload's requests)")

    own = "Each option defaults to the engine's own choice."
    add = parser.add_argument_group("nanovllm", own).add_argument
    for option in INTEGER_OPTIONS:
        add(f"--{option.replace('_', '-')}", type=count, metavar="N")
    add("--attention-backend", metavar="NAME")
    add("--gpu-memory-utilization", type=float, metavar="SHARE", help="lower it if hf takes turns")
    add("--enforce-eager", action="store_true", default=None, help="no CUDA graphs")
    add("--no-prefix-caching", dest="enable_prefix_caching", action="store_false", default=None)
    return parser


def chosen_workloads(args: argparse.Namespace) -> list[Workload]:
    names = ("num_requests", "prompt_len", "output_len", "shared_prefix")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if not args.workload:
        return [replace(Workload.parse(PRESETS[args.preset or "full"]), **given)]
    if args.preset or given:
        name = "preset" if args.preset else next(iter(given)).replace("_", "-")
        raise ValueError(f"--workload and --{name} exclude each other")
    return list(args.workload)


def chosen_model(args: argparse.Namespace) -> tuple[str, Path]:
    """The model's name in the report, and its folder."""
    if args.random_weights:
        if not (args.weights_cache / args.random_weights).exists():
            print(f"writing random weights to {args.weights_cache}, where they stay for the next run", flush=True)
        folder = cached_random_checkpoint(args.random_weights, args.weights_cache)
        return f"{args.random_weights}, random weights", folder
    return (str(args.model), args.model) if args.model else ("demo", Path(DEMO_MODEL_PATH))


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Run all that the command line asks for, print as it goes, and return the report."""
    workloads = chosen_workloads(args)
    if not args.temperature >= 0:
        raise ValueError(f"--temperature is {args.temperature}; it must be at least 0")
    if args.json and not args.json.resolve().parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no such folder")
    if args.json and args.json.is_dir():
        raise ValueError(f"--json {args.json}: it is a folder; name a file")
    model_name, model = chosen_model(args)
    if not (model / "config.json").is_file():
        raise ValueError(f"{model} is no checkpoint folder: it has no config.json")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    drawn = [workload.draw(args.seed, config["vocab_size"]) for workload in workloads]
    limit = min(args.max_model_len or config["max_position_embeddings"], config["max_position_embeddings"])
    for workload, requests in zip(workloads, drawn, strict=True):
        if requests.longest > limit:
            raise ValueError(
                f"workload {workload} has a request of {requests.longest} prompt and output tokens; "
                f"the limit is {limit}, from max_position_embeddings or --max-model-len "
                "(choose shorter lengths, --preset mini, or another model: --model or --random-weights)"
            )

    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": model_name,
        "versions": versions(Path(__file__).resolve().parent),
        "hardware": hardware(),
        "options": {k: v for k, v in vars(args).items() if v is not None and not isinstance(v, Path)},
        "disabled": os.environ.get(DISABLE_VARIABLE, ""),
        "engines": {},
        "workloads": [],
    }
    print_machine(report)
    longest = max(requests.longest for requests in drawn)
    results: list[dict[str, Any]] = [{} for _ in drawn]  # a workload, by engine
    groups = [[name] for name in args.engine] if args.separately else [args.engine]
    for names in groups:
        engines: dict[str, Engine] = {}
        held: dict[str, int] = {}
        with ExitStack() as stack:
            stack.callback(free_gpu_memory)
            for name in names:
                before = allocated_gpu_memory()
                engines[name] = engine = ENGINES[name](model, longest, args)
                stack.callback(engine.close)
                engine.run(drawn[0].warm_up())
                held[name] = allocated_gpu_memory() - before
                print(f"{name} ready in {engine.startup_seconds:.2f} s: {engine.describe()}", flush=True)
            for workload, requests, found in zip(workloads, drawn, results, strict=True):
                print_workload(workload, requests, args.repeats)
                found |= measure(engines, held, requests, args.repeats)
                print_results({name: found[name] for name in names})
                if names is groups[-1]:
                    report["workloads"].append(compare(workload, requests, found))
                    print_ratios(report["workloads"][-1]["ratios"])
            for name, engine in engines.items():
                startup = {"startup_seconds": engine.startup_seconds}
                report["engines"][name] = {"setup": engine.describe(), **engine.totals(), **startup}
    report["peak_process_memory_bytes"] = peak_cpu_memory()
    print_totals(report)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 when done, 2 after one line on stderr when what was asked for cannot be done."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        report = benchmark(args)
        if args.json:
            args.json.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
