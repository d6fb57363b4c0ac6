"""``nanovllm trace``: what is recorded is what the scheduler did, and what is written of it can be read."""

import gzip
import io
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings

from nanovllm import LLM, SamplingParams
from nanovllm.cli import main
from nanovllm.cli.trace import read_requests
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.diagnostics.books import Books, Event
from nanovllm.diagnostics.recorder import Recorder, record
from nanovllm.diagnostics.run_record import RunRecord
from nanovllm.diagnostics.trace_page import page_data, trace_page
from nanovllm.engine import scheduler
from nanovllm.utils.random_requests import Workload as RandomWorkload
from tests.simulation import Simulation
from tests.test_scheduler_properties import Workload, perform, workloads

# ---- the record


def books_of(simulation: Simulation) -> dict[str, Any]:
    """The block manager's own books."""
    manager = simulation.manager
    blocks = range(manager.num_blocks)
    return {
        "tables": {seq.number: list(seq.block_table) for seq in simulation.scheduler.running if seq.block_table},
        "holders": {block: manager.num_holders(block) for block in blocks if manager.num_holders(block)},
        "published": {block for block in blocks if manager.is_published(block)},
    }


class Witness(Recorder):
    """Keeps the manager's books after each planned step, besides what the recorder notes."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation.scheduler, check=True)
        self.simulation = simulation
        self.seen: list[dict[str, Any]] = []

    def _close(self) -> None:
        is_plan = self._segment.phase == "plan"
        super()._close()
        if is_plan:
            self.seen.append(books_of(self.simulation))


@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(workloads())
def test_replaying_the_events_gives_the_block_managers_books_at_every_step(workload: Workload) -> None:
    simulation = Simulation(**workload.limits)
    witness = Witness(simulation)
    plans: list[Any] = []
    launch = simulation.launch

    def launched() -> Any:
        plan = launch()
        if plan is not None:
            plans.append((plan.num_tokens, plan.num_prefill_tokens, list(zip(plan.starts, plan.lengths, strict=True))))
        return plan

    with (
        mock.patch.object(scheduler, "HEADROOM_TOKENS", workload.headroom),
        mock.patch.object(simulation, "launch", launched),
    ):
        for place, (kind, details) in enumerate(workload.operations):
            if place == len(workload.operations) // 4:
                witness.start()  # in the middle of a run
                plans.clear()
            perform(simulation, kind, details)
        simulation.run()
        witness.stop()
    run = witness.record
    assert run.violations == []
    replayed = [(step, books.tables, books.holders, books.published) for step, books in copied(run)]
    assert [(tables, holders, known) for _, tables, holders, known in replayed] == [
        (seen["tables"], seen["holders"], seen["published"]) for seen in witness.seen
    ]
    for step, _, holders, known in replayed:
        assert step.num_held == len(holders)
        assert step.num_cached == len(known - set(holders))
    kept = [step for step in run.steps if not step.was_taken_back]
    assert [
        (s.num_prefill_tokens + s.num_decode_tokens, s.num_prefill_tokens, [(r.start, r.length) for r in s.rows])
        for s in kept
    ] == plans
    finished = {event.sequence: event.value for event in run.events("finished")}
    for seq in simulation.sequences:
        if seq.number in run.sequences:
            assert run.sequences[seq.number].num_output_tokens == seq.num_output_tokens
            assert finished[seq.number] == seq.finish_reason


def copied(run: RunRecord) -> Iterator[tuple[Any, Books]]:
    """As ``replay``, with books of its own for each step."""
    for step, books in run.replay():
        copy = Books()
        copy.tables = {number: list(table) for number, table in books.tables.items()}
        copy.holders, copy.published = dict(books.holders), set(books.published)
        yield step, copy


def test_the_scheduler_is_as_before_once_the_recording_has_ended() -> None:
    simulation = Simulation()
    before = dict(vars(simulation.scheduler)), dict(vars(simulation.manager))
    recorder = Recorder(simulation.scheduler)
    recorder.start()
    with pytest.raises(RuntimeError, match="recorded already"):
        Recorder(simulation.scheduler).start()
    recorder.stop()
    assert (vars(simulation.scheduler), vars(simulation.manager)) == before


def test_books_that_are_wrong_are_told() -> None:
    simulation = Simulation()
    recorder = Recorder(simulation.scheduler, check=True)
    recorder.start()
    sequence = simulation.add([1, 2, 3, 4, 5])
    simulation.launch()
    simulation.manager._ref_counts[sequence.block_table[0]] += 1
    recorder._check_everything()
    simulation.manager._ref_counts[sequence.block_table[0]] -= 1
    recorder.stop()
    assert any("held 1 times" in violation and "step 0" in violation for violation in recorder.record.violations)


def test_events_that_cannot_be_are_refused() -> None:
    books = Books()
    books.apply(Event("allocated", 0, (1, 2)))
    for event, reason in [
        (Event("allocated", 1, (2,)), "held 1 times"),
        (Event("shared", 1, (3,)), "holds nothing that is known"),
        (Event("freed", 0, (1,)), "not those it holds"),
        (Event("evicted", blocks=(4,)), "was not published"),
    ]:
        with pytest.raises(ValueError, match=reason):
            books.apply(event)


# ---- a run of an engine


@pytest.fixture(scope="module")
def scarce() -> RunRecord:
    """A run with too few blocks and a common prefix."""
    workload = RandomWorkload.parse("10:4-20:20-40:32")
    with (
        LLM(DEMO_MODEL_PATH, device="cpu", num_kvcache_blocks=18, max_num_seqs=4) as llm,
        record(llm, check=True) as run,
    ):
        requests = workload.draw(0, llm.engine.model_config.vocab_size)
        params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in requests.output_lens]
        outputs = llm.generate(requests.prompts, params, use_tqdm=False)
        run.engine["outputs"] = [len(output.outputs[0].token_ids) for output in outputs]
        run.engine["metrics"] = llm.get_metrics()
    return run


def test_a_scarce_run_shows_preemptions_prefix_hits_and_evictions(scarce: RunRecord) -> None:
    totals, metrics = scarce.totals(), scarce.engine["metrics"]
    assert scarce.violations == []
    assert totals["preemptions"] == metrics["num_preemptions"] > 0
    assert totals["prefix_hits"] > 0
    assert totals["blocks_evicted"] > 0
    # Within the planning of a step more may have been held, until somebody was preempted.
    assert 16 <= totals["peak_blocks_held"] <= metrics["peak_kvcache_blocks_used"] == 18
    assert totals["prefill_tokens"] == metrics["prefill_tokens"]
    assert totals["output_tokens"] == metrics["output_tokens"] == sum(scarce.engine["outputs"])
    assert [seq.num_output_tokens for seq in scarce.sequences.values()] == scarce.engine["outputs"]
    states = {span.state for span in scarce.spans()}
    assert states >= {"queued", "prefill", "decode", "preempted"}


def test_times_are_in_order(scarce: RunRecord) -> None:
    times = [time for step in scarce.steps for time in (step.begin, step.launched, step.landed, step.end)]
    assert times == sorted(times)  # type: ignore[type-var]
    assert times[0] >= 0  # type: ignore[operator]
    assert times[-1] <= scarce.seconds  # type: ignore[operator]


def test_spans_cover_each_sequence_from_its_arrival_to_its_end(scarce: RunRecord) -> None:
    for number in scarce.sequences:
        spans = [span for span in scarce.spans() if span.sequence == number]
        assert all(after.first == before.last + 1 for before, after in itertools.pairwise(spans))
        assert spans[0].first == 0
        assert spans[-1].state == "decode"
    rows = {(row.sequence, step.number) for step in scarce.steps for row in step.rows}
    shown = {
        (span.sequence, step)
        for span in scarce.spans()
        if span.state in ("prefill", "decode")
        for step in range(span.first, span.last + 1)
    }
    assert shown == rows


def decoded(data: dict[str, Any]) -> list[set[tuple[int, int, int]]]:
    """The rows (sequence, start, length) of each step, as the page's script reads them."""
    decoding: dict[int, int] = {}
    found = []
    for line in data["steps"]:
        prefill, began, ended = line[6:9]
        for sequence in ended:
            del decoding[sequence]
        decoding = {sequence: position + 1 for sequence, position in decoding.items()}
        decoding.update(zip(began[::2], began[1::2], strict=True))
        rows = {(sequence, position, 1) for sequence, position in decoding.items()}
        rows |= set(zip(prefill[::4], prefill[1::4], prefill[2::4], strict=True))
        found.append(rows)
    return found


def test_the_page_holds_what_was_recorded(scarce: RunRecord) -> None:
    data = page_data(scarce)
    places = {number: place for place, number in enumerate(scarce.sequences)}
    assert decoded(data) == [
        {(places[row.sequence], row.start, row.length) for row in step.rows} for step in scarce.steps
    ]
    kinds = [data["kinds"][event[0]] for _, _, events in data["segments"] for event in events]
    assert kinds == [event.kind for event in scarce.events()]


def test_the_page_needs_nothing_but_itself(scarce: RunRecord) -> None:
    page = trace_page(scarce)
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(|<link|\bsrc=|import\(|fetch\(|XMLHttpRequest", page)
    assert "default-src 'none'" in page
    assert not re.search(r"/\*(STYLE|SCRIPT|DATA)\*/", page)
    [data] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert json.loads(data) == json.loads(json.dumps(page_data(scarce)))


def test_a_prompt_cannot_end_the_pages_data(scarce: RunRecord) -> None:
    first = next(iter(scarce.sequences.values()))
    with mock.patch.object(first, "prompt", "<!--<script></script><script>alert(1)</script>"):
        page = trace_page(scarce)
    assert page.count("</script>") == trace_page(scarce).count("</script>")
    assert page.count("<!--") == trace_page(scarce).count("<!--"), "with <script after it, it hides the data's end"


def test_a_page_of_two_hundred_requests_stays_small() -> None:
    simulation = Simulation(num_blocks=2000, block_size=16, max_num_seqs=64, max_num_batched_tokens=512)
    recorder = Recorder(simulation.scheduler)
    recorder.start()
    for number in range(200):
        simulation.add([number % 23, *([number % 7] * (50 + number))], max_tokens=150)
    with mock.patch.object(simulation.scheduler, "check_integrity"):
        simulation.run()
    recorder.stop()
    assert len(recorder.record.steps) > 400
    assert len(trace_page(recorder.record).encode()) < 1e6


def test_the_perfetto_trace_has_every_step(scarce: RunRecord, tmp_path: Path) -> None:
    scarce.write_perfetto(tmp_path / "run.json.gz")
    trace = json.loads(gzip.decompress((tmp_path / "run.json.gz").read_bytes()))
    events = trace["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert [event["args"]["step"] for event in slices if event["cat"] == "step"] == [s.number for s in scarce.steps]
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in slices)
    assert {event["ph"] for event in events} == {"M", "X", "C", "i"}
    assert (
        sum(event["ph"] == "i" and event["name"] == "preempted" for event in events) == scarce.totals()["preemptions"]
    )
    for track in {(event["pid"], event["tid"]) for event in slices}:  # slices of a track lie apart, or in one another
        on_track = sorted((e["ts"], -e["dur"]) for e in slices if (e["pid"], e["tid"]) == track)
        ends: list[float] = []
        for begin, minus in on_track:
            while ends and ends[-1] <= begin + 0.002:
                ends.pop()
            assert not ends or begin - minus <= ends[-1] + 0.002
            ends.append(begin - minus)


def test_steps_that_overlap_have_tracks_of_their_own() -> None:
    simulation = Simulation(depth=1)
    recorder = Recorder(simulation.scheduler)
    recorder.start()
    simulation.add([1, 2, 3], max_tokens=6)
    simulation.run()
    recorder.stop()
    from nanovllm.diagnostics.perfetto import run_events

    steps = [event for event in run_events(recorder.record) if event.get("cat") == "step"]
    assert {event["tid"] for event in steps} == {2, 3}


# ---- the command


def run_trace(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    with redirect_stdout(io.StringIO()) as printed:
        assert main(["trace", *arguments, "--html", str(tmp_path / "t.html"), "--json", "--device", "cpu"]) == 0
    return json.loads(printed.getvalue())


def test_json_is_printed_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["trace", "--workload", "2:3-4:2-3", "--json", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["sequences"]) == 2
    assert "2 sequences in" in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["trace.html"]


def test_prompts_are_asked_as_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--temperature", "0", "--max-num-seqs", "1", "--check"]
    found = run_trace(tmp_path, "--chat", "add 12 and 30", "count from 3 to 9", *options)
    assert [seq["finish_reason"] for seq in found["sequences"]] == ["stop", "stop"]
    assert "user\nadd 12 and 30<|im_end|>" in found["sequences"][0]["prompt"]
    assert found["totals"]["longest_queue"] == 1
    assert found["is_checked"]
    assert str(DEMO_MODEL_PATH) not in (tmp_path / "t.html").read_text("utf-8")
    assert "right after every operation" in capsys.readouterr().err


def test_prompts_are_completed_as_they_stand_and_conversations_are_always_chat(tmp_path: Path) -> None:
    rows = ["add 12 and 30", '{"messages": [{"role": "user", "content": "add 12 and 30"}]}']
    (tmp_path / "prompts.txt").write_text("\n".join(rows), encoding="utf-8")
    found = run_trace(tmp_path, "--file", str(tmp_path / "prompts.txt"), "--max-tokens", "2", "--think", "off")
    plain, chat = (seq["prompt"] for seq in found["sequences"])
    assert plain == "add 12 and 30"
    assert chat.endswith("</think>\n\n")


def test_a_file_of_prompts_is_run(tmp_path: Path) -> None:
    rows = [
        "count from 3 to 9",
        '{"prompt": "add 1 and 2"}',
        '{"messages": [{"role": "user", "content": "hello"}]}',
        "",
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(rows), encoding="utf-8")
    found = run_trace(tmp_path, "--file", str(tmp_path / "prompts.txt"), "--max-tokens", "4", "--no-prefix-caching")
    assert len(found["sequences"]) == 3
    assert found["totals"]["prefix_hits"] == 0
    assert found["engine"]["workload"] == "3 prompts"


def test_a_line_of_a_file_ends_at_a_newline_only(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text('{"prompt": "a\u2028b\x85c"}\nd\x0ce\n', encoding="utf-8")
    assert read_requests(str(path)) == ["a\u2028b\x85c", "d\x0ce"]


def test_a_line_that_is_nested_too_deeply_is_told(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("hello\n" + '{"prompt":' * 100_000, encoding="utf-8")
    with pytest.raises(ValueError, match="line 2 is nested too deeply"):
        read_requests(str(path))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_file_that_cannot_be_written_does_not_cost_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept.json"
    files = ["--html", "/dev/full", "--perfetto", str(kept)]
    assert main(["trace", "hello", "--max-tokens", "2", "--device", "cpu", *files]) == 2
    assert json.loads(kept.read_text())["traceEvents"]
    assert "/dev/full could not be written: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "3:4"], "workload '3:4' is not N:PROMPT_LO"),
        (["--workload", "3:8-4:1-2"], "runs backwards"),
        (["--workload", "3:8:4", "hello"], "only one of them"),
        (["--workload", "3:8:4", "--max-tokens", "9"], "--max-tokens needs prompts"),
        (["--chat"], "--chat needs prompts"),
        (["--chat-template-kwargs", "{}"], "--chat-template-kwargs needs prompts"),
        (["hello", "--chat-template-kwargs", "{}"], "--chat-template-kwargs needs --chat"),
        (["--file", "missing.txt"], "missing.txt"),
        (["--html", "nowhere/t.html"], "its folder does not exist"),
        (["--html", "."], "it is a folder"),
        (["--file", f"{DEMO_MODEL_PATH}/model.safetensors"], "model.safetensors is not UTF-8 text ("),
        (["--max-tokens", "5"], "--max-tokens needs prompts or --file"),
        (["--workload", "2:3-4:5-6", "--think", "off"], "--think needs prompts or --file"),
        (["--think", "off", "add 1 and 2"], "--think needs --chat"),
        (["--file", "nowhere.txt"], "nowhere.txt: No such file"),
        (["--perfetto", "."], "it is a folder"),
        (["--html", "t.out", "--perfetto", "./t.out"], "are one file"),
        (["--workload", "999999999999:1-2:1-2"], "1,999,999,999,998 prompt tokens; at most 100,000,000"),
        (["--workload", "2:1-8:1-2:99999999"], "prompt tokens; at most 100,000,000"),
        (["--num-kvcache-blocks", "0"], "num_kvcache_blocks is 0"),
        (["--workload", "2:100:100", "--num-kvcache-blocks", "2"], "num_kvcache_blocks"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["trace", "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_books_that_are_wrong_are_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["trace", "hello", "--max-tokens", "2", "--device", "cpu", "--html", str(tmp_path / "t.html")]
    with mock.patch.object(scheduler.Scheduler, "check_integrity", side_effect=RuntimeError("a block is lost")):
        assert main(arguments) == 1
    assert "the block manager's books are wrong" in capsys.readouterr().out
    assert "a block is lost" in (tmp_path / "t.html").read_text("utf-8")


def test_help_names_an_example() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nanovllm", "trace", "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    assert "nanovllm trace --workload" in done.stdout


# ---- the log


def test_preemptions_are_logged_and_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="nanovllm")
    simulation = Simulation(num_blocks=8, block_size=2, max_num_seqs=4)
    with mock.patch.object(scheduler, "HEADROOM_TOKENS", 0):
        for _ in range(30):
            simulation.add([1, 2], max_tokens=12)
        simulation.run()
    messages = [(entry.levelname, entry.getMessage()) for entry in caplog.records]
    preemptions = [text for level, text in messages if level == "INFO" and text.startswith("preempted request")]
    assert len(preemptions) == simulation.scheduler.num_preemptions >= scheduler.MANY_PREEMPTIONS
    [warning] = [text for level, text in messages if level == "WARNING"]
    assert "8 KV blocks of 2 tokens" in warning
    assert "raise num_kvcache_blocks" in warning
