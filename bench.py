"""Throughput benchmark: ``nanovllm bench`` for a checkout. ``python bench.py --help`` says all."""

import sys

from nanovllm.benchmarks.bench import main

if __name__ == "__main__":
    sys.exit(main())
