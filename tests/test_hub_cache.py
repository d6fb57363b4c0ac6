"""LLM("OWNER/NAME"): taken from the Hugging Face cache, or downloaded into it, and what is said when neither goes."""

import argparse
import errno
import io
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
from transformers import AutoTokenizer

from nanovllm import LLM
from nanovllm.cli import main
from nanovllm.cli.main import COMMANDS
from nanovllm.config import EngineConfig
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.hub import HubError, contents, find_checkpoint
from nanovllm.hub.cache import WAIT_SECONDS
from nanovllm.utils.file_lock import lock
from nanovllm.utils.model_name import model_name
from tests.fake_hub import COMMIT, FakeHub, serve_hub

ROOT = Path(__file__).resolve().parent.parent
NAME = "Somebody/Demo-2M"
FOLDER = "models--Somebody--Demo-2M"
NEEDED = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the working directory is an empty one, too."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    return tmp_path / "cache"


@pytest.fixture
def remote(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with the demo checkpoint."""
    folder = tmp_path / "remote"
    shutil.copytree(DEMO_MODEL_PATH, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (folder / "pytorch_model.bin").write_text("not needed")
    with serve_hub() as served:
        served.repositories[NAME] = folder
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        yield served


@pytest.fixture
def cached(cache: Path) -> Path:
    """The snapshot that other programs have left in the cache; there is no network."""
    return put(cache)


def put(cache: Path) -> Path:
    entry = cache / FOLDER
    snapshot = entry / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name in NEEDED:
        shutil.copy(Path(DEMO_MODEL_PATH, name), snapshot)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(COMMIT)
    return snapshot


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


# ---- what is there


def test_a_name_is_downloaded_once_into_the_cache_of_all(remote: FakeHub, cache: Path) -> None:
    with LLM(NAME, device="cpu") as llm:
        assert llm.generate("hello", use_tqdm=False)[0].outputs[0].token_ids
        found = Path(llm.engine.config.model)
    assert found == cache / FOLDER / "snapshots" / COMMIT
    assert {path.name for path in found.iterdir()} == NEEDED
    assert (cache / FOLDER / "refs" / "main").read_text() == COMMIT
    assert sorted(name for name, _ in remote.sent) == sorted(NEEDED)
    remote.status = 500  # and is not asked again
    assert find_checkpoint(NAME) == find_checkpoint(NAME, COMMIT) == find_checkpoint(NAME, "main") == str(found)
    # Others find it.
    for name in NEEDED:
        assert Path(huggingface_hub.hf_hub_download(NAME, name, local_files_only=True, cache_dir=cache)).is_file()
    assert AutoTokenizer.from_pretrained(NAME, local_files_only=True, cache_dir=cache).encode("hello")


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_files_are_kept_once_by_their_hash(remote: FakeHub, cache: Path) -> None:
    weights = Path(find_checkpoint(NAME), "model.safetensors")
    assert weights.is_symlink()
    assert weights.resolve().parent == (cache / FOLDER / "blobs").resolve()
    assert not list(cache.rglob("*.incomplete"))


def test_without_links_the_files_themselves_are_there(
    remote: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("A required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    found = Path(find_checkpoint(NAME))
    assert {path.name for path in found.iterdir() if path.is_file() and not path.is_symlink()} == NEEDED
    assert find_checkpoint(NAME) == str(found)
    assert len(remote.sent) == len(NEEDED)


def test_what_others_have_downloaded_is_taken_without_a_network(cached: Path) -> None:
    before = sorted(path for path in cached.parent.parent.rglob("*"))
    assert find_checkpoint(NAME) == str(cached)
    assert sorted(path for path in cached.parent.parent.rglob("*")) == before


def test_what_others_have_left_out_is_completed(remote: FakeHub, cache: Path) -> None:
    snapshot = put(cache)
    (snapshot / "generation_config.json").unlink()  # its sampling parameters would silently be others
    assert find_checkpoint(NAME) == str(snapshot)
    assert remote.sent == [("generation_config.json", 0)]


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_a_chat_template_in_a_file_of_its_own_is_completed(remote: FakeHub, cache: Path, kind: str) -> None:
    snapshot = put(cache)
    config = snapshot / "tokenizer_config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    template = values.pop("chat_template")
    for folder in (snapshot, remote.repositories[NAME]):
        (folder / config.name).write_text(json.dumps(values), encoding="utf-8")
    (remote.repositories[NAME] / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert find_checkpoint(NAME, kind=kind) == str(snapshot)
    assert remote.sent == [("chat_template.jinja", 0)]
    assert AutoTokenizer.from_pretrained(snapshot).chat_template == template


def test_a_model_without_a_chat_template_is_asked_for_it_once(remote: FakeHub, cache: Path) -> None:
    snapshot = put(cache)
    for folder in (snapshot, remote.repositories[NAME]):
        (folder / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    assert find_checkpoint(NAME) == str(snapshot)
    remote.status = 500
    assert find_checkpoint(NAME) == find_checkpoint(NAME, kind="tokenizer") == str(snapshot)
    assert remote.sent == []


def test_a_damaged_file_is_replaced(remote: FakeHub, cache: Path) -> None:
    snapshot = put(cache)
    os.truncate(snapshot / "model.safetensors", 100_000)
    assert find_checkpoint(NAME) == str(snapshot)
    assert remote.sent == [("model.safetensors", 0)]


def test_what_a_repository_does_not_have_is_not_asked_for_again(remote: FakeHub, cache: Path) -> None:
    (remote.repositories[NAME] / "generation_config.json").unlink()
    found = find_checkpoint(NAME)
    remote.status = 500
    assert find_checkpoint(NAME) == found


def test_a_download_that_was_cut_off_resumes_where_it_stopped(
    remote: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    remote.cut["model.safetensors"] = 3_000_000
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.time.sleep", interrupted)  # before it would try again
        with pytest.raises((KeyboardInterrupt, HubError)):
            find_checkpoint(NAME)
    assert not (cache / FOLDER / "snapshots" / COMMIT / "model.safetensors").exists()
    found = find_checkpoint(NAME)
    assert remote.sent[-1] == ("model.safetensors", 3_000_000)
    assert Path(found, "model.safetensors").read_bytes() == Path(DEMO_MODEL_PATH, "model.safetensors").read_bytes()


def test_a_second_process_waits_for_the_first(remote: FakeHub, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = cache / ".locks" / FOLDER / "nanovllm.lock"
    path.parent.mkdir(parents=True)
    found: list[str] = []
    with path.open("a") as file, caplog.at_level(logging.WARNING, "nanovllm"):
        lock(file, "nobody else has it")
        second = threading.Thread(target=lambda: found.append(find_checkpoint(NAME)))
        second.start()
        second.join(3 * WAIT_SECONDS)
        assert second.is_alive()
        put(cache)  # as the first does
    second.join(30)
    assert found == [str(cache / FOLDER / "snapshots" / COMMIT)]
    assert remote.sent == []
    assert [record.message for record in caplog.records] == [f"another process is downloading {NAME}; waiting for it"]


# ---- what is asked for


def test_a_directory_wins_over_a_name(cached: Path) -> None:
    here = Path(NAME)
    shutil.copytree(DEMO_MODEL_PATH, here)
    assert find_checkpoint(NAME) == NAME
    with pytest.raises(ValueError, match="a directory, which has no revision 'v1'; leave revision out"):
        EngineConfig.from_arguments(NAME, revision="v1")
    assert EngineConfig.from_arguments(here, download_dir="x").model == os.fspath(here)


@pytest.mark.parametrize("path", [Path(NAME), f"./{NAME}", f"/{NAME}", f"{NAME}/", "Demo-2M", f"more/{NAME}"])
def test_a_path_is_no_name(cached: Path, path: str | Path) -> None:
    with pytest.raises(ValueError, match="is not a directory; give the path of a downloaded"):
        find_checkpoint(path)


def test_a_file_of_a_checkpoint_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it a name, which it may look like."""
    monkeypatch.chdir(tmp_path)
    file = Path("folder", "model.safetensors")
    file.parent.mkdir()
    file.touch()
    for path in (str(file), "./folder/model.safetensors", file.absolute()):
        with pytest.raises(ValueError, match=r"model is '.*model\.safetensors', a file; give the directory of"):
            find_checkpoint(path)


def test_another_folder_for_the_cache(remote: FakeHub, cache: Path, tmp_path: Path) -> None:
    config = EngineConfig.from_arguments(NAME, download_dir=tmp_path / "mine", revision=COMMIT)
    assert Path(config.model) == tmp_path / "mine" / FOLDER / "snapshots" / COMMIT
    assert not (tmp_path / "mine" / FOLDER / "refs").exists()  # a commit is not a branch
    assert not cache.exists()


def test_of_a_tokenizer_only_its_files_come(remote: FakeHub) -> None:
    config = EngineConfig.from_arguments(DEMO_MODEL_PATH, tokenizer=NAME)
    assert config.model == DEMO_MODEL_PATH
    assert config.tokenizer is not None
    assert "model.safetensors" not in os.listdir(config.tokenizer)
    find_checkpoint(NAME, kind="tokenizer")
    assert len(remote.sent) == len(NEEDED) - 1
    find_checkpoint(NAME)  # for a model, the weights are missing
    assert remote.sent[-1] == ("model.safetensors", 0)


def test_the_tokenizer_is_of_the_models_revision_unless_told(remote: FakeHub, cache: Path) -> None:
    assert EngineConfig.from_arguments(NAME, revision=COMMIT).tokenizer is None
    both = EngineConfig.from_arguments(NAME, tokenizer=NAME, revision=COMMIT)
    assert both.tokenizer == both.model
    with pytest.raises(HubError, match=r"tokenizer is 'Somebody/Demo-2M'.* has no revision 'v9'"):
        EngineConfig.from_arguments(NAME, tokenizer_revision="v9")


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_a_token_is_sent_with_every_request_and_not_kept(
    remote: FakeHub, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    names = {"model": (NAME, None), "tokenizer": (DEMO_MODEL_PATH, NAME)}[kind]
    with caplog.at_level(logging.DEBUG, "nanovllm"):
        config = EngineConfig.from_arguments(names[0], tokenizer=names[1], hf_token=" hf_secret\n")
    assert len(remote.tokens) > 3
    assert set(remote.tokens) == {"Bearer hf_secret"}
    assert "hf_secret" not in repr(config) + caplog.text


def test_the_token_of_the_machine(remote: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "nowhere")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(HubError, match="hf_token is True for Somebody/Demo-2M, and there is no token here; log in"):
        find_checkpoint(NAME, token=True)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    find_checkpoint(NAME, token=False)
    assert set(remote.tokens) == {None}
    find_checkpoint(NAME, "main", Path("another"), token=True)
    assert remote.tokens[-1] == "Bearer hf_mine"


def test_a_token_that_the_hub_does_not_accept_is_told(remote: FakeHub) -> None:
    remote.status = 401
    with pytest.raises(
        HubError, match=r"does not accept the token .* for Somebody/Demo-2M with; give a valid"
    ) as caught:
        LLM(NAME, hf_token="hf_secret")
    assert "hf_secret" not in str(caught.value)


def test_what_is_no_token_is_not_shown(remote: FakeHub) -> None:
    for token in ("", "hf_secret\nhf_more", "hf_s\u00e9cret"):
        with pytest.raises(ValueError, match=r"^hf_token is empty, or has characters that no token has; copy it"):
            LLM(NAME, hf_token=token)
    with pytest.raises(TypeError, match=r"^hf_token is a bytes; it must be a token's text, True, False or None$"):
        LLM(NAME, hf_token=b"hf_secret")  # type: ignore[arg-type]
    assert remote.tokens == []


def test_mistakes_are_told_before_anything_comes(remote: FakeHub) -> None:
    with pytest.raises(ValueError, match="max_num_seqs is 0"):
        LLM(NAME, max_num_seqs=0)
    with pytest.raises(TypeError, match="LLM has no argument 'revison'; did you mean 'revision'"):
        LLM(NAME, revison="main")
    with pytest.raises(TypeError, match="revision is 3"):
        LLM(NAME, revision=3)  # type: ignore[arg-type]
    config = remote.repositories[NAME] / "config.json"
    config.write_text(json.dumps({"architectures": ["MambaForCausalLM"]}))
    with pytest.raises(ValueError, match="of the architecture MambaForCausalLM, which is not supported"):
        LLM(NAME)
    assert "model.safetensors" not in [name for name, _ in remote.sent]


def test_other_ranks_get_a_directory(cached: Path) -> None:
    """They are handed the configuration, so that they neither look nor download."""
    config = pickle.loads(pickle.dumps(EngineConfig.from_arguments(NAME, tensor_parallel_size=2)))
    assert config.model == str(cached)


# Something small for each command that loads a model.
COMMAND_ARGUMENTS = {
    "generate": ["hello", "--max-tokens", "2", "--tokenizer", NAME],
    "chat": ["--max-tokens", "2", "--tokenizer", NAME],
    "batch": ["in.jsonl", "out.jsonl", "--max-tokens", "2", "--tokenizer", NAME],
    "inspect": ["--section", "config", "--tokenizer", NAME],
    "compare": ["--token-ids", "1,2", "--max-tokens", "1", "--tokenizer", NAME],
    "trace": ["hello", "--max-tokens", "2", "--json", "--tokenizer", NAME],
    "profile": ["--batch-size", "1", "--prompt-len", "2", "--output-len", "2", "--rounds", "1", "--tokenizer", NAME],
    "bench": ["--workload", "1:2-2:2-2"],
}


def test_all_commands_that_load_a_model_are_tried_with_a_name() -> None:
    commands = argparse.ArgumentParser().add_subparsers()
    for name in COMMANDS:
        import_module(f"nanovllm.cli.{name}").add_parser(commands)
    parsers = commands.choices.items()
    assert [name for name, parser in parsers if "--model" in parser._option_string_actions] == list(COMMAND_ARGUMENTS)


@pytest.mark.parametrize("command", COMMAND_ARGUMENTS)
def test_commands_take_names(
    cached: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    Path("in.jsonl").write_text('{"prompt": "hello"}\n', encoding="utf-8")
    given = [command, "--model", NAME, "--device", "cpu", *COMMAND_ARGUMENTS[command]]
    assert main([*given, *(["--revision", COMMIT] if command != "bench" else [])]) == 0
    if command in ("generate", "bench"):
        assert NAME in "".join(capsys.readouterr())
    if command != "bench":
        assert main([*given, "--revision", "v9"]) == 2
        assert "here and, revision 'v9', not wholly in the cache" in capsys.readouterr().err


def test_settings_to_compare_take_names(cached: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["compare", "--max-tokens", "1", "--settings", f"model={NAME}", "--against", f"tokenizer={NAME}"]
    assert main([*given, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("equal within tolerance")


def test_a_snapshot_is_called_as_its_repository(cached: Path) -> None:
    assert model_name(cached) == NAME
    assert model_name("/models/Qwen3-0.6B") == "Qwen3-0.6B"
    assert model_name("x") == "x"


# ---- what is said


def test_offline_nothing_is_asked_and_the_ways_out_are_told(
    remote: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    offline(monkeypatch)
    assert main(["generate", "hello", "--model", NAME]) == 2
    assert capsys.readouterr().err == (
        f"nanovllm: error: model is '{NAME}', which is no directory here and not wholly in the cache {cache}; it "
        f"cannot be downloaded, for HF_HUB_OFFLINE is set; unset it, or run 'nanovllm download {NAME}' where there is "
        "a network; or give the path of a checkpoint\n"
    )
    assert remote.sent == []
    assert not cache.exists()


def test_offline_what_suffices_is_used(
    cached: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (cached / "generation_config.json").unlink()
    offline(monkeypatch)
    with caplog.at_level(logging.WARNING, "nanovllm"):
        assert find_checkpoint(NAME) == str(cached)
    assert "lacks generation_config.json and is used as it is: it cannot be downloaded, for HF_HUB_OFF" in caplog.text
    (cached / "model.safetensors").unlink()
    with pytest.raises(HubError, match="not wholly in the cache"):
        find_checkpoint(NAME)
    assert find_checkpoint(NAME, kind="tokenizer") == str(cached)


def test_the_environment_counts(cached: Path, tmp_path: Path) -> None:
    """Its variables are read when huggingface_hub is imported, so in a process of its own."""
    code = f"from nanovllm.hub import find_checkpoint; print(find_checkpoint({NAME!r}))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    places = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    shutil.move(cached.parents[2], tmp_path / "hub")
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment, **places}, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == str(tmp_path / "hub" / FOLDER / "snapshots" / COMMIT), done.stderr


def test_what_the_hub_refuses_is_one_sentence_each(remote: FakeHub, cache: Path) -> None:
    where = f"which is no directory here and not wholly in the cache {cache}; "
    with pytest.raises(HubError, match=r"has no model Somebody/Demo-2Mx, or it is private; .*HF_TOKEN") as caught:
        find_checkpoint(f"{NAME}x")
    assert str(caught.value).startswith(f"model is '{NAME}x', {where}")
    with pytest.raises(HubError, match=r"here and, revision 'v9', not wholly .* has no revision 'v9'; name another"):
        find_checkpoint(NAME, "v9")
    remote.gated.add(NAME)
    with pytest.raises(HubError, match=r"Somebody/Demo-2M is gated: accept its terms .*HF_TOKEN"):
        find_checkpoint(NAME)


def test_without_a_network_the_cause_is_told(cache: Path) -> None:
    with pytest.raises(HubError, match=r"127\.0\.0\.1:9 cannot be reached .*HF_ENDPOINT.* or give the path of a check"):
        find_checkpoint(NAME)


def test_a_cache_that_cannot_be_written_to_is_named(remote: FakeHub, cache: Path) -> None:
    cache.touch()
    with pytest.raises(OSError, match=r"Demo-2M cannot be downloaded into the cache .*; name another with HF_HOME"):
        find_checkpoint(NAME)


@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_of_a_cache_that_cannot_be_written_to_what_suffices_is_used(
    remote: FakeHub, cache: Path, call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that many read and few may write; as root, and on Windows, permissions would not do."""
    snapshot = put(cache)
    (snapshot / "generation_config.json").unlink()
    as_ever: Any = getattr(Path, call)

    def refuse(path: Path, *args: Any, **kwargs: Any) -> Any:
        if cache in path.parents and (call == "mkdir" or "a" in args):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return as_ever(path, *args, **kwargs)

    monkeypatch.setattr(Path, call, refuse)
    with caplog.at_level(logging.WARNING, "nanovllm"):
        assert find_checkpoint(NAME) == str(snapshot)
    assert "lacks generation_config.json and is used as it is: [Errno" in caplog.text
    (snapshot / "config.json").unlink()
    with pytest.raises(OSError, match=r"into the cache .* \(Read-only file system\); name another with HF_HOME"):
        find_checkpoint(NAME)


def test_a_full_disk_is_told_before_the_weights_come(remote: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": contents.SPARE_BYTES + 2**20})
    monkeypatch.setattr(contents.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(ValueError, match=r"more bytes, and [\d,]+ are free .* on another disk with HF_HOME or downl"):
        find_checkpoint(NAME)
    assert "model.safetensors" not in [name for name, _ in remote.sent]
