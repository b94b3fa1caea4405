"""The environment variables that change what foldkernels does: ours, and other people's that matter here."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ...configs.resolve import ENVIRONMENT_VARIABLE

#: Ours. `docs/configuration.md` is written from this, and a test compares it with the code.
OURS: Mapping[str, str] = {
    ENVIRONMENT_VARIABLE: "What `--kernel` takes, separated by commas: `flash`, or `flash,attention=torch`. "
    "The command line and the call win over it, it wins over the file.",
    "FOLDKERNELS_CACHE": "The folder for what is measured once and kept (`foldkernels` in the user's cache folder when "
    "not set).",
    "FOLDKERNELS_DEBUG": "`1`: the command line shows the traceback of an error, too.",
    "FOLDKERNELS_FAST_16BIT": "`on` or `off`: whether streamed kernels multiply 16-bit data in 16 bits on a CPU "
    "(where the processor has instructions for it when not set).",
    "FOLDKERNELS_PROBE_TIMEOUT": "Seconds that an optional package may take to be imported when it is tried out "
    "(180 when not set).",
    "FOLDKERNELS_TUNE": "`1`: a Triton kernel's first call of a kind tries a few tile sizes on the GPU, and the "
    "fastest is kept; else what was kept is used, or the table. Nothing is judged there: `foldkernels tune` does it "
    "ahead of time, and judges each.",
}

#: Other people's, for `foldkernels doctor`.
THEIRS: Mapping[str, str] = {
    "OMP_NUM_THREADS": "PyTorch's threads on a CPU.",
    "RANK": "With WORLD_SIZE and LOCAL_RANK: which of several processes this is, for `foldkernels sample`.",
    "WORLD_SIZE": "How many processes share the work; torchrun sets it.",
    "LOCAL_RANK": "Which of its machine's processes this is: it takes the GPU of that number.",
    "MKL_NUM_THREADS": "Threads of the matrix products on a CPU.",
    "CUDA_VISIBLE_DEVICES": "Which GPUs PyTorch sees.",
    "PYTORCH_ENABLE_MPS_FALLBACK": "On a Mac: `1` runs operators that the GPU lacks on the CPU.",
    "TRITON_INTERPRET": "`1` runs Triton's kernels in Python, slowly, without a GPU.",
    "NVIDIA_TF32_OVERRIDE": "`0` switches TF32 off everywhere, whatever `precision` says.",
    "GLIBC_TUNABLES": "With a large mmap_threshold and trim_threshold, glibc keeps freed memory: fewer page faults.",
}


def variables_set() -> dict[str, str]:
    """Those that are set here, with their values."""
    return {name: os.environ[name] for name in (*OURS, *THEIRS) if name in os.environ}
