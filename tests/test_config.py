"""Engine configuration: documented defaults, and an error that names the argument, its value and the remedy."""

import dataclasses
import inspect
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm import LLM
from nanovllm.config import EngineConfig
from tests.checkpoints import write_checkpoint
from tests.threads import one_thread  # noqa: F401


@pytest.fixture
def here(tmp_path: Path) -> str:
    """A directory; a configuration asks no more of it than to exist."""
    return str(tmp_path)


def make_llm(path: Path, **arguments: Any) -> LLM:
    defaults = {"device": "cpu", "skip_tokenizer_init": True, "num_kvcache_blocks": 16}
    return LLM(path, **{**defaults, **arguments})


class TestDefaults:
    """What a user gets who names only the model."""

    def test_values(self, here: str) -> None:
        assert dataclasses.asdict(EngineConfig(model=here)) == {
            "model": here,
            "tokenizer": None,
            "skip_tokenizer_init": False,
            "dtype": "auto",
            "device": "auto",
            "seed": 0,
            "tensor_parallel_size": 1,
            "tensor_parallel_timeout": 60.0,
            "max_model_len": None,
            "max_num_seqs": 512,
            "max_num_batched_tokens": 16384,
            "gpu_memory_utilization": 0.9,
            "enforce_eager": False,
            "enable_prefix_caching": True,
            "max_logprobs": -1,
            "quantization": None,
            "hf_overrides": {},
            "attention_backend": "auto",
            "kvcache_block_size": None,
            "num_kvcache_blocks": None,
        }

    def test_llm_has_the_same_arguments_and_defaults(self, here: str) -> None:
        parameters = inspect.signature(LLM.__init__).parameters
        config = dataclasses.asdict(EngineConfig(model=here))
        places = (
            "revision",
            "tokenizer_revision",
            "download_dir",
            "hf_token",
        )  # of what the configuration has a directory of
        assert [name for name in parameters if name not in places][1:-1] == list(config)
        assert all(parameters[name].default is None for name in places)
        for name, value in config.items():
            if name != "model":
                assert (parameters[name].default or None) == (value or None), name

    @pytest.mark.parametrize(("positions", "expected"), [(100, 100), (4096, 4096), (5000, 4096)])
    def test_max_model_len_is_the_models_up_to_4096(self, tmp_path: Path, positions: int, expected: int) -> None:
        path = write_checkpoint(tmp_path, num_hidden_layers=1, max_position_embeddings=positions)
        with make_llm(path) as llm:
            assert llm.engine.max_model_len == expected
        with make_llm(path, max_model_len=positions) as llm:
            assert llm.engine.max_model_len == positions
        with pytest.raises(ValueError, match=rf"max_model_len is {positions + 1}, but the model has {positions}"):
            make_llm(path, max_model_len=positions + 1)

    def test_frozen(self, here: str) -> None:
        config = EngineConfig(model=here)
        for field in dataclasses.fields(config):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(config, field.name, None)

    def test_two_configurations_share_nothing(self, here: str) -> None:
        first, second = EngineConfig(model=here), EngineConfig(model=here)
        first.hf_overrides["vocab_size"] = 3
        assert second.hf_overrides == {}


SEEDS = f"whole number from {-(2**63)} to {2**64 - 1}"


class TestValidation:
    """Every argument says its name, the value and what it may be."""

    @pytest.mark.parametrize(
        ("name", "value", "allowed"),
        [
            ("dtype", "int8", "use one of auto, bfloat16, float16, float32"),
            ("dtype", None, "use one of auto, bfloat16, float16, float32"),
            ("device", "tpu", "use auto, cuda, cuda:N, mps or cpu"),
            ("device", "cuda:first", "use auto, cuda, cuda:N, mps or cpu"),
            ("device", "", "use auto, cuda, cuda:N, mps or cpu"),
            ("device", 0, "use auto, cuda, cuda:N, mps or cpu"),
            ("device", torch.device("meta"), "use auto, cuda, cuda:N, mps or cpu"),
            ("device", "cuda:\u0663", "use auto, cuda, cuda:N, mps or cpu"),
            ("dtype", [], "use one of auto, bfloat16, float16, float32"),
            ("seed", 2**64, SEEDS),
            ("seed", -(2**63) - 1, SEEDS),
            ("tensor_parallel_size", 0, "whole number of at least 1"),
            ("tensor_parallel_size", -2, "whole number of at least 1"),
            ("max_model_len", 1, "whole number of at least 2"),
            ("max_model_len", 0, "whole number of at least 2"),
            ("max_num_seqs", 0, "whole number of at least 1"),
            ("max_num_batched_tokens", 0, "whole number of at least 1"),
            ("max_logprobs", -2, "whole number of at least -1"),
            ("kvcache_block_size", 0, "whole number of at least 1"),
            ("num_kvcache_blocks", -1, "whole number of at least 1"),
            ("gpu_memory_utilization", 0.0, "finite number from 0.01 to 1.0"),
            ("gpu_memory_utilization", 1.1, "finite number from 0.01 to 1.0"),
            ("gpu_memory_utilization", 90, "finite number from 0.01 to 1.0"),
            ("gpu_memory_utilization", math.nan, "finite number from 0.01 to 1.0"),
            ("model", "/no/such/folder", "not a directory; give the path of a downloaded"),
            ("model", "name", "or the name of one to download, as in 'Qwen/Qwen3-0.6B'"),
            ("model", "./org/name", "not a directory; give the path of a downloaded"),
            ("tokenizer", "/no/such/folder", "not a directory; give the path of a downloaded"),
        ],
    )
    def test_outside_the_range(self, here: str, name: str, value: Any, allowed: str) -> None:
        with pytest.raises(ValueError) as caught:
            EngineConfig.from_arguments(**{"model": here, name: value})
        message = str(caught.value)
        assert message.startswith((f"{name} is {value}", f"{name} is {value!r}"))
        assert allowed in message

    @pytest.mark.parametrize(
        ("name", "value", "allowed"),
        [
            ("model", None, "path of a checkpoint directory"),
            ("model", 7, "path of a checkpoint directory"),
            ("skip_tokenizer_init", 1, "True or False"),
            ("enforce_eager", "yes", "True or False"),
            ("enable_prefix_caching", None, "True or False"),
            ("tokenizer", 7, "must be a directory's path, or a name"),
            ("hf_overrides", "rope", "dictionary of config.json entries"),
            ("hf_overrides", [("a", 1)], "dictionary of config.json entries"),
            ("attention_backend", [], "auto or the name of a backend"),
            ("attention_backend", None, "auto or the name of a backend"),
            ("seed", 1.5, SEEDS),
            ("seed", None, SEEDS),
            ("tensor_parallel_size", "2", "whole number of at least 1"),
            ("tensor_parallel_size", True, "whole number of at least 1"),
            ("max_model_len", 1024.0, "whole number of at least 2"),
            ("max_num_seqs", None, "whole number of at least 1"),
            ("max_num_seqs", 8.5, "whole number of at least 1"),
            ("max_num_batched_tokens", "16384", "whole number of at least 1"),
            ("kvcache_block_size", 16.0, "whole number of at least 1"),
            ("num_kvcache_blocks", False, "whole number of at least 1"),
            ("gpu_memory_utilization", "0.9", "number from 0.01 to 1.0"),
            ("gpu_memory_utilization", None, "number from 0.01 to 1.0"),
        ],
    )
    def test_of_the_wrong_type(self, here: str, name: str, value: Any, allowed: str) -> None:
        with pytest.raises(TypeError) as caught:
            EngineConfig.from_arguments(**{"model": here, name: value})
        message = str(caught.value)
        assert message.startswith(f"{name} is {value!r}")
        assert allowed in message

    @pytest.mark.parametrize(
        "arguments",
        [
            {"seed": -1},
            {"seed": 2**64 - 1},
            {"max_model_len": 2},
            {"max_num_seqs": 1, "max_num_batched_tokens": 1, "kvcache_block_size": 1, "num_kvcache_blocks": 1},
            {"max_num_seqs": np.int64(7)},
            {"gpu_memory_utilization": 1},
            {"gpu_memory_utilization": 0.01},
            {"device": "cuda:3"},
            {"hf_overrides": None},
            {"hf_overrides": {"rope_theta": 5.0}},
        ],
        ids=str,
    )
    def test_the_edges_of_what_is_allowed(self, here: str, arguments: dict[str, Any]) -> None:
        EngineConfig.from_arguments(here, **arguments)

    def test_the_keys_of_overrides_are_names(self, here: str) -> None:
        with pytest.raises(TypeError, match=r"hf_overrides has the key 5 \(int\); its keys must be names"):
            EngineConfig(model=here, hf_overrides={5: 1})  # type: ignore[dict-item]

    @pytest.mark.parametrize(
        ("name", "given"),
        [
            ("max_num_batched_tokens", np.array(64)),
            ("max_num_seqs", np.int16(7)),
            ("max_model_len", np.uint8(200)),
            ("tensor_parallel_size", np.int8(1)),
            ("kvcache_block_size", torch.tensor(8)),
            ("num_kvcache_blocks", np.int32(9)),
            ("seed", np.uint64(2**64 - 1)),
            ("gpu_memory_utilization", np.float16(0.5)),
            ("gpu_memory_utilization", torch.tensor(0.25)),
            ("gpu_memory_utilization", 1),
            ("enforce_eager", np.True_),
            ("enable_prefix_caching", torch.tensor(False)),
            ("skip_tokenizer_init", np.array(True)),
        ],
        ids=lambda value: value if isinstance(value, str) else repr(value),
    )
    def test_numbers_of_any_kind_are_kept_as_pythons(self, here: str, name: str, given: Any) -> None:
        """An array could be changed in place afterwards, and a number of 16 bits overflows."""
        kept = getattr(EngineConfig(model=here, **{name: given}), name)
        default = getattr(EngineConfig(model=here), name)
        assert type(kept) is (int if default is None else type(default))
        assert kept == given

    @pytest.mark.parametrize(
        ("given", "name"),
        [
            (torch.device("cpu"), "cpu"),
            (torch.device("cpu", 0), "cpu"),
            (torch.device("mps:0"), "mps"),
            (torch.device("cuda"), "cuda"),
            (torch.device("cuda", 0), "cuda:0"),
            ("cuda:10", "cuda:10"),
        ],
        ids=str,
    )
    def test_devices_of_torch(self, here: str, given: Any, name: str) -> None:
        kept = EngineConfig(model=here, device=given).device
        assert (type(kept), kept) == (str, name)

    @pytest.mark.parametrize(
        ("given", "name"),
        [
            (torch.bfloat16, "bfloat16"),
            (torch.float32, "float32"),
            ("half", "float16"),
            ("float", "float32"),
            ("torch.float16", "float16"),
        ],
        ids=str,
    )
    def test_dtypes_by_their_other_names(self, here: str, given: Any, name: str) -> None:
        assert EngineConfig.from_arguments(here, dtype=given).dtype == name

    @pytest.mark.parametrize(
        ("wrong", "hint"),
        [
            ("max_model_length", "did you mean 'max_model_len'"),
            ("gpu_memory_utilisation", "did you mean 'gpu_memory_utilization'"),
            ("enforce_eagre", "did you mean 'enforce_eager'"),
            ("xyzzy", "known arguments: .*attention_backend.*tokenizer"),
            ("temperature", r"it goes into SamplingParams\(temperature=\.\.\.\)"),
            ("enable_thinking", r"it goes into chat\(\.\.\., chat_template_kwargs=\{'enable_thinking': \.\.\.\}\)"),
        ],
    )
    def test_unknown_arguments_are_refused_with_the_nearest(self, here: str, wrong: str, hint: str) -> None:
        with pytest.raises(TypeError, match=rf"LLM has no argument '{wrong}'; {hint}"):
            LLM(here, **{wrong: 1})

    def test_only_the_model_may_go_without_its_name(self, here: str) -> None:
        with pytest.raises(TypeError, match="positional"):
            LLM(here, here)  # type: ignore[misc]


class TestPaths:
    """The model's directory, in any form."""

    def test_path_objects(self, tmp_path: Path) -> None:
        config = EngineConfig.from_arguments(tmp_path, tokenizer=tmp_path)
        assert (config.model, config.tokenizer) == (os.fspath(tmp_path), os.fspath(tmp_path))

    def test_home_is_expanded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("USERPROFILE", str(tmp_path))
        (tmp_path / "model").mkdir()
        assert Path(EngineConfig.from_arguments("~/model").model) == tmp_path / "model"

    def test_a_file_is_not_a_directory(self, tmp_path: Path) -> None:
        file = tmp_path / "model.safetensors"
        file.touch()
        with pytest.raises(ValueError, match="a file; give the directory of a Hugging Face checkpoint"):
            EngineConfig.from_arguments(file)


class TestDevice:
    """What this machine lacks is said, not tried."""

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
    @pytest.mark.parametrize("device", ["cuda", "cuda:1"])
    def test_no_cuda(self, tiny_checkpoint: Path, device: str) -> None:
        with pytest.raises(ValueError, match=rf"device is '{device}', but torch .*, or use device='cpu'"):
            make_llm(tiny_checkpoint, device=device)

    def test_a_torch_without_cuda_is_to_be_replaced(
        self, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", None)
        monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
        message = (
            r"device is 'cuda', but torch 2\.9\.1\+cpu was built without CUDA; install a build for CUDA \(pytorch.org"
        )
        with pytest.raises(ValueError, match=message):
            make_llm(tiny_checkpoint, device="cuda")

    @pytest.mark.parametrize(("visible", "told"), [(None, ""), ("", r" \(CUDA_VISIBLE_DEVICES is ''\)")])
    def test_a_torch_with_cuda_sees_no_gpu(
        self, tiny_checkpoint: Path, visible: str | None, told: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        message = rf"but torch .* sees no GPU; .*nvidia-smi.* new enough for CUDA 12\.8{told}, or use device='cpu'"
        with pytest.raises(ValueError, match=message):
            make_llm(tiny_checkpoint, device="cuda")

    @pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has MPS")
    def test_no_mps(self, tiny_checkpoint: Path) -> None:
        with pytest.raises(ValueError, match=r"device is 'mps', but torch .* finds none here; use device='cpu'"):
            make_llm(tiny_checkpoint, device="mps")

    @pytest.mark.gpu
    def test_no_such_card(self, tiny_checkpoint: Path) -> None:
        with pytest.raises(ValueError, match="device is 'cuda:99', but there are"):
            make_llm(tiny_checkpoint, device="cuda:99")

    def test_auto_takes_what_there_is(self, tiny_checkpoint: Path) -> None:
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        with make_llm(tiny_checkpoint, device="auto") as llm:
            assert llm.get_metrics()["device"].startswith(best)
