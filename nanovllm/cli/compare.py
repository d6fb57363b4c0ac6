"""``nanovllm compare``: the engine against transformers, layer by layer, or against itself with other settings."""

import argparse
from typing import Any

from nanovllm.cli.options import add_command, add_model_options, model_arguments, read_text
from nanovllm.utils.options import add_device_option, add_json_option, json_alone, print_json
from nanovllm.utils.validation import check_number

# A comparison needs room for one prompt, not for all of a machine's memory.
DEFAULT_MAX_NUM_SEQS = 4


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "compare",
        "find the layer and operation that departs from transformers, or between two settings",
        "Run a prompt through the engine and through transformers, and say which layer and operation is the first to "
        "depart: each is judged by the inputs that it had, so one that only passes on an error is not blamed. Greedy "
        "tokens, log-probabilities and weights are compared too. With --against, two settings of the engine are "
        "compared instead. Exits with 0 if all is equal within tolerance, 1 if it departs, 2 for bad input.",
        "nanovllm compare --model Qwen3-0.6B --prompt 'The capital of France is'\n"
        "nanovllm compare --settings attention_backend=matmul --against attention_backend=cpu",
    )
    add = parser.add_argument_group("what to run").add_argument
    add("--prompt", metavar="TEXT", help="default: a conversation in the checkpoint's chat format")
    add("--prompt-file", metavar="FILE", help="the prompt is this file's text")
    add("--token-ids", metavar="IDS", help="the prompt is these token ids, as in 12,7,30")
    add("--max-tokens", type=int, default=16, metavar="N", help="greedy tokens to compare (default: 16)")
    group = parser.add_argument_group("what to compare")
    add = group.add_argument
    add("--settings", nargs="+", default=[], metavar="NAME=VALUE", help="arguments of LLM, such as dtype=bfloat16")
    add(
        "--against",
        nargs="*",
        metavar="NAME=VALUE",
        help="compare with these settings (none: as it is), not transformers",
    )
    add_device_option(group, "--reference-device", "cpu", "where transformers runs: ")
    add("--tolerance", type=float, metavar="X", help="of log-probabilities, with --against (default: by dtype)")
    add("--verbose", action="store_true", help="show every operation, weight and position")
    add_json_option(parser, "everything")
    add_model_options(parser, samples=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from nanovllm.config import EngineConfig
    from nanovllm.diagnostics.compare_prompt import has_tokenizer, prompt_ids
    from nanovllm.diagnostics.compare_settings import DISABLE, compare_settings, parse_settings

    settings = parse_settings(args.settings)
    against = None if args.against is None else parse_settings(args.against)
    if sum(given is not None for given in (args.prompt, args.prompt_file, args.token_ids)) > 1:
        raise ValueError("give one of --prompt, --prompt-file and --token-ids")
    if args.max_tokens < 1:
        raise ValueError(f"--max-tokens is {args.max_tokens}; it must be at least 1")
    if args.tolerance is not None:
        check_number("--tolerance", args.tolerance, low=0)
    text = args.prompt if args.prompt_file is None else read_text(args.prompt_file)
    arguments: dict[str, Any] = {"max_num_seqs": DEFAULT_MAX_NUM_SEQS, **model_arguments(args)}
    config = EngineConfig.from_arguments(**{k: v for k, v in {**arguments, **settings}.items() if k != DISABLE})
    arguments.pop("revision", None)  # directories have none
    for name in ("model", "tokenizer"):  # found once, for the prompt and all engines
        (settings if name in settings else arguments)[name] = getattr(config, name)
    token_ids = prompt_ids(config.model, config.tokenizer, text, args.token_ids, config.hf_overrides)
    arguments["skip_tokenizer_init"] = not has_tokenizer(config.tokenizer or config.model)

    if against is not None:
        from nanovllm.diagnostics.compare_report import settings_json, settings_text

        with json_alone(args):
            found = compare_settings(arguments, settings, against, token_ids, args.max_tokens, args.tolerance)
        if args.json:
            print_json(settings_json(found), indent=None)
        else:
            print(settings_text(found, args.verbose))
        return int(found.departs())

    from nanovllm.diagnostics.compare import check_ranks, compare
    from nanovllm.diagnostics.compare_report import comparison_json, comparison_text
    from nanovllm.diagnostics.compare_settings import without_kernels
    from nanovllm.llm import LLM

    shared = {**arguments, **settings}
    check_ranks(shared["tensor_parallel_size"])
    with json_alone(args), without_kernels(shared.pop(DISABLE, "")), LLM(**shared) as llm:
        compared = compare(llm, token_ids, args.max_tokens, args.reference_device)
    if args.json:
        print_json(comparison_json(compared), indent=None)
    else:
        print(comparison_text(compared, args.verbose))
    return int(compared.departs())
