"""The engine of this repository, as one among its peers."""

import argparse
from pathlib import Path
from typing import Any

from nanovllm.benchmarks.peers.protocol import serve


class NanovllmPeer:
    """The benchmark's own engine, with its command line's options and a variant's ``extra`` ones."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from nanovllm import __version__
        from nanovllm.benchmarks.nanovllm_engine import NanovllmEngine

        arguments = argparse.Namespace(**settings["arguments"])
        self.engine = NanovllmEngine(Path(settings["model"]), settings["longest"], arguments, **settings["extra"])
        self.setup = f"nanovllm {__version__}, {self.engine.describe()}"

    def run(self, prompts: list[list[int]], output_lens: list[int]) -> tuple[float, list[int]]:
        from nanovllm.utils.random_requests import Requests

        seconds, _ = self.engine.run(Requests(prompts, output_lens))  # which checks the lengths
        return seconds, output_lens


def main() -> None:
    serve(NanovllmPeer)


if __name__ == "__main__":
    main()
