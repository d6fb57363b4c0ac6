"""What bench.py --compare's engines are told to do, seen by stand-ins for their packages; and how they are set up."""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nanovllm.benchmarks.compare import LAUNCHER
from nanovllm.benchmarks.engine_options import INTEGER_OPTIONS, OTHER_OPTIONS
from nanovllm.benchmarks.peers import run_hf, run_llama, run_nanovllm, run_openvino, run_vllm, write_gguf
from nanovllm.benchmarks.peers.protocol import usable_cpus
from nanovllm.utils.random_checkpoint import cached_random_checkpoint, write_random_checkpoint
from tools import setup_peers

PROMPTS, OUTPUT_LENS = [[5, 6, 7, 8], [5, 6, 9]], [3, 1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_random_checkpoint("tiny", tmp_path_factory.mktemp("weights"))


def settings(model: Path, **more: Any) -> dict[str, Any]:
    return {"model": str(model), "longest": 7, "temperature": 0.6, "seed": 0, **more}


def test_nanovllm_runs_with_the_command_line_s_options_and_a_variant_s(tiny: Path) -> None:
    names = (*INTEGER_OPTIONS, *OTHER_OPTIONS, "dtype", "device", "seed", "temperature")
    arguments = dict.fromkeys(names) | {"dtype": "bfloat16", "device": "cpu", "seed": 0, "temperature": 0.6}
    peer = run_nanovllm.NanovllmPeer(settings(tiny, arguments=arguments, extra={"num_kvcache_blocks": 7}))
    assert "7 KV blocks of" in peer.setup
    seconds, made = peer.run(PROMPTS, OUTPUT_LENS)
    assert seconds > 0
    assert made == OUTPUT_LENS
    with pytest.raises(TypeError, match="colour"):
        run_nanovllm.NanovllmPeer(settings(tiny, arguments=arguments, extra={"colour": "red"}))


def test_transformers_runs_in_bfloat16(tiny: Path) -> None:
    peer = run_hf.HFPeer(settings(tiny))
    assert "cpu, bfloat16, one batch a workload" in peer.setup
    seconds, made = peer.run(PROMPTS, OUTPUT_LENS)
    assert seconds > 0
    assert made == OUTPUT_LENS


# --------------------------------------------------------------------------------------------------- OpenVINO


class FakePipeline:
    def __init__(self, model: str, scheduler: Any, device: str, properties: dict[str, str]) -> None:
        self.scheduler, self.device, self.properties = scheduler, device, properties
        self.seen: list[tuple[list[list[int]], list[Any]]] = []

    def generate(self, inputs: Sequence[np.ndarray], configs: Sequence[Any]) -> list[Any]:
        self.seen.append(([row[0].tolist() for row in inputs], list(configs)))
        return [SimpleNamespace(m_generation_ids=[[0] * config.max_new_tokens]) for config in configs]


def test_openvino_never_finds_a_prompt_of_before(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genai = SimpleNamespace(
        __version__="1",
        SchedulerConfig=SimpleNamespace,
        GenerationConfig=SimpleNamespace,
        ContinuousBatchingPipeline=FakePipeline,
    )
    monkeypatch.setitem(sys.modules, "openvino_genai", genai)
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Tensor=lambda array: array))
    peer = run_openvino.OpenVINOPeer(settings(tiny))
    assert peer.run([[5, 1023], [5]], [3, 1])[1] == [3, 1]
    peer.run([[5, 1023], [5]], [3, 1])
    pipeline: Any = peer.pipeline
    assert [ids for ids, _ in pipeline.seen] == [[[5, 1023], [5]], [[6, 0], [6]]]
    first = pipeline.seen[0][1][0]
    assert vars(first) == {"max_new_tokens": 3, "ignore_eos": True, "do_sample": True, "temperature": 0.6}
    assert pipeline.scheduler.enable_prefix_caching
    assert pipeline.properties == {"INFERENCE_PRECISION_HINT": "bf16"}

    greedy = run_openvino.OpenVINOPeer({**settings(tiny), "temperature": 0})
    assert vars(greedy._config(2)) == {"max_new_tokens": 2, "ignore_eos": True}


# ------------------------------------------------------------------------------------------------------- vLLM


class FakeVLLM:
    empties = True

    def __init__(self, model: str, **options: Any) -> None:
        self.options = options
        self.seen: Any = None

    def reset_prefix_cache(self) -> bool:
        return self.empties

    def generate(self, prompts: Any, params: Any, use_tqdm: bool) -> list[Any]:
        self.seen = prompts
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * p.max_tokens)]) for p in params]


def test_vllm_gets_all_processors_and_an_empty_prefix_cache(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(__version__="1", LLM=FakeVLLM, SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", module)
    for name in run_vllm.environment():
        monkeypatch.setenv(name, "of before")  # which monkeypatch puts back
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "9")
    peer = run_vllm.VLLMPeer({**settings(tiny), "longest": 5000})
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == ",".join(map(str, usable_cpus()))
    assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "9"  # the user's wish
    assert peer.run(PROMPTS, OUTPUT_LENS)[1] == OUTPUT_LENS
    llm: Any = peer.llm
    assert llm.seen == [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    assert llm.options["max_model_len"] == 5000
    monkeypatch.setattr(FakeVLLM, "empties", False)
    with pytest.raises(RuntimeError, match="did not empty its prefix cache"):
        peer.run(PROMPTS, OUTPUT_LENS)


# -------------------------------------------------------------------------------------------------- llama.cpp


class FakeLlama:
    """llama.cpp's C functions over a cache that remembers which token is where, and predicts each position's number."""

    __version__ = "1"
    vocab = 64

    def __init__(self) -> None:
        self.cache: dict[int, dict[int, int]] = {}
        self.computed = 0
        self.context_params: Any = None
        self.rows: list[tuple[int, int]] = []

    def llama_backend_init(self) -> None: ...

    def llama_model_default_params(self) -> None: ...

    def llama_model_load_from_file(self, path: bytes, params: None) -> bool:
        return not path.endswith(b"missing")

    def llama_model_get_vocab(self, model: bool) -> None: ...

    def llama_vocab_n_tokens(self, vocab: None) -> int:
        return self.vocab

    def llama_model_desc(self, model: bool, buffer: Any, size: int) -> None:
        buffer.value = b"a fake"

    def llama_batch_init(self, tokens: int, embeddings: int, sequences: int) -> Any:
        columns = {name: [0] * tokens for name in ("token", "pos", "logits", "n_seq_id")}
        return SimpleNamespace(**columns, seq_id=[[0] for _ in range(tokens)], n_tokens=0)

    def llama_context_default_params(self) -> Any:
        return SimpleNamespace()

    def llama_init_from_model(self, model: bool, params: Any) -> bool:
        self.cache.clear()
        self.context_params = params
        return True

    def llama_get_memory(self, context: bool) -> None: ...

    def llama_free(self, context: bool) -> None: ...

    def llama_memory_seq_cp(self, memory: None, source: int, target: int, first: int, last: int) -> None:
        kept = {position: token for position, token in self.cache[source].items() if first <= position < last}
        self.cache.setdefault(target, {}).update(kept)

    def llama_memory_seq_rm(self, memory: None, sequence: int, first: int, last: int) -> None:
        del self.cache[sequence]

    def llama_decode(self, context: bool, batch: Any) -> int:
        self.rows = []
        for i in range(batch.n_tokens):
            sequence, position = batch.seq_id[i][0], batch.pos[i]
            tokens = self.cache.setdefault(sequence, {})
            assert set(tokens) == set(range(position)), "a position was left out, or is computed twice"
            tokens[position] = batch.token[i]
            self.rows.append((sequence, position))
            self.computed += 1
        return 0

    def llama_get_logits_ith(self, context: bool, row: int) -> Any:
        logits = (ctypes.c_float * self.vocab)()
        logits[self.rows[row][1]] = 1.0
        return logits


@pytest.mark.parametrize("batch_tokens", [2048, 3])
def test_llama_computes_every_token_once_and_shared_ones_for_all(
    monkeypatch: pytest.MonkeyPatch, batch_tokens: int
) -> None:
    llama = FakeLlama()
    monkeypatch.setitem(sys.modules, "llama_cpp", llama)
    monkeypatch.setattr(run_llama, "BATCH_TOKENS", batch_tokens)
    shared = [1, 2, 3, 4, 5, 6, 7]
    prompts, output_lens = [[*shared, 8, 9], [*shared, 10], [*shared, 11, 12, 13], [*shared, 14]], [4, 1, 2, 6]
    peer = run_llama.LlamaPeer(settings(Path("model.gguf")))
    assert peer.run(prompts, output_lens)[1] == output_lens
    alone = sum(len(prompt) - len(shared) for prompt in prompts)
    assert llama.computed == len(shared) + alone + sum(n - 1 for n in output_lens)
    # The token after position p is p, as the fake predicts it; those that had more to come are gone from the cache.
    assert llama.cache == {1: dict(enumerate(prompts[1]))}
    assert llama.context_params.n_seq_max == 4
    assert peer.setup == "llama-cpp-python 1, a fake, greedy"
    with pytest.raises(ValueError, match="did not load missing"):
        run_llama.LlamaPeer(settings(Path("missing")))


def test_a_shared_prefix_is_what_all_begin_with() -> None:
    assert run_llama.common_prefix([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2
    assert run_llama.common_prefix([[1], [2]]) == 0
    assert run_llama.common_prefix([[], [2]]) == 0


class FakeWriter:
    def __init__(self, path: str, architecture: str) -> None:
        Path(path).touch()
        self.entries: dict[str, Any] = {"architecture": architecture}
        self.tensors: dict[str, tuple[np.ndarray, Any]] = {}
        written.append(self)

    def add_tensor(self, name: str, tensor: np.ndarray, raw_dtype: Any = None) -> None:
        self.tensors[name] = (np.array(tensor), raw_dtype)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("add_"):
            return lambda value: self.entries.__setitem__(name.removeprefix("add_"), value)
        return lambda: None


written: list[FakeWriter] = []


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_holds_the_checkpoint_s_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    gguf = SimpleNamespace(
        GGUFWriter=FakeWriter,
        GGMLQuantizationType=SimpleNamespace(BF16="bf16", Q8_0="q8_0"),
        quants=SimpleNamespace(quantize=lambda tensor, kind: tensor.round(1)),
    )
    monkeypatch.setitem(sys.modules, "gguf", gguf)
    shape: dict[str, Any] = {"tie_word_embeddings": tied}
    folder = write_random_checkpoint(tmp_path / "c", shape, max_shard_bytes=150_000, store_tied_head=True)
    weights = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    if tied:
        del weights["lm_head.weight"]

    write_gguf.write_gguf(folder, tmp_path / "x.gguf", "bf16")
    writer = written.pop()
    assert set(writer.tensors) == set(map(write_gguf.gguf_name, weights))
    assert ("output.weight" in writer.tensors) is not tied
    for name, weight in weights.items():
        tensor, kind = writer.tensors[write_gguf.gguf_name(name)]
        if weight.ndim == 1:
            assert (tensor.dtype, kind) == (np.float32, None)
            assert np.array_equal(tensor, weight.float().numpy())
        else:
            assert kind == "bf16"
            assert np.array_equal(tensor, weight.view(torch.uint8).numpy())
    assert writer.entries["block_count"] == 2
    assert writer.entries["head_count_kv"] == 2
    assert writer.entries["rope_freq_base"] == 1e6

    write_gguf.write_gguf(folder, tmp_path / "x.gguf", "q8_0")
    tensor, kind = written.pop().tensors["blk.1.ffn_down.weight"]
    assert kind == "q8_0"
    expected = weights["model.layers.1.mlp.down_proj.weight"].float().numpy().round(1)
    assert np.array_equal(tensor, expected)
    with pytest.raises(ValueError, match="'q4' is not one of bf16, q8_0"):
        write_gguf.write_gguf(folder, tmp_path / "x.gguf", "q4")


def test_gguf_of_other_dtypes_is_refused(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path, "tiny", dtype=torch.float32)
    with pytest.raises(ValueError, match="is F32; only BF16 can be written"):
        list(write_gguf.bfloat16_tensors(folder))


# ------------------------------------------------------------------------------------- started by their path


def launch(*argv: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run the launcher with a Python that has no package installed, from another folder."""
    command = [sys.executable, "-S", "-E", str(LAUNCHER), *argv]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, cwd=os.path.sep)


@pytest.mark.parametrize(
    ("module", "package"), [("run_llama", "llama_cpp"), ("run_vllm", "vllm"), ("run_openvino", "openvino_genai")]
)
def test_a_peer_needs_neither_nanovllm_nor_its_packages(module: str, package: str) -> None:
    load = json.dumps({"load": {"model": "m", "longest": 9, "temperature": 0.6, "seed": 0}})
    done = launch(module, text=f'{load}\n{{"quit": true}}\n')
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["error"] == f"ModuleNotFoundError: No module named '{package}'"


def test_the_launcher_says_how_it_is_used_and_passes_arguments_on() -> None:
    assert "usage: PYTHON launch.py MODULE" in launch().stderr
    assert "No module named 'numpy'" in launch("write_gguf", "a", "b", "bf16").stderr


def test_the_launcher_s_folder_hides_no_module(tmp_path: Path) -> None:
    folder = LAUNCHER.parent
    code = f"import runpy, sys; sys.argv = ['launch.py', 'x']; runpy.run_path({str(LAUNCHER)!r})['launch']('x')"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\ntry:\n    {code}\n"
         f"except ModuleNotFoundError: pass\nassert {str(folder)!r} not in sys.path"],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------------------------- set-up


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """The environment and arguments of each Python that set-up starts; nothing is installed."""
    found: list[tuple[str, list[str]]] = []

    def python(environment: Path, arguments: list[str], variables: Any = None, *, capture: bool = False) -> str:
        found.append((environment.name, arguments))
        for target in (Path(argument) for argument in arguments if "unfinished-" in argument):
            target.touch()
        return "one==1\ntwo[x]>=2\n" if capture else ""

    monkeypatch.setattr(setup_peers, "python", python)
    monkeypatch.setattr(setup_peers.venv, "create", lambda folder, with_pip: folder.mkdir(exist_ok=True))
    return found


posix = pytest.mark.skipif(os.name == "nt", reason="comparisons do not run on Windows")


@posix
def test_setting_up_does_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: list[tuple[str, list[str]]]
) -> None:
    folder = tmp_path / "peers"
    monkeypatch.setattr(sys, "argv", ["setup_peers.py", str(folder), "--shape", "tiny"])
    setup_peers.main()
    assert [name for name, _ in commands] == ["hf", *["llama"] * 3, *["openvino"] * 3, *["vllm"] * 4]
    assert commands[-1][1][-2:] == ["one==1", "two[x]>=2"]  # vLLM's own requirements
    names = ["hf", "llama", "openvino", "vllm", "tiny", "tiny-openvino", "tiny-bf16.gguf", "tiny-q8_0.gguf"]
    assert sorted(entry.name for entry in folder.iterdir()) == sorted(names)
    assert json.loads((folder / "tiny" / "config.json").read_text())["num_hidden_layers"] == 2

    commands.clear()
    setup_peers.main()
    assert commands == []
    (folder / "tiny-q8_0.gguf").unlink()
    (folder / "hf" / setup_peers.READY).unlink()
    setup_peers.main()
    assert [name for name, _ in commands] == ["hf", "llama"]


@posix
def test_setting_up_one_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: list[tuple[str, list[str]]]
) -> None:
    monkeypatch.setattr(sys, "argv", ["setup_peers.py", str(tmp_path), "--shape", "tiny", "--only", "hf"])
    setup_peers.main()
    assert [name for name, _ in commands] == ["hf"]


def test_unknown_peers_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["setup_peers.py", str(tmp_path), "--only", "tgi"])
    with pytest.raises(SystemExit):
        setup_peers.main()
    assert "invalid choice: 'tgi' (choose from hf, llama, openvino, vllm)" in capsys.readouterr().err
