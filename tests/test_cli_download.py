"""nanovllm download: what is fetched, resumed, checked, and what is said when it cannot be."""

import json
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM, hub
from nanovllm.cli import main
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.hub import contents
from nanovllm.utils.file_lock import lock
from tests.fake_hub import COMMIT, FakeHub, serve_hub

NAME = "Somebody/Demo-2M"


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with the demo checkpoint, and files of other kinds beside it; the working directory is an empty one."""
    folder = tmp_path / "remote"
    shutil.copytree(DEMO_MODEL_PATH, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for name in ("README.md", "pytorch_model.bin", "model-q8.gguf", "original/config.json", "onnx/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not needed")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with serve_hub() as served:
        served.repositories[NAME] = folder
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        yield served


def split(folder: Path) -> list[str]:
    """Put the weights of a checkpoint into two files with an index; returns the files' names."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return list(parts)


def error_line(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["download", *argv]) == 2
    line = capsys.readouterr().err.splitlines()[-1]  # progress bars come before
    assert line.startswith("nanovllm: error: ")
    return line


# ---- what comes


def test_only_what_is_needed_comes_and_the_checkpoint_works(
    remote: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["download", NAME, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    needed = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    here = Path("Demo-2M")
    assert {path.name for path in here.iterdir()} == {*needed, hub.NOTE_FILE}
    assert set(report["files"]) == needed
    assert report["bytes"] == sum((here / name).stat().st_size for name in needed)
    assert (report["revision"], report["architecture"]) == (COMMIT, "Qwen3ForCausalLM")
    assert report["path"] == str(here.absolute())
    with LLM(here, device="cpu") as llm:
        assert llm.generate("hello", use_tqdm=False)[0].outputs[0].token_ids


def test_shards_are_those_of_the_index(remote: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    shards = split(remote.repositories[NAME])
    shutil.copy(remote.repositories[NAME] / shards[0], remote.repositories[NAME] / "consolidated.safetensors")
    assert main(["download", NAME, "--local-dir", "model"]) == 0
    assert sorted(path.name for path in Path("model").glob("*.safetensors")) == shards
    assert "nanovllm chat --model model" in capsys.readouterr().out


def test_what_is_there_is_not_fetched_again(remote: FakeHub) -> None:
    hub.download(NAME)
    before = len(remote.sent)
    assert before >= 5
    assert hub.download(NAME).path == Path("Demo-2M")
    assert len(remote.sent) == before


def test_a_download_that_was_cut_off_resumes_where_it_stopped(
    remote: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    remote.cut["model.safetensors"] = 3_000_000

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.time.sleep", interrupted)  # before it would try again
        assert main(["download", NAME]) in (130, 2)  # 2 of a huggingface_hub that does not try again
    assert "the same command resumes" in capsys.readouterr().err
    [unfinished] = Path("Demo-2M").glob("*.incomplete")
    assert unfinished.stat().st_size == 3_000_000
    assert main(["download", NAME]) == 0
    assert remote.sent[-1] == ("model.safetensors", 3_000_000)
    assert not unfinished.exists()
    whole = remote.repositories[NAME] / "model.safetensors"
    assert Path("Demo-2M/model.safetensors").read_bytes() == whole.read_bytes()


def test_the_beginning_of_another_revision_is_not_continued(remote: FakeHub) -> None:
    hub.download(NAME)
    weights = Path("Demo-2M/model.safetensors")
    stale = Path("Demo-2M/model.safetensors.0123456789ab.incomplete")
    weights.rename(stale)
    hub.download(NAME)
    assert remote.sent[-1] == ("model.safetensors", 0)
    assert weights.exists()
    assert not stale.exists()


def test_a_file_of_the_same_size_and_other_content_is_fetched_again(remote: FakeHub) -> None:
    hub.download(NAME)
    new = remote.repositories[NAME] / "generation_config.json"
    new.write_text(new.read_text().replace("0.6", "0.7"))
    hub.download(NAME)
    assert remote.sent[-1] == ("generation_config.json", 0)
    assert "0.7" in Path("Demo-2M/generation_config.json").read_text()


def test_what_comes_damaged_is_not_kept(
    remote: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def get(url: str, file: Any, *, expected_size: int, **options: Any) -> None:
        file.write(b"x" * expected_size)

    monkeypatch.setattr("huggingface_hub.file_download.http_get", get)
    assert f"config.json of {NAME} came damaged: it is not what {remote.url} says" in error_line(capsys, NAME)
    assert [path.name for path in Path("Demo-2M").iterdir()] == [hub.NOTE_FILE]


# ---- what is refused before anything large comes


def test_an_architecture_that_cannot_run_is_refused_before_its_weights_come(
    remote: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    config = remote.repositories[NAME] / "config.json"
    config.write_text(json.dumps({"architectures": ["MambaForCausalLM"], "d_model": 12}))
    line = error_line(capsys, NAME)
    assert f"{NAME} is of the architecture MambaForCausalLM, which is not supported; supported: Qwen3ForC" in line
    assert "model.safetensors" not in [name for name, _ in remote.sent]


def test_a_full_disk_is_told_before_the_weights_come(
    remote: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(contents.shutil, "disk_usage", lambda place: usage(10**9, 0, contents.SPARE_BYTES + 2**20))
    line = error_line(capsys, NAME)
    size = (remote.repositories[NAME] / "model.safetensors").stat().st_size
    assert f"Demo-2M takes {size:,} more bytes, and {contents.SPARE_BYTES + 2**20:,} are free on its disk" in line
    assert "--local-dir" in line
    assert "model.safetensors" not in [name for name, _ in remote.sent]


def test_a_second_download_into_one_folder_waits_its_turn(remote: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    """Both would append to the same unfinished files."""
    assert main(["download", NAME]) == 0
    with Path("Demo-2M", hub.NOTE_FILE).open("a") as running:
        lock(running, "nobody else has it")
        assert "another download into Demo-2M is running" in error_line(capsys, NAME)
    assert main(["download", NAME]) == 0


def test_a_folder_of_something_else_is_left_alone(remote: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    Path("Demo-2M").mkdir()
    Path("Demo-2M/config.json").write_text("mine")
    assert "Demo-2M is not empty, and not of an earlier download; name another" in error_line(capsys, NAME)
    assert Path("Demo-2M/config.json").read_text() == "mine"
    Path("file").touch()
    assert "file is a file; name a folder" in error_line(capsys, NAME, "--local-dir", "file")
    remote.repositories["Else/Demo-2M"] = remote.repositories[NAME]
    assert main(["download", NAME, "--local-dir", "m"]) == 0
    assert f"m holds a download of {NAME}; name" in error_line(capsys, "Else/Demo-2M", "--local-dir", "m")


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "https://host/a/b", "a/b/c", "../x"])
def test_what_is_no_name_is_said(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{name!r} is not the name of a repository; write OWNER/NAME" in error_line(capsys, name)


def test_a_repository_without_weights_is_named(remote: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    (remote.repositories[NAME] / "model.safetensors").unlink()
    assert f"{NAME} has no *.safetensors file" in error_line(capsys, NAME)
    shards = split_demo(remote)
    (remote.repositories[NAME] / shards[1]).unlink()
    assert f"{NAME} lacks {shards[1]}, which its model.safetensors.index.json names" in error_line(capsys, NAME)


def test_what_is_no_checkpoint_leaves_no_folder(remote: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    (remote.repositories[NAME] / "config.json").unlink()
    assert f"{NAME} is no checkpoint that can be loaded: it has no config.json" in error_line(capsys, NAME)
    assert not Path("Demo-2M").exists()


def split_demo(remote: FakeHub) -> list[str]:
    shutil.copy(Path(DEMO_MODEL_PATH, "model.safetensors"), remote.repositories[NAME])
    return split(remote.repositories[NAME])


# ---- what the hub says


def test_errors_of_the_hub_are_one_line_each(remote: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"has no model {NAME}x, or it is private; check the spelling" in error_line(capsys, f"{NAME}x")
    assert f"{NAME} has no revision 'v9'; name another, or none for" in error_line(capsys, NAME, "--revision", "v9")
    remote.gated.add(NAME)
    line = error_line(capsys, NAME)
    assert f"{NAME} is gated: accept its terms at {remote.url}/{NAME}, then log in" in line
    assert "HF_TOKEN" in line
    remote.status = 418
    assert f"{remote.url} answered {NAME} with HTTP status 418; try again later" in error_line(capsys, NAME)


def test_without_a_network_the_cause_and_the_ways_out_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    line = error_line(capsys, NAME)
    assert "http://127.0.0.1:9 cannot be reached (" in line
    assert "refused" in line
    assert "proxy (HTTPS_PROXY) or a mirror (HF_ENDPOINT)" in line
    assert list(tmp_path.iterdir()) == []


def test_offline_mode_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import HfApi, errors

    def refuse(*args: object, **kwargs: object) -> None:
        raise errors.OfflineModeIsEnabled("cannot reach it: offline mode is enabled")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HfApi, "model_info", refuse)
    assert "HF_HUB_OFFLINE is set; unset it, or copy the folder" in error_line(capsys, NAME)


# ---- what is checked afterwards


def test_weights_are_checked(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(DEMO_MODEL_PATH, folder)
    shards = split(folder)
    hub.check_weights(folder)
    data = (folder / shards[0]).read_bytes()
    for damaged in (data[:-5], b"\xff" * 8 + data[8:]):
        (folder / shards[0]).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{shards[0]} is damaged \(.*download again"):
            hub.check_weights(folder)
    save_file({"other": torch.zeros(1)}, folder / shards[0])
    with pytest.raises(ValueError, match=rf"{shards[0]} lacks .*, which model.safetensors.index.json says it holds"):
        hub.check_weights(folder)
    (folder / shards[0]).unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks {shards[0]}"):
        hub.check_weights(folder)


def test_weights_of_another_checkpoint_in_the_folder_are_noticed(
    remote: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["download", NAME]) == 0
    split(remote.repositories[NAME])
    assert "Demo-2M also holds model.safetensors, which is not of" in error_line(capsys, NAME)
