"""bench.py --compare: turns, failures, and the table, figures and plot that come of it."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from nanovllm.benchmarks import bench, compare, plot, report
from nanovllm.benchmarks.compare import Comparison
from nanovllm.benchmarks.engine_process import EngineSpec
from nanovllm.utils.random_checkpoint import cached_random_checkpoint
from nanovllm.utils.random_requests import Requests, Workload
from tests.test_engine_process import fake_spec, noted_processes, wait_until_gone

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = Requests([[9]], [1])

needs_groups = pytest.mark.skipif(not hasattr(os, "killpg"), reason="engines are stopped with POSIX signals")


def requests_of(output_tokens: int) -> Requests:
    """Fake engines tell workloads apart by how many tokens they ask for."""
    return Requests([[1, 2]], [output_tokens])


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def fakes(tmp_path: Path, journal: Path) -> Any:
    """A comparison of fake engines, by name their settings; nanovllm comes first."""

    def make(timeout: float = 30.0, **settings: dict[str, Any]) -> Comparison:
        specs = [fake_spec(name, journal=str(journal), **more) for name, more in {"nanovllm": {}, **settings}.items()]
        return Comparison(specs, WARM_UP, timeout, tmp_path)

    return make


def runs(journal: Path) -> list[str]:
    """``"hf 6"`` for each time that hf was asked for 6 tokens, in order."""
    return [f"{m[1]} {m[2]}" for m in re.finditer(r"^(\S+) begins (\d+)$", journal.read_text(), re.M)]


WORKLOAD = Workload.parse("1:2-2:6-6")


# ------------------------------------------------------------------------------------------------------ turns


@needs_groups
def test_engines_warm_up_and_then_take_turns_round_by_round(fakes: Any, journal: Path) -> None:
    with fakes(vllm={}, hf={}) as comparison:
        entry = comparison.measure(WORKLOAD, requests_of(6), 3)
    assert runs(journal) == ["nanovllm 1", "vllm 1", "hf 1", *["nanovllm 6", "vllm 6", "hf 6"] * 3]
    assert {name: len(result["seconds"]) for name, result in entry["results"].items()} == {
        "nanovllm": 3,
        "vllm": 3,
        "hf": 3,
    }


@needs_groups
def test_nobody_else_moves_during_a_turn(fakes: Any, journal: Path) -> None:
    with fakes(vllm={"beat": True, "seconds": 0.2}, hf={"beat": True, "seconds": 0.2}) as comparison:
        comparison.measure(WORKLOAD, requests_of(6), 2)
    lines = journal.read_text().splitlines()
    turns = 0
    for name, other in (("vllm", "hf"), ("hf", "vllm"), ("nanovllm", "vllm"), ("nanovllm", "hf")):
        starts = [i for i, line in enumerate(lines) if line == f"{name} begins 6"]
        for start in starts:
            turn = lines[start : lines.index(f"{name} ends 6", start)]
            assert f"{other} beats" not in turn
            assert name == "nanovllm" or f"{name} beats" in turn  # so a beat would have been seen
            turns += 1
    assert turns == 8


@needs_groups
def test_medians_and_ratios_are_of_what_the_engines_report(fakes: Any) -> None:
    names = {"vllm": {"seconds": 0.1}, "nanovllm-int8": {"seconds": 0.05}}
    with fakes(nanovllm={"seconds": 0.2}, **names) as comparison:
        entry = comparison.measure(WORKLOAD, requests_of(6), 1)
        engines = comparison.describe()
    assert entry["results"]["vllm"]["output_tokens_per_second"] == pytest.approx(60)
    assert entry["ratios"] == {
        "nanovllm/vllm": pytest.approx(0.5),
        "nanovllm/nanovllm-int8": pytest.approx(0.25),
        "nanovllm-int8/nanovllm": pytest.approx(4),
        "nanovllm-int8/vllm": pytest.approx(2),
    }
    assert engines["vllm"]["setup"] == "vllm, a fake"
    assert engines["vllm"]["startup_seconds"] > 0
    assert engines["vllm"]["peak_memory_bytes"] > 2**22


# --------------------------------------------------------------------------------------------------- failures


@needs_groups
def test_a_failure_is_named_and_the_others_go_on(fakes: Any, journal: Path) -> None:
    with fakes(vllm={"fail_on": [6]}, hf={}) as comparison:
        first = comparison.measure(WORKLOAD, requests_of(6), 2)
        second = comparison.measure(WORKLOAD, requests_of(5), 1)
    assert first["results"]["vllm"] == {"error": "KeyError: 'no room\\nfor 6 tokens'", "seconds": []}
    assert len(first["results"]["hf"]["seconds"]) == 2
    assert first["ratios"].keys() == {"nanovllm/hf"}
    assert runs(journal).count("vllm 6") == 1  # out for this workload
    assert second["ratios"].keys() == {"nanovllm/vllm", "nanovllm/hf"}


@needs_groups
@pytest.mark.parametrize(
    ("settings", "message"), [({"die_on": [6]}, "ended with code 7"), ({"hang_on": [6]}, "took longer than 2 s")]
)
def test_who_dies_or_hangs_starts_again_for_the_next_workload(
    fakes: Any, journal: Path, settings: dict[str, Any], message: str
) -> None:
    with fakes(timeout=2.0, vllm=settings, hf={}) as comparison:
        first = comparison.measure(WORKLOAD, requests_of(6), 2)
        second = comparison.measure(WORKLOAD, requests_of(5), 1)
    assert message in first["results"]["vllm"]["error"]
    assert len(first["results"]["hf"]["seconds"]) == 2
    assert "error" not in second["results"]["vllm"]
    assert runs(journal)[-4:] == ["vllm 1", "nanovllm 5", "vllm 5", "hf 5"]  # warmed up again


@needs_groups
@pytest.mark.parametrize(
    ("settings", "message"),
    [({"load_error": "weights are missing"}, "RuntimeError: weights are missing"), ({"fail_on": [1]}, "KeyError")],
)
def test_who_does_not_start_takes_no_part(fakes: Any, settings: dict[str, Any], message: str) -> None:
    with fakes(vllm=settings, hf={}) as comparison:
        entry = comparison.measure(WORKLOAD, requests_of(6), 1)
        engines = comparison.describe()
    assert message in entry["results"]["vllm"]["error"]
    assert message in engines["vllm"]["error"]
    assert entry["ratios"].keys() == {"nanovllm/hf"}


@needs_groups
def test_without_nanovllm_there_are_no_ratios(fakes: Any) -> None:
    with fakes(nanovllm={"fail_on": [6]}, hf={}) as comparison:
        entry = comparison.measure(WORKLOAD, requests_of(6), 1)
    assert entry["ratios"] == {}
    assert "error" not in entry["results"]["hf"]


@needs_groups
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_or_an_interrupt_leaves_no_engine_behind(
    fakes: Any, journal: Path, error: type[BaseException]
) -> None:
    pids: list[int] = []

    def measure(comparison: Comparison) -> None:
        with comparison:
            pids.extend(noted_processes(journal))
            raise error

    with pytest.raises(error):
        measure(fakes(vllm={"beat": True}, hf={"escape": True}))
    assert len(pids) == 5
    assert wait_until_gone(pids)


@needs_groups
def test_an_interrupt_while_engines_start_leaves_none_behind(
    fakes: Any, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = fakes(vllm={"beat": True}, hf={})

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison.engines[2], "start", interrupted)
    with pytest.raises(KeyboardInterrupt), comparison:
        pass
    assert len(pids := noted_processes(journal)) == 3
    assert wait_until_gone(pids)


# ------------------------------------------------------------------------------------------ the command, whole


@pytest.fixture
def peers(tmp_path: Path) -> Path:
    """A folder of peers: the tiny checkpoint, and environments whose Python runs a fake engine."""
    folder = tmp_path / "peers"
    cached_random_checkpoint("tiny", folder)
    for name in ("tiny-openvino", "tiny-bf16.gguf", "tiny-q8_0.gguf"):
        (folder / name).touch()
    for name in ("vllm", "openvino", "llama", "hf"):
        python = folder / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        fails = {"fail_on": [4]} if name == "vllm" else {}
        settings = json.dumps({"name": name, "journal": str(tmp_path / "journal"), "hang_on": [17], **fails})
        python.write_text(f"#!/bin/sh\nFAKE_PEER='{settings}' exec '{sys.executable}' -m tests.fake_peer \"$@\"\n")
        python.chmod(0o755)
    return folder


def arguments(peers: Path, names: str, *more: str) -> list[str]:
    return ["--compare", names, "--peers", str(peers), "--random-weights", "tiny", *more]


@needs_groups
def test_a_comparison_gives_a_table_figures_and_a_plot(
    peers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stem = tmp_path / "found"
    workloads = ["--workload", "2:40-50:9-9", "--workload", "1:4-4:4-4:16"]
    names = "vllm,openvino,llama,llama-q8,hf,nanovllm-abacus"
    argv = arguments(peers, names, *workloads, "--repeats", "2", "--out", str(stem))
    assert bench.main(argv) == 1  # for two failures
    out = capsys.readouterr().out
    assert "failed: nanovllm-abacus, vllm; see " in out

    found = json.loads(Path(f"{stem}.json").read_text())
    assert found["model"] == "tiny, random weights"
    assert found["ours"] == ["nanovllm", "nanovllm-abacus"]
    assert found["hardware"]["ram_bytes"] > 2**28
    engines = ["nanovllm", "vllm", "openvino", "llama", "llama-q8", "hf", "nanovllm-abacus"]
    assert list(found["engines"]) == engines
    for name in engines[:-1]:
        assert found["engines"][name]["startup_seconds"] > 0
        assert found["engines"][name]["peak_memory_bytes"] > 2**22
        assert found["engines"][name]["setup"]
    assert "abacus" in found["engines"]["nanovllm-abacus"]["error"]
    first, second = found["workloads"]
    requests = Workload.parse("2:40-50:9-9").draw(0, 1024)
    assert (first["prompt_tokens"], first["output_tokens"]) == (requests.prompt_tokens, 18)
    assert list(first["results"]) == engines
    for name in engines[:-1]:
        result = first["results"][name]
        assert len(result["seconds"]) == 2
        assert result["median_seconds"] == pytest.approx(sum(result["seconds"]) / 2)
        assert result["output_tokens_per_second"] == pytest.approx(18 / result["median_seconds"])
    rates = {name: first["results"][name]["output_tokens_per_second"] for name in engines[:-1]}
    assert first["ratios"] == {
        f"nanovllm/{name}": pytest.approx(rates["nanovllm"] / rates[name]) for name in engines[1:-1]
    }
    assert "KeyError" in second["results"]["vllm"]["error"]

    sent = json.dumps([requests.prompts, requests.output_lens])
    assert (tmp_path / "journal").read_text().splitlines().count(sent) == 2 * 5  # rounds and peers

    page = Path(f"{stem}.md").read_text()
    for entry in found["workloads"]:
        table = report.workload_table(entry, found["ours"])
        assert table in page
        assert table in out
    assert Path(f"{stem}.png").stat().st_size > 10_000


@needs_groups
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_end_a_comparison_and_all_of_its_engines(peers: Path, tmp_path: Path, name: str) -> None:
    number = signal.Signals[name]
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip(f"{name} is ignored here, and so by what is started from here")
    argv = arguments(peers, "vllm,hf", "--workload", "1:4-4:17-17", "--out", str(tmp_path / "found"))  # hangs
    command = [sys.executable, "bench.py", *argv]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as run:
        journal = tmp_path / "journal"
        deadline = time.monotonic() + 120
        while not (journal.exists() and "vllm begins 17" in journal.read_text()):
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        pids = noted_processes(journal) + [child.pid for child in psutil.Process(run.pid).children(recursive=True)]
        run.send_signal(number)
        _, stderr = run.communicate(timeout=60)
    assert run.returncode == 130
    assert stderr == "interrupted\n"
    assert len(set(pids)) == 3  # nanovllm, vllm, hf
    assert wait_until_gone(pids)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    try:
        code = bench.main(list(argv))
    except SystemExit as error:
        code = error.code
    assert code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


@needs_groups
@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--compare", "tgi"], "invalid choice: 'tgi' (choose from vllm, openvino, llama, llama-q8, hf, nanovllm"),
        (["--compare", "nanovllm-"], "invalid choice: 'nanovllm-'"),
        (["--compare", "hf,hf"], "names an engine twice"),
        (["--engine", "hf"], "--engine exclude each other"),
        (["--device", "cuda"], "--device cuda exclude each other"),
        (["--dtype", "float32"], "--dtype float32 exclude each other"),
        (["--separately"], "--separately exclude each other"),
        (["--hf-batch-size", "2"], "--hf-batch-size exclude each other"),
        (["--out", "no/such/folder/x"], "--out no/such/folder/x: there is no such folder"),
        (["--timeout", "0"], "'0' is not a whole number of at least 1"),
        (["--workload", "1:4000-4000:97-97"], "4097 prompt and output tokens"),
    ],
)
def test_bad_input_gets_one_line(peers: Path, capsys: pytest.CaptureFixture[str], more: list[str], part: str) -> None:
    assert part in refused(capsys, *arguments(peers, "hf", "--workload", "1:4-4:3-3"), *more)


@needs_groups
def test_what_is_not_set_up_is_named_with_the_command_that_does(
    peers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (peers / "tiny-q8_0.gguf").unlink()
    line = refused(capsys, *arguments(peers, "llama-q8"), "--workload", "1:4-4:3-3")
    assert f"{peers / 'tiny-q8_0.gguf'} is missing" in line
    assert f"python tools/setup_peers.py {peers} --only llama --shape tiny" in line
    (peers / "vllm" / "bin" / "python").unlink()
    line = refused(capsys, *arguments(peers, "vllm"), "--workload", "1:4-4:3-3")
    assert f"{peers / 'vllm' / 'bin' / 'python'} is missing" in line
    assert "it has no config.json" in refused(capsys, "--compare", "hf", "--peers", str(peers))


def test_options_of_a_comparison_need_one(peers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--peers needs --compare" in refused(capsys, "--peers", str(peers))
    assert "--timeout needs --compare" in refused(capsys, "--timeout", "5")


@needs_groups
def test_a_missing_folder_or_matplotlib_is_said_before_anything_starts(
    peers: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--compare needs --peers" in refused(capsys, "--compare", "hf")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = refused(capsys, *arguments(peers, "hf"), "--workload", "1:4-4:3-3")
    assert 'drawn with matplotlib, which is not installed (pip install ".[bench]")' in line


def test_a_system_without_process_groups_is_refused(
    peers: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "killpg", raising=False)
    assert "signals, which this system does not have" in refused(capsys, *arguments(peers, "hf"))


# -------------------------------------------------------------------------------------------- what is started


def own(name: str) -> EngineSpec:
    return compare.own_spec(name, Path("/models/tiny"), {"longest": 9}, {"seed": 5})


def test_variants_of_nanovllm_are_named_after_their_quantization() -> None:
    assert own("nanovllm").settings == {
        "longest": 9,
        "model": str(Path("/models/tiny")),
        "arguments": {"seed": 5},
        "extra": {},
    }
    assert own("nanovllm-int8").settings["extra"] == {"quantization": "int8"}
    assert [compare.is_ours(name) for name in ("nanovllm", "nanovllm-int8", "nanovllm-", "hf")] == [
        True,
        True,
        False,
        False,
    ]


def test_peers_run_in_their_environments_without_this_one_s_paths(peers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/of/this/environment")
    spec = compare.peer_spec("llama-q8", peers, "tiny", {"seed": 5})
    assert spec.command == [str(peers / "llama" / "bin" / "python"), str(compare.LAUNCHER), "run_llama"]
    assert spec.settings == {"seed": 5, "model": str(peers / "tiny-q8_0.gguf")}
    assert spec.environment is not None
    assert "PYTHONPATH" not in spec.environment
    assert spec.environment["PATH"] == os.environ["PATH"]


# -------------------------------------------------------------------------------------------- table and plot


def found(engines: int = 3, workloads: int = 2, rounds: int = 3) -> dict[str, Any]:
    """A report with figures made up: the first engine is ours, the last one failed at the first workload."""
    names = ["nanovllm", *(f"engine-{i}" for i in range(1, engines))]
    requests = Requests([[1, 2]], [600])
    entries = []
    for number in range(workloads):
        results = {
            name: report.result_of([(i + 2) * (1 + 0.1 * r) for r in range(rounds)], requests)
            for i, name in enumerate(names)
        }
        if number == 0:
            results[names[-1]] = {"error": "RuntimeError: a | b", "seconds": []}
        entries.append(report.summarise(Workload.parse("1:2-2:600-600"), requests, results, names[:1]))
    about = {"setup": "version 1", "startup_seconds": 12.34, "peak_memory_bytes": 3 << 29}
    return {
        "date": "2030-01-02T03:04:05+00:00",
        "model": "tiny, random weights",
        "versions": {"nanovllm": "0", "commit": "abc"},
        "hardware": {"cpu": "An Abacus", "cores": 2, "threads": 4, "ram_bytes": 1 << 34},
        "options": {"repeats": rounds},
        "ours": names[:1],
        "engines": dict.fromkeys(names, about),
        "workloads": entries,
    }


def test_the_table_has_seconds_speed_and_ratio_of_every_engine() -> None:
    table = report.workload_table(found()["workloads"][0], ["nanovllm"])
    cells = [[cell.strip() for cell in line.split(" | ")] for line in table.splitlines()]
    assert cells[0] == ["**1:2-2:600-600** (2 prompt + 600 output tokens, medians of 3 rounds)"]
    assert cells[2] == ["|", "seconds", "fastest - slowest", "output tok/s", "nanovllm / it |"]
    assert cells[4] == ["| nanovllm", "2.20", "2.00 - 2.40", "272.7", "|"]
    assert cells[5] == ["| engine-1", "3.30", "3.00 - 3.60", "181.8", "1.50          |"]
    assert cells[6][:2] == ["| engine-2", "failed: RuntimeError: a \\| b"]
    alone = report.workload_table(found(rounds=1)["workloads"][1], ["nanovllm"])
    assert "fastest" not in alone
    assert "medians" not in alone


def test_the_page_says_what_each_engine_needs() -> None:
    page = report.page(found())
    assert "An Abacus, 2 cores, 4 threads, 16.00 GiB RAM; commit abc; 2030-01-02." in page
    assert re.search(r"\| engine-1 +\| version 1 +\| 12\.3 +\| 1\.50 GiB +\|", page)


@pytest.mark.parametrize(("engines", "workloads", "rounds"), [(1, 1, 1), (7, 5, 3)])
def test_a_plot_is_a_small_picture_on_white(tmp_path: Path, engines: int, workloads: int, rounds: int) -> None:
    image = pytest.importorskip("matplotlib.image")
    file = tmp_path / "plot.png"
    plot.draw(found(engines, workloads, rounds), file)
    assert file.stat().st_size < 200_000
    pixels = image.imread(file)
    height, width = pixels.shape[:2]
    assert width > 600
    assert height > 150
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert (pixels[row, column] == 1).all()
    if workloads == 5:  # three columns, two rows, and nothing where a sixth would be
        assert (pixels[height // 2 : -height // 10, -width // 4 :] == 1).all()
    ours = np.array([0xC2, 0x41, 0x0C]) / 255
    if engines > 1:  # or the only engine has failed
        assert (abs(pixels[..., :3] - ours).max(-1) < 0.01).mean() > 0.01


def test_a_plot_names_workloads_engines_and_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "plot.svg"
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot.draw(found(), file)
    text = file.read_text()
    for part in (
        "1:2-2:600-600",
        "1 request, 2 prompt + 600 output tokens",
        "engine-1",
        "273",
        "182",
        "failed",
        "An Abacus",
    ):
        assert part in text


def test_a_plot_can_be_drawn_again_from_the_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "f.json").write_text(json.dumps(found()))
    command = [sys.executable, "-m", "nanovllm.benchmarks.plot", str(tmp_path / "f.json"), str(tmp_path / "f.png")]
    subprocess.run(command, cwd=ROOT, check=True)
    assert (tmp_path / "f.png").exists()
    with pytest.raises(ValueError, match="no workload has been measured"):
        plot.draw({**found(), "workloads": []}, tmp_path / "none.png")
