"""Every Python example in the documentation runs, and what the documentation names exists."""

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SETUP = "from nanovllm import LLM, SamplingParams\nfrom nanovllm.demo import DEMO_MODEL_PATH\n"


def examples() -> list:
    found = []
    for page in PAGES:
        for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)):
            found.append(pytest.param(code, id=f"{page.name}-{number}"))
    return found


@pytest.mark.parametrize("code", examples())
def test_the_example_runs(code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(SETUP + code, "example", "exec"), {"__name__": "__main__"})


def test_there_are_examples() -> None:
    assert len(examples()) >= 6


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_api_page_lists_every_argument_and_field() -> None:
    import dataclasses

    from nanovllm import CompletionOutput, RequestOutput, SamplingParams
    from nanovllm.config import EngineConfig
    from nanovllm.outputs import ScoreOutput, StreamOutput

    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    for kind in (EngineConfig, SamplingParams, RequestOutput, CompletionOutput, StreamOutput, ScoreOutput):
        for field in dataclasses.fields(kind):
            assert f"`{field.name}`" in page, f"{kind.__name__}.{field.name}"


def test_the_tree_in_the_architecture_page_names_real_files() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    for name in re.findall(r"(?:engine|attention|layers|models|utils)/\w+\.py", page):
        assert (ROOT / "nanovllm" / name).exists(), name


def test_both_commands_of_the_readme_make_their_own_environment_and_pin_torch() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    lines = [line for line in readme.splitlines() if line.startswith("python3 -m venv ")]
    assert len(lines) == 2
    assert all("torch==2.13.0" in line for line in lines)
    assert "example.py" in lines[0]
    assert "-m pytest" in lines[1]


def test_ci_runs_the_command_of_the_readme() -> None:
    assert "README.md" in (ROOT / ".ci" / "run").read_text("utf-8")
    assert os.access(ROOT / ".ci" / "run", os.X_OK) or os.name == "nt"
