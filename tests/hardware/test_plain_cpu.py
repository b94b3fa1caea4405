"""An x86 CPU without AVX2 and AVX512, and what PyTorch does there: the rule holds with its plainest kernels, too."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from ..compat.checkpoints.test_unpickling import child_environment

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="PyTorch's other CPUs have no such kernels"
)

CODE = """
import json, sys
import torch
from safetensors.torch import load_file
from foldkernels.compat.multiflow.checkpoint import loading
from foldkernels.kernels import accuracy
from foldkernels.kernels.testing.cases.builders import BUILDERS, varied

torch.set_num_threads(1)
capability, small, missed, checked = torch.backends.cpu.get_cpu_capability(), sys.argv[1], [], 0
for operation in sorted(BUILDERS):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for n, masked in ((17, True), (33, False)):
            case = varied(operation, n, 2, masked, seed=n)
            check = accuracy.check(case, "torch", dtype, variant="transposed" if masked else "plain")
            checked += len(check.verdicts)
            if not check.passed:
                missed.append(f"{operation} {dtype} {n}: {check.broken or check.worst}")
golden = load_file(f"{small}/case_L40.safetensors")
batch = {name.removeprefix("in."): x for name, x in golden.items() if name.startswith("in.")}
with torch.no_grad():
    out = loading.load(small, "torch")(batch)
names = ("pred_trans", "pred_rotmats", "pred_logits")
errors = {name: float((out[name] - golden["out." + name]).abs().max()) for name in names}
print(json.dumps({"capability": capability, "checked": checked, "missed": missed, "errors": errors}))
"""


#: What the libraries that PyTorch hands products to take the processor for.
LIBRARIES = {
    "default": {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}


@pytest.mark.parametrize("capability", LIBRARIES)
def test_every_operation_and_the_model(root, capability):
    """Outputs and gradients of every operation in three precisions; a golden batch through the small model."""
    if capability == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this CPU has no AVX2")
    small = root / "tests" / "goldens" / "multiflow" / "small"
    environment = child_environment() | LIBRARIES[capability]
    environment |= {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE, str(small)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=os.sep)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    names = {capability.upper(), {"default": "NO AVX"}.get(capability)}  # as PyTorch 2.6 calls it
    assert answer["capability"] in names, "PyTorch chose other kernels: the test tests nothing"
    assert not answer["missed"], "\n".join(answer["missed"])
    assert answer["checked"] > 300
    assert answer["errors"] and max(answer["errors"].values()) < 1e-4, answer["errors"]
