"""How many instructions a chip issues for compiled code's loop, read out of its disassembly."""

import re
import subprocess
from pathlib import Path
from typing import Any

from .triton_tools import PTXAS

_LABEL = re.compile(r"\s*(\.L_\S+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(.*?);")
_JUMP = re.compile(r"\bBRA\b.*?`\((\.L_\S+)\)")
#: Products on tensor cores, by the names that they have on some chip.
_PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA")


def loop(code: Any, folder: Path) -> list[str]:
    """The instructions of the shortest loop that has the most products in it: a kernel's main loop."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(code.asm["cubin"])
    tool = PTXAS.with_name("nvdisasm")
    text = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(found[1])
    loops = []
    for end, instruction in enumerate(instructions):
        jump = _JUMP.search(instruction)
        if jump and labels.get(jump[1], end + 1) <= end:
            body = instructions[labels[jump[1]] : end + 1]
            products = sum(any(word in x for word in _PRODUCTS) for x in body)
            loops.append((products, -len(body), body))
    assert loops and max(loops)[0], "no loop with a product in it"
    return max(loops)[2]
