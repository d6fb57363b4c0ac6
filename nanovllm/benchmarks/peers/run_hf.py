"""transformers' generate, one left-padded batch a workload."""

import argparse
from pathlib import Path
from typing import Any

from nanovllm.benchmarks.peers.protocol import serve


class HFPeer:
    def __init__(self, settings: dict[str, Any]) -> None:
        import transformers

        from nanovllm.benchmarks.hf_engines import HFEngine

        arguments = argparse.Namespace(
            dtype="bfloat16",
            device="cpu",
            seed=settings["seed"],
            temperature=settings["temperature"],
            hf_batch_size=None,
        )
        self.engine = HFEngine(Path(settings["model"]), settings["longest"], arguments)
        self.setup = f"transformers {transformers.__version__}, {self.engine.describe()}"

    def run(self, prompts: list[list[int]], output_lens: list[int]) -> tuple[float, list[int]]:
        from nanovllm.utils.random_requests import Requests

        seconds, _ = self.engine.run(Requests(prompts, output_lens))
        return seconds, output_lens  # each row has more: as many as the longest


def main() -> None:
    serve(HFPeer)


if __name__ == "__main__":
    main()
