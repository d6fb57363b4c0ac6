"""Build the wheel and use it outside the repository: in an environment of its own, on the demo checkpoint it carries.

    python tools/check_wheel.py

The environment borrows the dependencies of the interpreter that runs this script, so that nothing is downloaded twice.
"""

import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import nanovllm, pathlib
from nanovllm import LLM, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH
assert pathlib.Path(nanovllm.__file__).is_relative_to({prefix!r}), nanovllm.__file__
assert (pathlib.Path(nanovllm.__file__).parent / "py.typed").exists()
with LLM(DEMO_MODEL_PATH, device="cpu") as llm:
    output = llm.generate("hello", SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)[0]
assert output.outputs[0].token_ids
from nanovllm.diagnostics.run_record import RunRecord
RunRecord().write_html("trace.html")  # whose parts are files of the package
print("the wheel works:", nanovllm.__version__)
"""


def main() -> None:
    """Raises CalledProcessError if the wheel cannot be built, installed or used."""
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # what an earlier build left there would get into the wheel
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", folder, str(ROOT)], check=True)
        wheel = next(Path(folder).glob("*.whl"))
        environment = Path(folder, "venv")
        venv.create(environment, with_pip=True)
        python = environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
        site = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        # Dependencies come from this interpreter; nanovllm itself must not, hence the wheel is found first.
        Path(site, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel], check=True)
        program = PROGRAM.format(prefix=str(environment))
        subprocess.run([python, "-c", program], check=True, cwd=folder)
        commands = [
            ["generate", "--chat", "hello"],
            ["env"],
            ["bench", "--workload", "2:4-4:4-4", "--json"],
        ]
        for command in commands:
            printed = subprocess.run(
                [python, "-m", "nanovllm", *command], check=True, cwd=folder, stdout=subprocess.PIPE, text=True
            ).stdout
            print(printed)
        found = json.loads(printed)["versions"]
        assert found["commit"] is None, found


if __name__ == "__main__":
    main()
