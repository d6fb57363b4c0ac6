"""``nanovllm chat``: a conversation in the terminal."""

import argparse
import sys
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

from nanovllm.cli.options import (
    TOGGLES,
    add_command,
    add_model_options,
    add_sampling_options,
    model_arguments,
    sampling_arguments,
    sampling_params,
)
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.utils.text import counted

if TYPE_CHECKING:
    from nanovllm.cli.chat_session import ChatSession

HELP = """\
/reset          forget what was said (the system message stays)
/system TEXT    set the system message; without TEXT, remove it
/think on|off   let the model think before it answers, or not
/stats          tokens, speed, and how much came from the prefix cache
/help           this
/exit           end, as Ctrl-D does
Ctrl-C stops an answer. A \\ at the end of a line continues the message on the next one; a message that begins with /
needs a space before it."""
DIM, PLAIN = "\033[2m", "\033[0m"


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "chat",
        "talk with a model in the terminal",
        "Talk with a model. What earlier turns said is not computed again: it is found in the prefix cache. Messages "
        "are read line by line, from a pipe too. /help lists the commands.",
        "nanovllm chat --model Qwen3-0.6B --think off\nprintf 'add 12 and 30\\n/stats\\n' | nanovllm chat",
    )
    add = parser.add_argument
    add("--system", metavar="TEXT", help="the system message")
    add_model_options(parser)
    add_sampling_options(parser, max_tokens="as many as there is room for")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    given = sampling_arguments(args)

    from nanovllm.cli.chat_session import ChatSession
    from nanovllm.llm import LLM

    is_terminal = sys.stdin.isatty()
    with LLM(**model_arguments(args)) as llm:
        params = sampling_params(llm, {"max_tokens": None, **given})
        session = ChatSession(llm, params, dict(args.chat_template_kwargs or {}), args.system)
        chat = Chat(session, is_terminal)
        if args.think is not None and (refused := chat.think(args.think)):
            raise ValueError(f"--think {args.think}: {refused}")
        metrics = llm.get_metrics()
        name = "the demo checkpoint" if args.model == DEMO_MODEL_PATH else args.model
        if is_terminal:
            print(f"{name} on {metrics['device']} in {metrics['dtype']}; /help lists the commands", file=sys.stderr)
        chat.loop()
    return 0


class Chat:
    """Reads messages and commands, and prints answers.

    Args:
        session: The conversation.
        is_terminal: Whether a person types: then there is a prompt, and Ctrl-C while it waits is no end.
    """

    def __init__(self, session: "ChatSession", is_terminal: bool) -> None:
        self.session, self.is_terminal = session, is_terminal
        self.is_coloured = sys.stdout.isatty()
        if is_terminal:
            with suppress(ImportError):  # Windows has none
                import readline  # noqa: F401  (input() has a history and can be edited with it)

    def loop(self) -> None:
        """Answer line after line until the input ends or /exit."""
        while True:
            try:
                message = self.read()
            except EOFError:
                if self.is_terminal:
                    print()
                return
            except KeyboardInterrupt:
                if not self.is_terminal:
                    raise
                print("\n(Ctrl-D or /exit ends)")
                continue
            if message.startswith("/"):
                if not self.command(message):
                    return
            elif message.strip():
                self.answer(message.strip())

    def read(self) -> str:
        """The next message, of one line or several; EOFError where the input ends."""
        lines: list[str] = []
        while True:
            if self.is_terminal:
                line = input("... " if lines else ">>> ")
            else:
                line = sys.stdin.readline()
                if not line and not lines:
                    raise EOFError
                line = line.rstrip("\r\n")
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    # ---- answers

    def answer(self, message: str) -> None:
        """Print the answer to a message as it is made. Whatever goes wrong, the conversation can go on."""
        turns = len(self.session.turns)
        known = len(self.session.history)
        try:
            self._print(message)
        except KeyboardInterrupt:
            print("(interrupted)")
        except ValueError as error:  # no room, or a template that refuses
            print(f"{' '.join(str(error).split())}\n(/reset begins a new conversation; {self._more_room()})")
            return
        kept = len(self.session.history) > known
        if len(self.session.turns) > turns and self.session.turns[-1].finish_reason == "length":
            print(f"(cut off after {counted(self.session.turns[-1].output_tokens, 'token')}: {self._why_cut()})")
        if not kept:
            print("(no answer: the conversation goes on as if this had not been asked)")

    def _print(self, message: str) -> None:
        was_thought, newlines = False, -1  # at the end of what was written; -1: nothing was
        try:
            with closing(self.session.ask(message)) as pieces:  # type: ignore[type-var]
                for is_thought, text in pieces:
                    if is_thought != was_thought or newlines < 0:
                        text = text.lstrip("\n")
                        if not text:
                            continue
                        if newlines >= 0:
                            self._write("\n" * (2 - newlines), was_thought)
                        if is_thought and not self.is_coloured:
                            self._write("(thinks) ", is_thought)
                    self._write(text, is_thought)
                    ending = len(text) - len(text.rstrip("\n"))
                    newlines = min(2, max(newlines, 0) + ending if ending == len(text) else ending)
                    was_thought = is_thought
        finally:
            if newlines == 0:
                print()
            sys.stdout.flush()

    def _write(self, text: str, is_thought: bool) -> None:
        print(f"{DIM}{text}{PLAIN}" if is_thought and self.is_coloured else text, end="", flush=True)

    def _why_cut(self) -> str:
        turn = self.session.turns[-1]
        if self.session.params.max_tokens is not None and turn.output_tokens >= self.session.params.max_tokens:
            return "--max-tokens allows more"
        return f"the conversation is full; /reset begins a new one, {self._more_room()}"

    def _more_room(self) -> str:
        engine = self.session.llm.engine
        longest, limit = engine.model_config.max_position_embeddings, engine.max_model_len
        if limit < longest:
            return f"--max-model-len allows up to {longest} tokens instead of {limit}"
        return f"the model itself has no room for more than {limit} tokens"

    # ---- commands

    def command(self, line: str) -> bool:
        """Do what a line that begins with / says; False to end."""
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name in ("exit", "quit"):
            return False
        if name == "help":
            print(HELP)
        elif name == "reset":
            self.session.reset()
            print("(a new conversation)")
        elif name == "system":
            self.session.system = rest or None
            print("(the system message is set)" if rest else "(there is no system message)")
        elif name == "think":
            print(f"({self.think(rest) or f'thinking is {rest}'})")
        elif name == "stats":
            print(self.stats())
        else:
            print(f"(there is no command /{name}; /help lists them, and a space before the / makes it a message)")
        sys.stdout.flush()
        return True

    def think(self, word: str) -> str | None:
        """Switch thinking; what is wrong with that, if anything."""
        from nanovllm.engine.tokenizer import template_options

        if word not in TOGGLES:
            return f"use /think on or /think off, not {word!r}" if word else "use /think on or /think off"
        options = template_options(self.session.llm.get_tokenizer())
        if options is not None and "enable_thinking" not in options:
            return "this model's chat template knows no enable_thinking, so thinking cannot be switched"
        self.session.template_kwargs["enable_thinking"] = TOGGLES[word]
        return None

    def stats(self) -> str:
        """The last turn's figures, and the conversation's."""
        session = self.session
        if not session.turns:
            return "(nothing has been asked yet)"
        turn = session.turns[-1]
        limit = session.llm.engine.max_model_len
        cached = "unknown, it was interrupted" if turn.cached_tokens is None else f"{turn.cached_tokens} from the cache"
        first = "" if turn.first_seconds is None else f", the first after {turn.first_seconds:.2f} s"
        speed = turn.output_tokens / turn.seconds if turn.seconds else 0.0
        prompts = sum(one.prompt_tokens for one in session.turns)
        found = sum(one.cached_tokens or 0 for one in session.turns)
        metrics = session.llm.get_metrics()
        blocks = f"{counted(metrics['num_kvcache_blocks'], 'KV block')} of {metrics['kvcache_block_size']} tokens"
        return (
            f"last turn     {counted(turn.prompt_tokens, 'prompt token')} ({cached}) + "
            f"{counted(turn.output_tokens, 'output token')} in "
            f"{turn.seconds:.2f} s ({speed:.0f} output tok/s){first}; ended: {turn.finish_reason}\n"
            f"so far        {counted(len(session.turns), 'turn')}: {counted(prompts, 'prompt token')}, {found} of them "
            f"({100 * found / max(prompts, 1):.0f}%) from the cache; "
            f"{counted(sum(one.output_tokens for one in session.turns), 'output token')}\n"
            f"room          remembered: {counted(len(session.history) // 2, 'turn')}; "
            f"the last took {turn.prompt_tokens + turn.output_tokens} of {limit} tokens; {blocks}"
        )
