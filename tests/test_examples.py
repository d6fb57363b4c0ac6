"""The scripts in ``examples/`` run with the demo checkpoint, and print what they promise."""

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
Run = Callable[..., str]


def load(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example with arguments; returns what it printed."""

    def run_example(name: str, *argv: str) -> str:
        load(name).main(["--model", DEMO_MODEL_PATH, *argv])
        return capsys.readouterr().out

    return run_example


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_each_says_how_to_run_it_and_is_listed(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = load(example.stem)
    assert f"\npython examples/{example.name}" in str(module.__doc__)
    with pytest.raises(SystemExit) as done:
        module.main(["--help"])
    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert "--model" in printed
    assert "OWNER/NAME" in printed
    assert f"examples/{example.name}" in (ROOT / "docs" / "examples.md").read_text("utf-8")
    assert f"[{example.stem}](examples/{example.name})" in (ROOT / "README.md").read_text("utf-8")


def test_chat_remembers_what_was_said(run: Run) -> None:
    out = run("chat", "my name is Ada.", "add 12 and 30", "what is my name?")
    answers = re.findall(r"^model: (.*)$", out, re.M)
    assert answers == ["Nice to meet you, Ada!", "12 + 30 = 42", "Your name is Ada."]
    cached = [int(number) for number in re.findall(r"(\d+) of them cached", out)]
    assert cached[0] == 0
    assert cached[2] > 0


def test_chat_reads_what_is_typed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("my name is Ada.\nwhat is my name?\n\nnot any more\n"))
    out = run("chat")
    assert out.count("model: ") == 2
    assert "you: what is my name?\nmodel: Your name is Ada.\n" in out


def test_streaming(run: Run) -> None:
    out = run("streaming")
    assert "The prime numbers up to 50: 2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47.\n" in out
    for answer in ("12 + 30 = 42 (stop)", "3, 4, 5, 6, 7, 8, 9 (stop)", "stone river apple (stop)"):
        assert answer in out
    assert out.endswith("\n1, 2, 3, 4, 5\nunfinished requests: 0\n")


def test_batch_jsonl_continues(run: Run, tmp_path: Path) -> None:
    out = run("batch_jsonl", "--directory", str(tmp_path))
    assert "first run: 20 answered, 0 done before, 0 errors\n" in out
    assert "after a crash: 5 answered, 15 done before, 0 errors\n" in out
    assert "once more: 0 answered, 20 done before, 0 errors\n" in out
    assert int(re.findall(r"(\d+) of 20 sums are right", out)[0]) >= 19
    lines = (tmp_path / "answers.jsonl").read_text("utf-8").splitlines()
    assert len({json.loads(line)["custom_id"] for line in lines}) == 20


def test_scoring_finds_the_right_answers(run: Run) -> None:
    out = run("scoring")
    assert re.findall(r"^  \* (.*?)  ", out, re.M) == [
        "96 - 48 = 48",
        "12, 31, 58, 77",
        "stone river apple",
        "3, 4, 5, 6, 7, 8, 9",
    ]
    assert out.endswith("4 of 4 right\n")


def test_prefix_sharing_computes_the_beginning_once(run: Run) -> None:
    out = run("prefix_sharing", "--questions", "12")
    on, off = (
        tuple(map(int, numbers))
        for numbers in re.findall(r"(\d+) of (\d+) prompt tokens cached, [\d.]+ s, (\d+) of 12 right", out)
    )
    assert on[0] > 0.5 * on[1]
    assert off[0] == 0
    assert on[1] == off[1]
    assert on[2] >= 6
    assert abs(on[2] - off[2]) <= 2  # but for rounding, the answers are the same


@pytest.mark.parametrize("temperature", ["0", "3"])
def test_structured_output_follows_the_schema(run: Run, temperature: str) -> None:
    pytest.importorskip("llguidance", reason="the example needs llguidance")
    out = run("structured_output", "--temperature", temperature)
    records = [json.loads(line) for line in re.findall(r"^  by the schema:  (.*)$", out, re.M)]
    assert [list(record) for record in records] == [["age", "name", "city", "work"]] * 3
    for record in records:
        assert 0 <= record["age"] <= 150
        assert re.fullmatch("[A-Z][a-z]{1,11}", record["name"])
        assert record["work"] in ("crafts", "school", "travel")
    if temperature == "0":
        assert [(record["age"], record["city"]) for record in records] == [(41, "Oslo"), (25, "Paris"), (63, "Rome")]


def test_structured_output_follows_each_completion_of_a_request() -> None:
    pytest.importorskip("llguidance", reason="the example needs llguidance")
    example = load("structured_output")
    with LLM(DEMO_MODEL_PATH, device="cpu") as llm:
        follow = example.FollowSchema(example.from_tokenizer(llm.get_tokenizer()), example.SCHEMA)
        params = SamplingParams(n=3, temperature=2, seed=1, max_tokens=128, logits_processors=[follow])
        texts = [one.text for one in llm.generate("a JSON record:", params, use_tqdm=False)[0].outputs]
    assert len({json.loads(text)["name"] for text in texts}) == 3


def test_structured_output_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("structured_output")
    monkeypatch.setattr(example, "LLMatcher", None)
    with pytest.raises(SystemExit, match="this example needs llguidance: pip install llguidance"):
        example.main([])


@pytest.mark.skipif(os.name == "nt", reason="several processes share a model on Linux and macOS")
def test_tensor_parallel_gives_the_same_answers() -> None:
    """In a process of its own, as a user runs it."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "tensor_parallel.py")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    bytes_of_block = [int(number) for number in re.findall(r"(\d+) bytes a KV block each", done.stdout)]
    assert bytes_of_block[0] == 2 * bytes_of_block[1]
    assert "\n  96 - 48 = 48\n" in done.stdout
    assert done.stdout.endswith("3 of 3 answers are those of one rank\n")


def test_sampling(run: Run) -> None:
    out = run("sampling")
    texts: dict[str, list[str]] = {}
    for what, text in re.findall(r"^(\w.{23}) (['\"].*)$", out, re.M):
        texts.setdefault(what.strip(), []).append(text)
    right = repr(", ".join(map(str, range(1, 13))))
    assert texts["greedy"] == [right]
    assert texts["seed 1"][0] == texts["seed 1"][1] != texts["seed 2"][0]
    assert len(texts["n=3"]) == len(texts["n=3, top_p=0.3"]) == 3
    assert len(set(texts["n=3"])) == 3
    assert texts["warming up"][0].startswith("'1, 2, 3")
    assert texts["sudden, at token 16"][0].startswith("'1, 2, 3, 4, 5, ")
    for what in ("without sevens", "with logit_bias"):
        assert texts[what][0].startswith("'1, 2, 3, 4, 5, 6")
        assert "7" not in texts[what][0]
