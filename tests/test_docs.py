"""Every Python example in the documentation runs, its commands exist, and so does what it names."""

import contextlib
import dataclasses
import inspect
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm import LLM, CompletionOutput, RequestOutput, SamplingParams
from nanovllm.batch import BatchSummary
from nanovllm.cli.main import COMMANDS, main
from nanovllm.config import EngineConfig
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.outputs import Logprob, RequestMetrics, ScoreOutput, StreamOutput
from tests.threads import one_thread  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MORE_PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "results" / "README.md"]
SETUP = "from nanovllm import LLM, SamplingParams\nfrom nanovllm.demo import DEMO_MODEL_PATH\n"
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)

every_page = pytest.mark.parametrize("page", [*PAGES, *MORE_PAGES], ids=lambda page: f"{page.parent.name}-{page.name}")


def named_files(page: Path) -> dict[str, str]:
    """The files that a page shows whole: a block with a title is a file of that name, which its examples import."""
    return dict(re.findall(r'^```python title="([\w.]+)"\n(.*?)^```', page.read_text("utf-8"), re.M | re.S))


def examples() -> list:
    found = []
    for page in PAGES:
        for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)):
            found.append(pytest.param(page, code, id=f"{page.name}-{number}"))
    return found


@pytest.fixture
def registries() -> Iterator[None]:
    """Examples that register a model or a backend register it for themselves."""
    from nanovllm.attention import BACKENDS
    from nanovllm.models.registry import MODELS

    before = [(one, dict(one)) for one in (BACKENDS, MODELS)]
    yield
    for one, entries in before:
        one.clear()
        one.update(entries)


@pytest.mark.parametrize(("page", "code"), examples())
def test_the_example_runs(
    page: Path, code: str, registries: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    files = named_files(page)
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        exec(compile(SETUP + code, "example", "exec"), {"__name__": "__main__"})
    except ModuleNotFoundError as error:
        if error.name not in ("triton", "numba"):
            raise
        pytest.skip(f"there is no {error.name} here")
    finally:
        for name in files:
            sys.modules.pop(name.removesuffix(".py"), None)


def test_the_first_script_gives_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """A prompt that the demo checkpoint cannot continue (it repeats a word) looks like a broken installation."""
    code = next(param.values[1] for param in examples() if param.values[0].name == "getting-started.md")
    exec(compile(SETUP + code, "example", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert printed.endswith("two CPU cores.\n")
    assert printed.strip() in code


def test_there_are_examples() -> None:
    pages = {param.values[0].name for param in examples()}
    assert pages >= {"README.md", "api.md", "getting-started.md", "performance.md"}
    assert pages >= {"adding-a-model.md", "adding-a-layer.md", "adding-an-attention-backend.md"}


def test_the_backend_of_the_walk_through_passes_the_tests_of_backends(tmp_path: Path) -> None:
    for name, content in named_files(ROOT / "docs" / "adding-an-attention-backend.md").items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "check.py")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 20
    assert "skipped" not in done.stdout.splitlines()[-1]


@every_page
def test_links_between_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", FENCED.sub("", page.read_text("utf-8"))):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@every_page
def test_lists_and_tables_come_after_an_empty_line(page: Path) -> None:
    """Without one, the site shows them as a paragraph."""
    lines = FENCED.sub("", page.read_text("utf-8")).splitlines()
    for before, line in itertools.pairwise(lines):
        for start in ("- ", "1. ", "| "):
            if line.startswith(start):
                assert not before or before.startswith((start, "|", " ", *"123456789")), line


# ---- commands


def commands(page: Path) -> list[str]:
    """The commands of a page: lines of blocks of shell, and indented lines that run something."""
    text = page.read_text("utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    indented = re.findall(r"^    ((?:\.venv/bin/|nanovllm |NANOVLLM_\w+=).*(?:\\\n.*)*)$", FENCED.sub("", text), re.M)
    joined = "\n".join([*blocks, *indented]).replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]


ALL_COMMANDS = [
    pytest.param(command, id=f"{page.name}-{number}")
    for page in [*PAGES, *MORE_PAGES]
    for number, command in enumerate(commands(page))
]


def test_there_are_commands() -> None:
    assert len(ALL_COMMANDS) > 20


@pytest.mark.parametrize("line", ALL_COMMANDS)
def test_the_command_can_be_run(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its syntax is right, and its scripts, subcommands, options and extras exist."""
    bash = shutil.which("bash")
    if bash and os.name != "nt":
        done = subprocess.run([bash, "-n", "-c", line], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    words: list[str] = []
    for word in [*shlex.split(line, comments=True), "&&"]:
        if word not in ("&&", "|", ";"):
            words.append(word)
            continue
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        check_command([word for word in words if word not in ("$(", ")")], capsys)
        words = []


def check_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = words
    options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    if program.endswith("/pip") and arguments[0] == "install":
        declared = (ROOT / "pyproject.toml").read_text("utf-8")
        for extra in re.findall(r"(?:\.|nanovllm)\[([\w,-]+)\]", " ".join(arguments)):
            for name in extra.split(","):
                assert re.search(rf"^{name} = \[", declared, re.M), f"there is no extra {name!r}"
    elif program.endswith("python") and arguments and arguments[0].endswith(".py"):
        script = ROOT / arguments[0]
        assert script.exists(), arguments[0]
        known = script.read_text("utf-8").replace("_", "-")
        parts = (ROOT / "nanovllm" / "benchmarks").glob("*.py")
        known += "".join(one.read_text("utf-8").replace("_", "-") for one in parts)
        for option in options:
            assert option in known or f'"{option.removeprefix("--no-").removeprefix("--")}"' in known, option
    elif program.endswith("nanovllm") and arguments and not arguments[0].startswith("-"):
        assert arguments[0] in COMMANDS, arguments[0]
        with contextlib.suppress(SystemExit):
            main([arguments[0], "--help"])
        known = capsys.readouterr().out
        for option in options:
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", known), option


# ---- the reference, which is made of docstrings


@pytest.mark.parametrize(
    "kind",
    [
        SamplingParams,
        RequestOutput,
        CompletionOutput,
        RequestMetrics,
        Logprob,
        StreamOutput,
        ScoreOutput,
        BatchSummary,
        EngineConfig,
    ],
)
def test_docstrings_say_what_every_field_is(kind: type) -> None:
    for field in dataclasses.fields(kind):
        assert re.search(rf"^ +{field.name}: \S", kind.__doc__, re.M), f"{kind.__name__}.{field.name}"


def test_the_docstring_of_llm_says_what_every_argument_is() -> None:
    for name in {field.name for field in dataclasses.fields(EngineConfig)}:
        assert re.search(rf"^ +{name}: \S", LLM.__doc__, re.M), name
        assert name in inspect.signature(LLM).parameters


def test_the_docstring_of_get_metrics_names_every_entry() -> None:
    with LLM(DEMO_MODEL_PATH, device="cpu") as llm:
        metrics = llm.get_metrics()
    named = set(re.findall(r"``(\w+)``", LLM.get_metrics.__doc__))
    assert named == set(metrics)


def test_public_methods_and_names_are_in_the_reference() -> None:
    import nanovllm

    page = (ROOT / "docs" / "reference.md").read_text("utf-8")
    for name in set(nanovllm.__all__) - {"__version__"}:
        assert f"::: nanovllm.{name}\n" in page, name
    for name, method in inspect.getmembers(LLM, inspect.isfunction):
        if not name.startswith("_"):
            assert method.__doc__, f"{name} has no docstring, so the reference leaves it out"


# ---- the rest


def test_the_tree_in_the_architecture_page_names_real_files() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    for name in re.findall(r"(?:engine|attention|layers|models|utils)/\w+\.py", page):
        assert (ROOT / "nanovllm" / name).exists(), name


def test_the_reading_of_an_evening_is_as_long_as_it_says() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    section = page.partition("## Reading it in an evening")[2].partition("\n## ")[0]
    said = int(re.search(r"about ([\d,]+) lines", section)[1].replace(",", ""))  # type: ignore[index]
    files = re.findall(r"`([\w/]+\.py)`", section.partition("|---|")[2])
    lines = sum(len((ROOT / "nanovllm" / name).read_text("utf-8").splitlines()) for name in files)
    assert len(files) >= 15
    assert abs(lines - said) < 300, f"{lines} lines"


def test_pictures_are_whole_and_ask_nothing_of_the_network() -> None:
    from xml.etree import ElementTree

    pictures = sorted((ROOT / "docs" / "pictures").glob("*.svg"))
    assert pictures
    used = "".join(page.read_text("utf-8") for page in PAGES)
    for picture in pictures:
        text = picture.read_text("utf-8")
        root = ElementTree.fromstring(text)
        assert root.get("viewBox"), picture.name
        assert root.findtext("{http://www.w3.org/2000/svg}title"), f"{picture.name} says nothing to who cannot see it"
        assert "http" not in text.replace("http://www.w3.org/2000/svg", ""), picture.name
        assert f"pictures/{picture.name}" in used, f"no page shows {picture.name}"


class TestLinksOfTheSite:
    """tools/docs_site.py, without building the site."""

    @pytest.fixture
    def rewrite(self):
        pytest.importorskip("mkdocs")
        pytest.importorskip("griffe")
        from tools.docs_site import rewritten_links

        return rewritten_links

    @pytest.mark.parametrize(
        ("uri", "link", "expected"),
        [
            ("api.md", "[a](reference.md#nanovllm.LLM)", "[a](reference.md#nanovllm.LLM)"),
            ("api.md", "[a](#chat)", "[a](#chat)"),
            ("architecture.md", "[a](../benchmarks/results/README.md#on-an-h200)", "[a](results.md#on-an-h200)"),
            ("contributing.md", "[a](docs/development.md)", "[a](development.md)"),
            ("contributing.md", "[README](README.md)", "[README](index.md)"),
            ("results.md", "![a](cpu_zen5_2core_peers.png)", "![a](pictures/cpu_zen5_2core_peers.png)"),
            ("api.md", "[`llm.py`](../nanovllm/llm.py)", "`llm.py`"),
            ("api.md", "[a](missing.md)", "[a](missing.md)"),
            ("api.md", "[a](https://example.org/x.md)", "[a](https://example.org/x.md)"),
            ("api.md", "```\n[a](../nanovllm/llm.py)\n```", "```\n[a](../nanovllm/llm.py)\n```"),
        ],
    )
    def test_they_lead_to_what_the_site_has(self, rewrite, uri: str, link: str, expected: str) -> None:
        assert rewrite(link, uri) == expected


def test_both_commands_of_the_readme_make_their_own_environment_and_pin_torch() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    lines = [line for line in readme.splitlines() if line.startswith("python3 -m venv ")]
    assert len(lines) == 2
    assert all("torch==2.13.0" in line for line in lines)
    assert "example.py" in lines[0]
    assert "-m pytest" in lines[1]


def test_ci_runs_the_command_of_the_readme_and_builds_the_site() -> None:
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    assert "README.md" in script
    assert "mkdocs build --strict" in script
    assert os.access(ROOT / ".ci" / "run", os.X_OK) or os.name == "nt"
