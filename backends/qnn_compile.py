"""Compile a model for Qualcomm's Hexagon without such a device. Runs alone, by a Python that has the tools.

    python qnn_compile.py model.onnx context.onnx --soc 43 --arch 73

Needs onnxruntime 1.24 or newer and onnxruntime-qnn. Writes context.onnx, with the compiled graphs in `*_qnn.bin` beside
it, and prints one line of JSON: versions, and the nodes by provider. The compiler is native code that may take the
process with it, which is why `graphopt.backends.ort_mobile` starts it as a process of its own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from typing import Any

ABSENT = 3
"""Exit code where a package is missing."""

PROVIDER = "QNNExecutionProvider"


def main() -> int:
    """Compile; the exit code is 0, or 1 where the compiler refuses, or `ABSENT`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("context")
    parser.add_argument("--soc", required=True, help="number of the chip (43: Snapdragon 8 Gen 2)")
    parser.add_argument("--arch", required=True, help="version of its Hexagon (73)")
    given = parser.parse_args()
    try:
        ort, qnn = (importlib.import_module(name) for name in ("onnxruntime", "onnxruntime_qnn"))
    except ImportError as error:
        print(error, file=sys.stderr)
        return ABSENT
    try:
        found = compile_model(ort, qnn, given.model, given.context, given.soc, given.arch)
    except Exception as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(found))
    return 0


def compile_model(ort: Any, qnn: Any, model: str, context: str, soc: str, arch: str) -> dict[str, Any]:
    """Make a session, which compiles, and tell where each node went; nodes are those of the optimised graph."""
    ort.register_execution_provider_library(PROVIDER, qnn.get_library_path())
    devices = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("ep.context_enable", "1")
    options.add_session_config_entry("ep.context_file_path", context)
    options.add_session_config_entry("ep.context_embed_mode", "0")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    settings = {"backend_path": qnn.get_qnn_htp_path(), "soc_model": soc, "htp_arch": arch}
    options.add_provider_for_devices(devices[:1], settings)
    session = ort.InferenceSession(model, options)
    taken, left, parts = 0, [], 0
    for graph in session.get_provider_graph_assignment_info():
        nodes = graph.get_nodes()
        if graph.ep_name == PROVIDER:
            taken, parts = taken + len(nodes), parts + 1
        else:
            left += [{"node": node.name, "op": node.op_type} for node in nodes]
    versions = {"onnxruntime": ort.__version__, "onnxruntime-qnn": qnn.__version__}
    return {"versions": versions, "soc": soc, "arch": arch, "taken": taken, "parts": parts, "left": left}


if __name__ == "__main__":
    sys.exit(main())
