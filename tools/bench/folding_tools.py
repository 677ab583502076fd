"""How the simplifiers that `folding.py` compares are run: each in a process of its own that measures itself."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_FRAME = """
import json, resource, time
{imports}
start = time.perf_counter()
{work}
peak = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")]
print("MEASURED", json.dumps([time.perf_counter() - start, peak[0] / 1e3]))
"""

_ONNXRUNTIME = """
options = ort.SessionOptions()
options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_{level}
options.optimized_model_filepath = {out!r}
options.log_severity_level = 3
ort.InferenceSession({source!r}, options, providers=["CPUExecutionProvider"])
"""


@dataclass(frozen=True)
class Tool:
    """A simplifier as Python code.

    Attributes:
        name: heading of its column.
        imports: what is loaded before the clock starts.
        work: reads the file {source!r} and writes {out!r}.
        peer: whether it needs the virtual environment of the peers.
    """

    name: str
    imports: str
    work: str
    peer: bool = True


TOOLS = (
    Tool(
        "graphopt",
        "import onnx, onnxscript.optimizer\n"
        "from graphopt.base import Context\nfrom graphopt.model import load, save\n"
        "from graphopt.progress import Silent\nfrom graphopt.registry import pass_class, target",
        "model = load({source!r})\n"
        "ctx = Context(target('cpu'), None, None, seed=0, jobs=1, progress=Silent(), resolve=pass_class)\n"
        "pass_class('fold')().run(model, ctx)\nsave(model, {out!r})",
        peer=False,
    ),
    Tool("onnxslim", "import onnxslim", "onnxslim.slim({source!r}, {out!r})"),
    Tool("onnxsim", "import onnx, onnxsim", "onnx.save(onnxsim.simplify(onnx.load({source!r}))[0], {out!r})"),
    Tool(
        "onnxscript",
        "import onnx_ir as ir, onnxscript.optimizer",
        "ir.save(onnxscript.optimizer.optimize(ir.load({source!r})), {out!r})",
    ),
    Tool("ORT basic", "import onnxruntime as ort", _ONNXRUNTIME.replace("{level}", "BASIC"), peer=False),
    Tool("ORT extended", "import onnxruntime as ort", _ONNXRUNTIME.replace("{level}", "EXTENDED"), peer=False),
)


@dataclass(frozen=True)
class Made:
    """What a tool made of a model.

    Attributes:
        out: the file; None where it failed.
        seconds: wall time of load, work and save, without the start of the interpreter and its imports.
        megabytes: high-water mark of the process's resident memory, interpreter and libraries included.
        failure: the last line of its error.
    """

    out: Path | None
    seconds: float = 0.0
    megabytes: float = 0.0
    failure: str = ""


def make(tool: Tool, source: Path, out: Path, peers: Path | None, timeout: float = 600) -> Made:
    """Run a tool on the file `source`; `peers` is the virtual environment of the peers."""
    python = str(peers / "bin" / "python") if tool.peer and peers is not None else sys.executable
    code = _FRAME.format(imports=tool.imports, work=tool.work.format(source=str(source), out=str(out)))
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Made(None, failure=f"no result after {timeout:.0f} s")
    told = [line for line in done.stdout.splitlines() if line.startswith("MEASURED")]
    if done.returncode or not told or not out.exists():
        lines = done.stderr.strip().splitlines() or ["no message"]
        return Made(None, failure=f"exit code {done.returncode}: {lines[-1][-200:]}")
    seconds, megabytes = json.loads(told[-1].removeprefix("MEASURED "))
    return Made(out, seconds, megabytes)
