"""nanovllm generate: prompts from the command line and from stdin, streamed, listed or as JSON."""

import io
import json
import sys

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.cli import main
from nanovllm.demo import DEMO_MODEL_PATH

QUESTION = "add 12 and 30"
OFF = ["--chat-template-kwargs", '{"enable_thinking": false}']
GREEDY = ["--temperature", "0", "--device", "cpu"]


def output_of(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[str, str]:
    """What goes to stdout and stderr."""
    assert main(["generate", *argv, *GREEDY]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["generate", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_one_prompt_gives_its_text_alone_and_a_line_about_speed(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = output_of(capsys, QUESTION, "--chat", *OFF)
    assert out == "12 + 30 = 42\n"
    assert "output tok/s), the first after " in err
    assert "the demo checkpoint on cpu" in err
    assert "--chat" not in err
    assert err.count("\n") == 1


def test_a_plain_prompt_is_continued_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = output_of(capsys, "12 + 30", "--max-tokens", "3")
    with LLM(DEMO_MODEL_PATH, device="cpu") as llm:
        [output] = llm.generate("12 + 30", SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
    assert out.removesuffix("\n") == output.outputs[0].text.removesuffix("\n")
    assert "--chat asks it a question instead of continuing a text" in err
    assert "cut off (--max-tokens allows more)" in err


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["--max-model-len", "8"], "(--max-model-len allows up to 4096 tokens of prompt and output instead of 8)"),
        (["--max-model-len", "8", "--max-tokens", "2"], "(--max-tokens allows more)"),
    ],
)
def test_what_would_give_a_longer_answer_is_told(
    capsys: pytest.CaptureFixture[str], argv: list[str], hint: str
) -> None:
    assert f"cut off {hint}" in output_of(capsys, "12", "--ignore-eos", *argv)[1]


def test_thinking_is_switched_by_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert output_of(capsys, QUESTION, "--chat", "--think", "off")[0] == "12 + 30 = 42\n"
    assert output_of(capsys, QUESTION, "--chat", "--think", "on")[0].startswith("<think>")
    assert "--think needs --chat" in refused(capsys, QUESTION, "--think", "off")


def test_a_completion_is_printed_as_it_is_made(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, seen = LLM.stream, []

    def watched(self: LLM, *args: object) -> object:
        for piece in stream(self, *args):  # type: ignore[arg-type]
            yield piece
            seen.append(capsys.readouterr().out)

    monkeypatch.setattr(LLM, "stream", watched)
    output_of(capsys, QUESTION, "--chat", *OFF)
    assert len([text for text in seen if text]) > 3


def test_several_completions_are_listed_below_their_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = output_of(capsys, QUESTION, "count from 3 to 5", "--chat", *OFF)
    assert out == ">>> add 12 and 30\n12 + 30 = 42\n\n>>> count from 3 to 5\n3, 4, 5\n\n"
    out, _ = output_of(capsys, QUESTION, "--chat", "--n", "2", *OFF)
    assert out == "".join(f">>> {QUESTION}  ({number})\n12 + 30 = 42\n\n" for number in (1, 2))


def test_json_has_texts_token_ids_reasons_and_counts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n"))
    report = json.loads(output_of(capsys, "-", "count from 1 to 9", "--chat", "--json", "--max-tokens", "12", *OFF)[0])
    first, second = report["outputs"]
    assert first["prompt"] == QUESTION
    [completion] = first["completions"]
    assert completion["text"] == "12 + 30 = 42"
    assert completion["finish_reason"] == "stop"
    assert completion["output_tokens"] == len(completion["token_ids"]) > 5
    assert second["completions"][0]["finish_reason"] == "length"
    assert report["output_tokens"] == completion["output_tokens"] + 12
    assert report["prompt_tokens"] == first["prompt_tokens"] + second["prompt_tokens"]
    assert report["time_to_first_token_seconds"] <= report["seconds"]


def test_stop_strings_and_the_system_message(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = output_of(capsys, QUESTION, "--chat", "--stop", "=", *OFF)
    assert out == "12 + 30 \n"
    out, _ = output_of(capsys, QUESTION, "--chat", "--stop", "\\n")  # the thinking begins with a line of its own
    assert out == "<think>\n"
    report = json.loads(output_of(capsys, QUESTION, "--chat", "--json", *OFF)[0])
    longer = json.loads(output_of(capsys, QUESTION, "--chat", "--json", "--system", "be brief", *OFF)[0])
    assert longer["prompt_tokens"] > report["prompt_tokens"]


def test_the_same_command_gives_the_same_answer_and_another_seed_another(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "hello", "--temperature", "2", "--top-k", "0", "--top-p", "1", "--max-tokens", "12"]
    texts = []
    for seed in ("1", "1", "2"):
        assert main([*argv, "--seed", seed, "--device", "cpu"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "nothing came from stdin; pipe a text in" in refused(capsys, "-")
    assert "stdin can be read once" in refused(capsys, "-", "-")
    assert "--system needs --chat" in refused(capsys, "x", "--system", "y")
    assert "--chat-template-kwargs needs --chat" in refused(capsys, "x", *OFF)
    assert "top_p is 3.0" in refused(capsys, "x", "--top-p", "3")
    assert "or the name of one to download, as in 'Qwen/Qwen3-0.6B'" in refused(capsys, "x", "--model", "Qwen3-0.6B")
    assert "the prompt is empty" in refused(capsys, "", "--device", "cpu")


def test_a_reader_that_has_seen_enough_is_no_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        assert main(["generate", "hello", "--device", "cpu", "--max-tokens", "2"]) == 1
    assert capsys.readouterr().err == ""
