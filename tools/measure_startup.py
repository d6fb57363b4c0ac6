"""How long a user waits before the first token: fresh processes, medians.

    python tools/measure_startup.py --json FILE

Measures the demo checkpoint from the start of the process to a ready LLM (imports included), and on random weights of
the published Qwen3-0.6B shape in bfloat16 the same without a tokenizer, with no kernel compiled yet and with all of
them, and the constructor alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from nanovllm.demo import DEMO_MODEL_PATH  # noqa: E402
from nanovllm.utils.environment import hardware, versions  # noqa: E402
from nanovllm.utils.random_checkpoint import cached_random_checkpoint  # noqa: E402

PUBLISHED = "from nanovllm import LLM; LLM({path!r}, device='cpu', skip_tokenizer_init=True)"
DEMO = "from nanovllm import LLM; LLM({path!r}, device='cpu')"
CONSTRUCTOR = """
import time
from nanovllm import LLM
started = time.perf_counter()
LLM({path!r}, device='cpu', skip_tokenizer_init=True)
print(time.perf_counter() - started)
"""


def run(program: str, **variables: str) -> tuple[float, str]:
    """Seconds of a fresh process, and what it printed; with changes to its environment."""
    command, environment = [sys.executable, "-c", program], {**os.environ, **variables}
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return time.perf_counter() - started, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="processes each (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        published = str(cached_random_checkpoint("qwen3-0.6b", Path(folder)))
        run(DEMO.format(path=DEMO_MODEL_PATH))  # the files are in the system's cache from here on
        demo = [run(DEMO.format(path=DEMO_MODEL_PATH))[0] for _ in range(args.repeats)]
        first, later = [], []
        for number in range(args.repeats):
            cache = {"NANOVLLM_CACHE": str(Path(folder, f"kernels-{number}"))}
            first.append(run(PUBLISHED.format(path=published), **cache)[0])
            later.append(run(PUBLISHED.format(path=published), **cache)[0])
        constructor = [float(run(CONSTRUCTOR.format(path=published))[1]) for _ in range(args.repeats)]
    report = {
        "versions": versions(),
        "hardware": hardware(),
        "demo_process_start_to_ready_seconds": demo,
        "qwen3_0.6b_bfloat16_first_process_start_to_ready_seconds": first,
        "qwen3_0.6b_bfloat16_later_process_start_to_ready_seconds": later,
        "qwen3_0.6b_bfloat16_constructor_seconds": constructor,
    }
    print(f"demo checkpoint, process start to ready: {statistics.median(demo):.2f} s")
    print(f"Qwen3-0.6B in bfloat16, first process:   {statistics.median(first):.2f} s")
    print(f"Qwen3-0.6B in bfloat16, later processes: {statistics.median(later):.2f} s")
    print(f"Qwen3-0.6B in bfloat16, constructor:     {statistics.median(constructor):.2f} s")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
