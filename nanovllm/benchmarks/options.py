"""The options of ``bench.py`` and ``nanovllm bench``. Imports no engine, so that help is given at once."""

import argparse
from functools import partial
from pathlib import Path

from nanovllm.benchmarks.compare import COMPARED_SHAPE, compared_names
from nanovllm.benchmarks.engine_options import INTEGER_OPTIONS
from nanovllm.benchmarks.workloads import PRESETS
from nanovllm.utils.options import add_device_option, add_json_option, told
from nanovllm.utils.random_requests import Workload, length_range, whole_number
from nanovllm.utils.random_shapes import SHAPES, default_cache

ENGINE_NAMES = ("nanovllm", "one-rank", "hf", "hf-cb")
SUMMARY = "output tokens a second on random token ids, every request run to its full length"
EXAMPLES = """\
{command} --preset mini                                # the demo checkpoint: seconds
{command} --preset mini --random-weights qwen3-0.6b    # a published shape: about half a minute
{command} --preset mini --random-weights qwen3-0.6b --engine nanovllm,hf --repeats 3
{command} --random-weights qwen3-0.6b --engine nanovllm,hf-cb --separately
{command} --model PATH --workload 64:16-64:16-64 --workload 32:1-16:32-32:1024 --json > results.json
{command} --random-weights qwen3-0.6b --tensor-parallel-size 2 --engine nanovllm,one-rank
{command} --preset mini --compare vllm,openvino,llama,hf --peers DIR --repeats 3"""
TURNS = """\
Engines run in one process and take turns on the same requests, because machines drift; or, with --separately, one after
the other, for a GPU whose memory each wants for itself. With --compare, each runs in a process of its own, on the CPU:
how DIR is made is said in docs/development.md of the repository."""


def engine_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in ENGINE_NAMES:
            raise argparse.ArgumentTypeError(f"invalid choice: {name!r} (choose from {', '.join(ENGINE_NAMES)})")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} names an engine twice")
    return names


def add_options(parser: argparse.ArgumentParser) -> None:
    """All options of the benchmark."""
    count, natural = told(partial(whole_number, least=1)), told(partial(whole_number, least=0))
    lengths = told(length_range)

    add = parser.add_argument_group("workload").add_argument
    presets = "; ".join(f"{name} is {spec}" for name, spec in PRESETS.items())
    add("--preset", choices=PRESETS, help=f"{presets} (default: full)")
    add("--num-requests", "--num-prompts", type=count, metavar="N", help="instead of the preset's")
    add("--prompt-len", "--input-len", type=lengths, metavar="LO-HI", help="instead of the preset's")
    add("--output-len", type=lengths, metavar="LO-HI", help="instead of the preset's")
    add("--shared-prefix", type=natural, metavar="N", help="tokens put before every prompt (default: 0)")
    spec = "N:LO-HI:LO-HI[:PREFIX]"
    spec_help = "all of that in short: requests, prompt and output lengths, shared prefix; may be repeated"
    add("--workload", type=told(Workload.parse), action="append", metavar=spec, help=spec_help)
    add("--seed", type=natural, default=0, help="of prompts, lengths and sampling (default: 0)")
    add("--temperature", type=float, default=0.6, help="0 is greedy (default: 0.6)")

    demo = "Without --model and --random-weights, the bundled demo checkpoint: tiny, ready in seconds."
    group = parser.add_argument_group("model", demo)
    which = group.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="PATH", help="a checkpoint folder, or OWNER/NAME on the Hugging Face hub")
    shapes = "bfloat16, written on first use (0.6b: 1.2 GB), without a download"
    which.add_argument("--random-weights", choices=SHAPES, type=str.lower, help=shapes)
    cache_help = "where random weights are kept for the next run (default: %(default)s)"
    add = group.add_argument
    add("--weights-cache", type=Path, default=default_cache(), metavar="DIR", help=cache_help)
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    add_device_option(group)

    group = parser.add_argument_group("run")
    add = group.add_argument
    engine_help = (
        "nanovllm (the default), hf (transformers), hf-cb (its continuous batching), one-rank (nanovllm on the threads "
        "that a rank of --tensor-parallel-size has); of several, ratios"
    )
    add("--engine", type=engine_names, default=["nanovllm"], metavar="NAME[,NAME]", help=engine_help)
    add("--separately", action="store_true", help="close each engine before the next is opened, instead of turns")
    add("--repeats", type=count, default=1, metavar="N", help="report medians (default: 1)")
    add_json_option(group, "all figures, versions and hardware")
    add("--hf-batch-size", type=count, metavar="N", help="(default: all of a workload's requests)")

    add = parser.add_argument_group("comparison", "with engines that tools/setup_peers.py has set up").add_argument
    compare_help = "vllm, openvino, llama, llama-q8, hf, nanovllm-int8: nanovllm takes turns with these, on the CPU"
    add("--compare", type=compared_names, metavar="NAME[,NAME]", help=compare_help)
    peers_help = f"where they are, and their checkpoints of --random-weights (default: {COMPARED_SHAPE})"
    add("--peers", type=Path, metavar="DIR", help=peers_help)
    out_help = "write STEM.md, STEM.json and STEM.png (default: comparison)"
    add("--out", type=Path, metavar="STEM", help=out_help)
    timeout_help = "what an engine may take to start, or for a workload once (default: 900)"
    add("--timeout", type=count, metavar="SECONDS", help=timeout_help)

    own = "Each option defaults to the engine's own choice."
    add = parser.add_argument_group("nanovllm", own).add_argument
    for option in INTEGER_OPTIONS:
        add(f"--{option.replace('_', '-')}", type=count, metavar="N")
    add("--attention-backend", metavar="NAME")
    add("--quantization", choices=["int8"], help="weights in eight bits, on the CPU")
    add("--gpu-memory-utilization", type=float, metavar="SHARE", help="lower it if hf takes turns")
    add("--enforce-eager", action="store_true", default=None, help="no CUDA graphs")
    add("--no-prefix-caching", dest="enable_prefix_caching", action="store_false", default=None)
