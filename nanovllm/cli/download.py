"""``nanovllm download``: a checkpoint from the Hugging Face hub."""

import argparse
import sys
from typing import Any

from nanovllm.cli.options import add_command
from nanovllm.utils.options import add_json_option, print_json
from nanovllm.utils.text import counted


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "download",
        "fetch a checkpoint from the Hugging Face hub",
        "Fetch what nanovllm needs of a checkpoint into a folder, and check it. Interrupted, the same command resumes. "
        "HF_TOKEN, HF_ENDPOINT and the other variables of huggingface_hub count.",
        "nanovllm download Qwen/Qwen3-0.6B\n"
        "nanovllm download Qwen/Qwen3-8B --local-dir /data/qwen3-8b\n"
        "nanovllm chat --model Qwen3-0.6B",
    )
    add = parser.add_argument
    add("repository", metavar="REPO", help="OWNER/NAME")
    add("--revision", metavar="R", help="a branch, tag or commit (default: the main branch)")
    add("--local-dir", metavar="DIR", help="the folder (default: NAME, in this one)")
    add_json_option(parser, "path, revision, architecture and files")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from nanovllm.hub import download

    try:
        found = download(args.repository, args.revision, args.local_dir)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130
    total = sum(found.files.values())
    if args.json:
        report = {
            "path": str(found.path.absolute()),
            "repository": found.repository,
            "revision": found.revision,
            "architecture": found.architecture,
            "bytes": total,
            "files": found.files,
        }
        print_json(report)
    else:
        print(
            f"{found.path}: {found.architecture}, {counted(len(found.files), 'file')} of {total / 1e9:.2f} GB, "
            "complete "
            f"(revision {found.revision[:10]}). To talk with it: nanovllm chat --model {found.path}"
        )
    return 0
