"""Imports point one way, and the package imports on any machine."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nanovllm

PACKAGE = Path(nanovllm.__path__[0])

# What the modules of a part may import of the package, from the top down. A part is a module or a whole folder, the
# longest name that fits decides, and a folder's modules may import each other.
UTILS = {"utils", "version"}
PLAIN = {"errors", "sampling_params", "outputs", *UTILS}  # values that every level may see
ARITHMETIC = {"layers.noise", "layers.temperature", "layers.top_tokens"}  # what kernels share with the layers
MODEL = {"attention", "kernels", "layers", *ARITHMETIC, *UTILS}
MAY_IMPORT: dict[str, set[str]] = {
    "": {"llm", "config", *PLAIN},  # nanovllm/__init__.py
    "__main__": {"cli"},
    "cli": {"", "batch", "benchmarks", "diagnostics", "engine.tokenizer", "hub", "llm", "demo", "config", *PLAIN},
    # Instruments look at everything, and nothing but the command line knows them.
    "diagnostics": {
        "llm",
        "engine",
        "engine.llm_engine",
        "engine.scheduler",
        "engine.block_manager",
        "engine.sequence",
        "engine.step_plan",
        "engine.step_handle",
        "engine.cuda_graphs",
        "engine.kv_sizing",
        "engine.placement",
        "engine.batch_state",
        "engine.prompts",
        "engine.request",
        "engine.tokenizer",
        "models",
        "kernels.cpu",
        "demo",
        "config",
        *MODEL,
        *PLAIN,
    },
    # Engines beside each other; each of peers' modules runs in an environment without the rest of the package.
    "benchmarks": {"", "demo", "hub", "kernels", *PLAIN},
    "benchmarks.peers": {"", "benchmarks", "utils"},
    "hub": {"models", *UTILS},
    "batch": {"batch_input", "batch_rows", "llm", *PLAIN},
    "batch_input": {"batch_rows", *PLAIN},
    "batch_rows": {"llm", *PLAIN},
    "llm": {
        "engine.calls",
        "engine.llm_engine",
        "engine.prompts",
        "engine.request",
        "engine.tokenizer",
        "config",
        *PLAIN,
    },
    "demo": set(),
    "engine": set(),
    "engine.calls": {"engine.llm_engine", "engine.prompts", "engine.request", *PLAIN},
    "engine.intake": {
        "engine.prompts",
        "engine.request",
        "engine.scheduler",
        "engine.tokenizer",
        "layers.temperature",
        *PLAIN,
    },
    "engine.llm_engine": {
        "engine.admission",
        "engine.intake",
        "engine.scheduler",
        "engine.block_manager",
        "engine.sequence",
        "engine.step_plan",
        "engine.prompts",
        "engine.metrics",
        "engine.model_runner",
        "engine.placement",
        "engine.step_handle",
        "engine.request",
        "engine.tokenizer",
        "engine.turns",
        "engine.parallel_runner",
        "models",  # the names of the architectures
        "config",
        *PLAIN,
    },
    "engine.prompts": PLAIN,
    "engine.admission": set(),
    "engine.turns": set(),
    "engine.scheduler": {"engine.admission", "engine.block_manager", "engine.sequence", "engine.step_plan", *PLAIN},
    "engine.block_manager": {"engine.sequence", *PLAIN},
    "engine.request": {"engine.sequence", "engine.step_plan", "engine.detokenizer", *PLAIN},
    "engine.metrics": {"engine.sequence", "engine.step_plan"},
    "engine.tokenizer": UTILS,
    "engine.sequence": {"engine.step_plan", *PLAIN},
    "engine.step_plan": PLAIN,
    "engine.detokenizer": set(),
    "engine.parallel_runner": {
        "engine.batch_state",
        "engine.model_runner",
        "engine.rank_group",
        "engine.step_handle",
        "engine.step_plan",
        "engine.workers",
        "config",
        *PLAIN,
    },
    "engine.rank_group": {"engine.placement", "config", *UTILS},
    "engine.workers": {"engine.placement", "engine.rank_group", "layers", "config", *PLAIN},
    "engine.worker_process": {
        "engine.model_runner",
        "engine.rank_group",
        "engine.workers",
        "layers",
        *UTILS,
    },
    "engine.model_runner": {
        "engine.batch_state",
        "engine.cuda_graphs",
        "engine.drawing",
        "engine.kv_sizing",
        "engine.placement",
        "engine.recorded_steps",
        "engine.step_handle",
        "engine.step_plan",
        "config",
        "models",
        *MODEL,
        *PLAIN,
    },
    "engine.drawing": {"engine.batch_state", "engine.step_handle", *MODEL},
    "engine.kv_sizing": {"engine.batch_state", "engine.cuda_graphs", "config", *MODEL},
    "engine.placement": {*MODEL},
    "engine.recorded_steps": {"attention", "kernels.cpu"},
    "engine.step_handle": {"engine.step_plan", *MODEL},
    "engine.logit_rules": {"engine.step_plan", *PLAIN},
    "engine.cuda_graphs": {"engine.batch_state", "engine.step_plan", "config", *MODEL},
    "engine.batch_state": {"engine.step_plan", "engine.logit_rules", *MODEL, *PLAIN},
    "models": MODEL,
    "layers": {"attention", "kernels", *UTILS},
    "attention": {"kernels", "kernels.cpu", *UTILS},
    "kernels": {*ARITHMETIC, *UTILS},
    "kernels.cpu": UTILS,
    **dict.fromkeys(sorted(ARITHMETIC), UTILS),
    "config": {"hub", "utils"},
    "errors": set(),
    "sampling_params": {"utils"},
    "outputs": {"utils"},
    "utils": {"version"},
    "version": set(),
}
# Imported where they are used, so that the package needs none of them.
OPTIONAL = {"triton": {"kernels"}, "flash_attn": set(), "numba": {"kernels.cpu"}, "llvmlite": {"kernels.cpu"}}


def module_name(path: Path) -> str:
    """``engine.scheduler`` for ``nanovllm/engine/scheduler.py``; a folder's ``__init__`` is the folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def part_of(module: str) -> str:
    """The entry of ``MAY_IMPORT`` that a module falls under."""
    while module not in MAY_IMPORT:
        assert "." in module, f"say in MAY_IMPORT what {module} may import"
        module = module.rpartition(".")[0]
    return module


def imports(module: str, *, everywhere: bool = True) -> set[str]:
    """Absolute names of all that a module imports; not within functions unless ``everywhere``."""
    path = MODULES[module]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in inside and not everywhere:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def internal(module: str) -> set[str]:
    """Modules of the package that a module imports."""
    found = set()
    for name in imports(module):
        top, _, rest = name.partition(".")
        if top == "nanovllm":
            while rest and rest not in MODULES:  # a name within a module
                rest = rest.rpartition(".")[0]
            found.add(rest)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    part = part_of(module)
    folder = part if (PACKAGE / part.replace(".", "/")).is_dir() else None
    for name in internal(module):
        within = folder not in (None, "") and (name == folder or name.startswith(f"{folder}."))
        allowed = within or part_of(name) in MAY_IMPORT[part]
        assert allowed, f"nanovllm.{module} may not import nanovllm.{name}"


def test_the_order_of_the_parts_has_no_circle() -> None:
    above: set[str] = set()

    def visit(part: str) -> None:
        assert part not in above, f"{part} imports itself by way of {above}"
        above.add(part)
        for lower in MAY_IMPORT[part]:
            visit(lower)
        above.discard(part)

    for part in MAY_IMPORT:
        visit(part)


@pytest.mark.parametrize("optional", OPTIONAL)
def test_optional_packages_are_imported_only_where_they_are_used(optional: str) -> None:
    for module in MODULES:
        if part_of(module) not in OPTIONAL[optional]:
            at_import = {name.partition(".")[0] for name in imports(module, everywhere=False)}
            assert optional not in at_import, f"nanovllm.{module} needs {optional} to be imported"


def test_what_is_imported_is_declared() -> None:
    """Not only there because something else happens to need it; peers' modules run in environments of their own."""
    text = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    declared = {name.replace("-", "_") for name in re.findall(r'"([\w-]+)(?:[<>=]=)', text)}
    assert {"torch", "numba", "matplotlib"} <= declared
    for module in MODULES:
        if part_of(module) != "benchmarks.peers":
            used = {name.partition(".")[0] for name in imports(module)} - sys.stdlib_module_names
            # numba is made of llvmlite, and pins its version; only type checkers read typing_extensions.
            undeclared = used - declared - {"nanovllm", "llvmlite", "typing_extensions"}
            assert not undeclared, f"nanovllm.{module} imports {undeclared}, which pyproject.toml does not name"


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_the_package_imports_without_what_it_can_do_without() -> None:
    done = run_python(
        "import sys\n"
        f"for name in {list(OPTIONAL)}:\n"
        "    sys.modules[name] = None  # importing it raises ImportError\n"
        "import nanovllm\n"
        "nanovllm.LLM, nanovllm.SamplingParams\n"
        "assert 'nanovllm.engine.model_runner' in sys.modules\n"
    )
    assert done.returncode == 0, done.stderr


def test_nothing_is_compiled_when_the_package_is_imported() -> None:
    """Nor is a compiler loaded: a program may import it and do something else."""
    done = run_python(
        "import sys, nanovllm\n"
        "nanovllm.LLM, nanovllm.SamplingParams\n"
        f"print([name for name in {list(OPTIONAL)} if name in sys.modules])\n"
        "print([name for name in sys.modules if name.startswith('nanovllm.kernels.')])\n"
    )
    assert done.stdout == "[]\n[]\n", done.stdout + done.stderr


def test_scheduling_runs_where_there_is_no_torch() -> None:
    done = run_python(
        "import sys\n"
        "for name in ('torch', 'numpy', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "from nanovllm.engine import block_manager, scheduler, sequence, step_plan\n"
        "from nanovllm.sampling_params import SamplingParams\n"
        "queue = scheduler.Scheduler(block_manager.BlockManager(4, 4), 2, 8)\n"
        "queue.add(sequence.Sequence('a', 0, [1, 2, 3], SamplingParams(), max_output_tokens=2))\n"
        "while queue.has_unfinished:\n"
        "    queue.update(queue.schedule(), step_plan.StepResult([5]))\n"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], [], ["abacus"], ["generate"], ["generate", "x", "--top-p", "3"]]
    + [[command, "--help"] for command in ("generate", "bench", "trace")],
    ids=" ".join,
)
def test_help_and_mistakes_are_told_without_torch(arguments: list[str]) -> None:
    """It takes a second to import; ``NAME = None`` makes that an ImportError."""
    done = run_python(
        "import sys\n"
        "for name in ('torch', 'numpy', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "from nanovllm.cli import main\n"
        f"sys.exit(main({arguments}))\n"
    )
    assert "Error" not in done.stderr
    assert done.returncode == (0 if arguments[-1:] in (["--help"], ["--version"]) else 2), done.stderr


def test_the_package_loads_its_names_when_they_are_asked_for() -> None:
    done = run_python(
        "import sys, nanovllm\n"
        "assert set(nanovllm.__all__) <= set(dir(nanovllm))\n"
        "assert 'torch' not in sys.modules\n"
        "from nanovllm import SamplingParams\n"
        "assert 'torch' not in sys.modules\n"
        "from nanovllm import *\n"
        "import nanovllm.llm\n"
        "assert LLM is nanovllm.LLM is nanovllm.llm.LLM\n"
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="module 'nanovllm' has no attribute 'LMM'"):
        nanovllm.LMM  # noqa: B018


def test_type_checkers_see_the_names_that_the_package_loads() -> None:
    [block] = [node for node in ast.walk(ast.parse(MODULES[""].read_text("utf-8"))) if isinstance(node, ast.If)][:1]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = {alias.name: node.module for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert seen == nanovllm._HOMES
    assert {*seen, "__version__"} == set(nanovllm.__all__)
