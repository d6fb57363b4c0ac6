"""nanovllm chat: turns, commands, the prefix cache, and whatever interrupts them."""

import io
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.cli import main
from nanovllm.cli.chat import Chat
from nanovllm.cli.chat_session import ChatSession, ContextFullError, ThoughtSplitter
from nanovllm.demo import DEMO_MODEL_PATH

BLOCK = 16


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(DEMO_MODEL_PATH, device="cpu", kvcache_block_size=BLOCK, num_kvcache_blocks=64, max_model_len=256) as llm:
        yield llm


@pytest.fixture
def session(llm: LLM) -> ChatSession:
    llm.reset_prefix_cache()
    return ChatSession(llm, SamplingParams(temperature=0, max_tokens=None), {"enable_thinking": False})


def said(session: ChatSession, text: str) -> str:
    return "".join(part for is_thought, part in session.ask(text) if not is_thought)


def talk(session: ChatSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str) -> str:
    """What is printed when these lines come through a pipe."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    Chat(session, is_terminal=False).loop()
    return capsys.readouterr().out


def interrupt_after(llm: LLM, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ctrl-C come in the next answer after so many pieces."""
    stream = llm.stream

    def interrupted(*args: Any) -> Iterator[Any]:
        for number, piece in enumerate(stream(*args)):
            if number == pieces:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(llm, "stream", interrupted)


# ---- the conversation


def test_a_turn_reuses_the_blocks_of_those_before(session: ChatSession) -> None:
    for question in ("add 12 and 30", "what is 96 minus 48?", "say stone 3 times"):
        assert said(session, question)
    first, second, third = session.turns
    assert first.cached_tokens == 0
    # What the prompts have in common, in full blocks: at least all of the earlier prompt but for its last line.
    assert second.cached_tokens == (first.prompt_tokens - 5) // BLOCK * BLOCK > 0
    assert third.cached_tokens == (second.prompt_tokens - 5) // BLOCK * BLOCK > second.cached_tokens


def test_the_history_holds_answers_without_their_thinking(session: ChatSession) -> None:
    session.template_kwargs["enable_thinking"] = True
    parts = list(session.ask("add 12 and 30"))
    thoughts = "".join(text for is_thought, text in parts if is_thought)
    assert "1 + 3" in thoughts
    assert not any(tag in text for _, text in parts for tag in ("<think>", "</think>"))
    assert session.history == [
        {"role": "user", "content": "add 12 and 30"},
        {"role": "assistant", "content": "12 + 30 = 42"},
    ]
    assert session.turns[0].output_tokens > len(thoughts.split())


def test_the_answer_is_that_of_the_whole_conversation(session: ChatSession, llm: LLM) -> None:
    said(session, "add 12 and 30")
    second = said(session, "what is 96 minus 48?")
    messages = [*session.history[:2], {"role": "user", "content": "what is 96 minus 48?"}]
    [output] = llm.chat(messages, session.params, False, chat_template_kwargs=session.template_kwargs)
    assert second == output.outputs[0].text


def test_reset_forgets_and_the_system_message_stays(session: ChatSession) -> None:
    session.system = "be brief"
    said(session, "add 12 and 30")
    session.reset()
    said(session, "add 12 and 30")
    assert session.turns[0].prompt_tokens == session.turns[1].prompt_tokens
    assert session.turns[1].cached_tokens == session.turns[0].prompt_tokens // BLOCK * BLOCK


def test_a_conversation_without_room_is_told_and_stays_as_it_was(session: ChatSession) -> None:
    said(session, "add 12 and 30")
    before = list(session.history)
    with pytest.raises(ContextFullError, match=r"the conversation has \d+ tokens, and max_model_len is 256"):
        said(session, "copy these words: " + "stone " * 300)
    assert session.history == before
    assert said(session, "add 1 and 2") == "1 + 2 = 3"


def test_thinking_that_is_cut_off_leaves_no_turn_behind(session: ChatSession) -> None:
    session.template_kwargs["enable_thinking"] = True
    session.params = SamplingParams(temperature=0, max_tokens=4)
    assert said(session, "add 12 and 30") == ""
    assert session.history == []
    assert session.turns[0].finish_reason == "length"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_thoughts_are_told_from_answers_however_the_text_comes(size: int) -> None:
    text = "<think>\na < b, </thin\n</think>\n\n12 < 30 <thing>"
    splitter = ThoughtSplitter(is_open=False)
    parts = [part for start in range(0, len(text), size) for part in splitter.feed(text[start : start + size])]
    parts += splitter.feed("", is_last=True)
    assert "".join(piece for is_thought, piece in parts if is_thought) == "\na < b, </thin\n"
    assert "".join(piece for is_thought, piece in parts if not is_thought) == "\n\n12 < 30 <thing>"


def test_a_prompt_may_have_opened_the_thinking() -> None:
    assert list(ThoughtSplitter(is_open=True).feed("a</think>b", is_last=True)) == [(True, "a"), (False, "b")]


# ---- the terminal


def test_lines_from_a_pipe_are_answered(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("add 12 and 30\n\nwhat is 96 minus 48?\n/stats\n"))
    assert main(["chat", "--think", "off", "--temperature", "0", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    answers, stats = captured.out.split("last turn")
    assert answers == "12 + 30 = 42\n96 - 48 = 48\n"
    assert "(16 from the cache)" in stats
    assert captured.err == ""


def test_thoughts_are_marked(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = talk(session, monkeypatch, capsys, "/think on\nadd 12 and 30\n")
    assert out == "(thinking is on)\n(thinks) 2 + 0 + 0 = 2\n1 + 3 + 0 = 4\n\n12 + 30 = 42\n"


def test_commands(session: ChatSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "/stats\n/system be brief\n/system\n/think\n/think maybe\n/foo\n/help\n"
    lines += "add 1 and 2\n/reset\n/exit\nadd 3 and 4\n"
    out = talk(session, monkeypatch, capsys, lines).splitlines()
    assert out[:6] == [
        "(nothing has been asked yet)",
        "(the system message is set)",
        "(there is no system message)",
        "(use /think on or /think off)",
        "(use /think on or /think off, not 'maybe')",
        "(there is no command /foo; /help lists them, and a space before the / makes it a message)",
    ]
    assert out[-2:] == ["1 + 2 = 3", "(a new conversation)"]
    assert session.history == []


def test_a_message_of_several_lines_and_one_that_begins_with_a_slash(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(session, monkeypatch, capsys, "add 1\\\nand 2\n /reset me\nlast\\\n")
    questions = [message["content"] for message in session.history if message["role"] == "user"]
    assert questions == ["add 1\nand 2", "/reset me", "last"]


def test_a_message_that_is_no_text_is_told_and_the_conversation_goes_on(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = talk(session, monkeypatch, capsys, "a\udcff\nadd 12 and 30\n")
    assert "messages is not valid Unicode" in out
    assert "12 + 30 = 42" in out


def test_a_full_conversation_names_the_remedy_and_goes_on(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = talk(session, monkeypatch, capsys, f"say {'stone ' * 300}\nadd 1 and 2\n").splitlines()
    assert "max_model_len is 256" in out[0]
    assert out[1].startswith("(/reset begins a new conversation; --max-model-len allows up to ")
    assert out[2] == "1 + 2 = 3"


def test_answers_that_are_cut_off_say_by_what(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session.params = SamplingParams(temperature=0, max_tokens=3)
    out = talk(session, monkeypatch, capsys, "count from 1 to 9\n")
    assert out.endswith("(cut off after 3 tokens: --max-tokens allows more)\n")
    session.reset()
    session.params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    out = talk(session, monkeypatch, capsys, "count from 1 to 9\n")
    assert "tokens: the conversation is full; /reset begins a new one, --max-model-len allows up to" in out


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    session: ChatSession, llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(llm, 4, patch)
        out = talk(session, patch, capsys, "list all primes up to 50\n")
    assert out.endswith("\n(interrupted)\n")
    assert session.history[1]["content"] == out.splitlines()[0].strip()
    assert "interrupted" in Chat(session, is_terminal=False).stats()
    assert not llm.engine.has_unfinished_requests
    assert said(session, "add 1 and 2")
    assert len(session.history) == 4


def test_ctrl_c_before_the_answer_takes_the_question_back(
    session: ChatSession, llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_after(llm, 0, monkeypatch)
    out = talk(session, monkeypatch, capsys, "list all primes up to 50\n")
    assert "the conversation goes on as if this had not been asked" in out
    assert session.history == []
    assert session.turns == []


def test_ctrl_c_at_the_prompt_is_no_end_and_ctrl_d_is(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[Any] = [KeyboardInterrupt(), "add 1 and 2", EOFError()]

    def typed(prompt: str) -> str:
        event = events.pop(0)
        if isinstance(event, BaseException):
            raise event
        return event

    monkeypatch.setattr("builtins.input", typed)
    Chat(session, is_terminal=True).loop()
    assert capsys.readouterr().out == "\n(Ctrl-D or /exit ends)\n1 + 2 = 3\n\n"


def test_thinking_cannot_be_switched_where_the_template_knows_no_such_option(
    session: ChatSession, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm.get_tokenizer(), "chat_template", "{{ messages[0].content }}")
    refused = Chat(session, is_terminal=False).think("on")
    assert refused is not None
    assert "knows no enable_thinking" in refused


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_in_a_terminal_thoughts_are_dim(session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    chat = Chat(session, is_terminal=True)
    chat.is_coloured = True
    session.template_kwargs["enable_thinking"] = True
    chat.answer("add 12 and 30")
    out = capsys.readouterr().out
    assert "\033[2m" in out
    assert "(thinks)" not in out
    assert out.endswith("42\n")
