"""example.py answers its two prompts with the demo checkpoint and runs any other checkpoint folder."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nanovllm.utils.random_checkpoint import write_random_checkpoint

EXAMPLE = Path(__file__).parent.parent / "example.py"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The script at the top of the repository, as a module."""
    spec = importlib.util.spec_from_file_location("example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights and a tokenizer that has one token a byte."""
    path = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(path, {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 257})
    alphabet = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)
    return path


def run_example(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(EXAMPLE), *argv], cwd=cwd, capture_output=True, text=True, timeout=300)


def test_the_questions_that_the_documentation_suggests_are_answered_right(tmp_path: Path, example: ModuleType) -> None:
    answers = {
        "add 12 and 30": "12 + 30 = 42",
        "count from 1 to 7": "1, 2, 3, 4, 5, 6, 7",
        "what is 96 minus 48?": "96 - 48 = 48",
        "count from 3 to 9": "3, 4, 5, 6, 7, 8, 9",
        "sort these numbers: 58, 31, 77, 12": "12, 31, 58, 77",
        "reverse these words: apple river stone": "stone river apple",
        "say stone 3 times": "stone stone stone",
        "list all primes up to 50": "2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47.",
    }
    readme = (EXAMPLE.parent / "README.md").read_text()
    menu = readme[readme.index("few other words: try") : readme.index("## What it runs")]
    suggested = re.findall(r"`([^`]+)`", menu) + re.findall(r'"([^"]+)"', str(example.__doc__))
    assert set(suggested) == set(answers)
    done = run_example("--device", "cpu", *answers, cwd=tmp_path)
    for (question, answer), said in zip(answers.items(), done.stdout.split("Prompt: ")[1:], strict=True):
        assert said.startswith(f"{question}\n")
        assert said.split("\n")[1].endswith(answer)


@pytest.mark.parametrize("thinking", ["--no-thinking", "--thinking"])
def test_the_demo_checkpoint_answers_both_prompts(thinking: str, tmp_path: Path) -> None:
    done = run_example("--device", "cpu", thinking, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    introduction, primes = done.stdout.split("Prompt: ")[1:]
    assert introduction.startswith("introduce yourself\n")
    assert "nanovllm" in introduction
    expected = [n for n in range(2, 101) if all(n % d for d in range(2, n))]
    assert ", ".join(map(str, expected)) in primes
    assert ("Thought: " in done.stdout) == (thinking == "--thinking")
    assert "output tok/s" in done.stdout


def test_prompts_on_the_command_line_replace_the_two(
    example: ModuleType, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", str(checkpoint), "--device", "cpu", "--max-tokens", "4", "first thing", "second thing"]
    assert example.main(argv) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("Prompt: ")] == [
        "Prompt: first thing",
        "Prompt: second thing",
    ]
    assert out.count("Answer: ") == 2
    assert "start-up" in out.splitlines()[-1]


def test_an_answer_that_is_cut_off_says_so(
    example: ModuleType, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", str(checkpoint), "--device", "cpu", "--temperature", "0", "--max-tokens", "3", "hello"]
    assert example.main(argv) == 0
    assert "(cut off after 3 tokens; --max-tokens allows more)" in capsys.readouterr().out


def test_the_chat_template_is_applied_with_thinking_on_or_off(
    example: ModuleType, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt_tokens = {}
    for option in ("--thinking", "--no-thinking"):
        argv = ["--model", str(checkpoint), "--device", "cpu", "--max-tokens", "2", option, "hello"]
        assert example.main(argv) == 0
        prompt_tokens[option] = int(capsys.readouterr().out.splitlines()[-1].split()[0])
    assert prompt_tokens["--thinking"] == len("_user\nhello_\n_assistant\n")  # one token a byte, and a marker is one
    assert prompt_tokens["--no-thinking"] - prompt_tokens["--thinking"] == len("<think>\n\n</think>\n\n")


def test_defaults_suit_the_checkpoint(example: ModuleType) -> None:
    assert example.parse_args([]).temperature == 0
    assert example.parse_args(["--model", "elsewhere"]).temperature == 0.6
    assert example.parse_args(["--thinking"]).max_tokens > example.parse_args([]).max_tokens


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--dtype", "int4"], "dtype is 'int4'"),
    ],
)
def test_bad_input_gets_one_line(
    example: ModuleType, capsys: pytest.CaptureFixture[str], argv: list[str], part: str
) -> None:
    assert example.main(argv) == 2
    line = capsys.readouterr().err
    assert line.startswith("example.py: error: ")
    assert part in line
    assert line.count("\n") == 1


def test_options_of_a_wrong_kind_are_refused(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        example.main(["--max-tokens", "many"])
    assert refused.value.code == 2
    assert "'many'" in capsys.readouterr().err
