"""Damages files in many ways, and reads them: in a process of its own, whose memory, time and deeds are watched.

    python fuzzing.py COUNT SEED READER=FOLDER ...

takes the files in each folder's `whole`, damages them `COUNT` times (0: reads them as they are), and prints one line of
JSON: for each reader, how many files were read, how many were refused, and what went wrong. Nothing may: a reader gives
what is in a file, or raises `BadInput` whose message names the file.
"""

from __future__ import annotations

import importlib
import io
import json
import random
import re
import resource
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: Bytes of address space that reading may add to the process.
MEMORY = 768 << 20
#: Of this process's own time: what else the machine does is not counted.
SECONDS = 10
#: What a reader may do, as Python's audit events tell: read files, load modules of its own, map memory.
DEEDS = re.compile(
    r"^(os\.(system|exec|posix_spawn|spawn|fork|remove|rename|rmdir|mkdir|chmod|chown|link|symlink|truncate|kill|putenv)"
    r"|subprocess\.|socket\.|shutil\.|ctypes\.dlopen|pty\.|webbrowser\.|exec$|compile$|code\.__new__|marshal\.|pickle\.)"
)


class TooSlow(BaseException):
    """Not an Exception: no reader may catch it."""


# Damage ---------------------------------------------------------------------------------------------------------------

EXTREMES = (
    b"\xff" * 4,
    b"\xff\xff\xff\x7f",
    b"\x00" * 4,
    b"\xff" * 8,
    b"\x00\x00\x00\x80",
    b"\x7f",
    b"\n",
    b"\xc3\x28",
)


def damaged(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """One to four wounds of a file's bytes."""
    copy = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not copy:
            break
        at = rng.randrange(len(copy))
        wound = rng.randrange(8)
        if wound <= 1:
            copy[at] ^= 1 << rng.randrange(8)
        elif wound == 2:
            del copy[at:]
        elif wound == 3:
            del copy[at : at + rng.choice((1, 2, 16, 300))]
        elif wound == 4:
            copy[at:at] = copy[at : at + rng.choice((1, 8, 64, 1000))] * rng.choice((1, 2, 50))
        elif wound == 5:
            extreme = rng.choice(EXTREMES)
            copy[at : at + len(extreme)] = extreme
        elif wound == 6:
            other = rng.choice(others or [data])
            start = rng.randrange(max(1, len(other)))
            copy[at : at + rng.choice((4, 40, 400))] = other[start : start + rng.choice((4, 40, 400))]
        else:
            copy[at] = rng.randrange(256)
    return bytes(copy)


def damaged_inside(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Wounds of one record of a zip archive, which is then made whole again: sizes and checksums are right."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
    except zipfile.BadZipFile:
        return damaged(data, rng, others)
    hurt = [name for name in records if name.endswith(".pkl")] or list(records)
    name = rng.choice(hurt)
    records[name] = damaged_pickle(records[name], rng)
    out = io.BytesIO()
    method = zipfile.ZIP_STORED if rng.random() < 0.95 else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in records.items():
            if rng.random() > 0.01:
                archive.writestr(name, content)
    return out.getvalue()


OPCODES = (
    b"cRbsuaeq0.2(tl\x93Q}])\x81\x85\x86\x87\x88\x89NKMJ\x8a\x8bXU\x8c\x8e\x94hjr\x92\x91\x8f\x90\x95\x80PioFIVSLdg1"
)
NAMES = (
    b"cos\nsystem\n", b"cposix\nsystem\n", b"cbuiltins\neval\n", b"c__builtin__\ngetattr\n", b"ctorch\nload\n",
    b"cnumpy\ndtype\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"c_codecs\nencode\n",
    b"comegaconf.dictconfig\nDictConfig\n", b"cpathlib\nPosixPath\n", b"ctorch\nFloatStorage\n", b"ctorch\nSize\n",
    b"cargparse\nNamespace\n", b"cnumpy._core.multiarray\n_reconstruct\n", b"c__builtin__\nbytearray\n",
    b"c__builtin__\nset\n", b"ctorch._utils\n_rebuild_parameter\n", b"ccopyreg\n_reconstructor\n", b"ctyping\nAny\n",
)  # fmt: skip
VALUES = (
    b"K\x01", b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"]", b"}", b")", b"N", b"X\x01\x00\x00\x00a",
    b"(lp0\n", b"\x8b\x00\x00\x10\x00" + b"\x7f" * 100, b"h\x00", b"h\x05", b"2", b"\x85" * 60,
    b"](" + b"h\x00" * 90 + b"e",
    b"X\xff\xff\xff\x7f", b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", b"(" * 300, b"G\x7f\xf0\x00\x00\x00\x00\x00\x00",
)  # fmt: skip


def damaged_pickle(data: bytes, rng: random.Random) -> bytes:
    """Opcodes, names and values in places where none were."""
    copy = bytearray(data)
    for _ in range(rng.choice((1, 2, 3, 6))):
        at = rng.randrange(max(1, len(copy)))
        wound = rng.randrange(5)
        if wound == 0:
            copy[at : at + 1] = bytes([rng.choice(OPCODES)])
        elif wound == 1:
            copy[at:at] = rng.choice(NAMES) + rng.choice((b"", b")R", rng.choice(VALUES) + b"\x85R", b")\x81}b"))
        elif wound == 2:
            copy[at:at] = rng.choice(VALUES)
        elif wound == 3:
            end = min(len(copy), at + rng.choice((8, 60, 300)))
            to = rng.randrange(max(1, len(copy)))
            copy[to:to] = copy[at:end]
        else:
            copy[at : at + 1] = bytes([rng.randrange(256)])
    return bytes(copy)


WORDS = (
    "1000000000", "-1", "0", ".nan", ".inf", "-.inf", "1e400", "9" * 5000, "0x" + "f" * 3000, "null", "~", "true", "[]",
    "{}", '""', "???", "${model}", "${nothing.here}", "${oc.env:HOME}", "${oc.create:${model}}", "${.}", "${..ipa}",
    "${" * 40 + "a" + "}" * 40, "${model.node_embed_size}${model.node_embed_size}", "!!python/object:os.system x",
    "!!python/object/apply:os.system ['touch canary']", "!!binary aGVsbG8", "!!binary '!'", "!!timestamp 2001-99-99",
    "!!set {a, b}", "!!omap [a: 1]", "!!float x", "!!int x", "*a", "&a [*a]", "&a {b: *a}", "1:2:3:4", "0o7", "0b2",
    "2001-12-15 2:59:43", "<<", "{<<: [1]}", "? [a]", "'\\ud800'", '"\\ud800"', "\\x00", "\u2028", "é" * 300, "a: b: c",
    "[" * 400, "{a: " * 400, "- " * 200, "|", ">", "%YAML 9.9", "---", "...", "\t", "@", "`", "1_000", "+.inf",
    "!<tag:yaml.org,2002:map> {}", "{? {a: 1} : 2}", "{[1]: 2}", "=", "1e5", "65537", "4294967296",
    "18446744073709551616",
)  # fmt: skip


def damaged_text(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Values of a text file replaced, lines moved; sometimes its bytes."""
    if rng.random() < 0.2:
        return damaged(data, rng, others)
    lines = data.decode("utf-8", "replace").split("\n")
    for _ in range(rng.choice((1, 1, 2, 3))):
        if not lines:
            break
        at = rng.randrange(len(lines))
        key, colon, _ = lines[at].partition(":")
        wound = rng.randrange(6)
        if wound <= 2 and colon:
            lines[at] = f"{key}: {rng.choice(WORDS)}"
        elif wound == 3:
            lines.insert(at, " " * rng.randrange(6) + rng.choice(WORDS))
        elif wound == 4:
            lines[at] = " " * rng.randrange(6) + lines[at].strip()
        else:
            lines[at : at + rng.choice((1, 3, 30))] = [lines[rng.randrange(len(lines))]] * rng.choice((0, 1, 2))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


NUMBERS = (-1, 0, 1, 7, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, 1 << 70, 1.5, float("inf"), None, "a", [], {}, True)


def damaged_safetensors(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Lies in the header, whose length is right again afterwards, mostly."""
    if rng.random() < 0.3:
        return damaged(data, rng, others)
    size = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    for _ in range(rng.choice((1, 1, 3))):
        name = rng.choice(list(header) or ["x"])
        entry = header.get(name)
        wound = rng.randrange(7)
        if wound == 0 and isinstance(entry, dict) and entry.get("shape"):
            entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(NUMBERS)
        elif wound == 1 and isinstance(entry, dict) and "data_offsets" in entry:
            entry["data_offsets"][rng.randrange(2)] = rng.choice(NUMBERS)
        elif wound == 2 and isinstance(entry, dict):
            entry["dtype"] = rng.choice(
                ("F64", "I64", "BOOL", "F8_E4M3", "F4", "C64", "U7", "", 3, None, "BF16", "F16")
            )
        elif wound == 3 and isinstance(entry, dict):
            header[rng.choice(("x" * 5000, "", "\x00", name + ".x", "model." + name, "é"))] = dict(entry)
        elif wound == 4:
            header["__metadata__"] = rng.choice(({"a": 1}, {"a": "b"}, [], "x", {"a" * 100_000: "b"}, None))
        elif wound == 5:
            header.pop(name, None)
        else:
            header[name] = rng.choice(NUMBERS)
    text = json.dumps(header).encode()
    length = len(text) if rng.random() < 0.9 else rng.choice((0, 1, 1 << 20, 1 << 40, (1 << 64) - 1, len(text) - 1))
    return length.to_bytes(8, "little") + text + rest


# Readers --------------------------------------------------------------------------------------------------------------

Damage = Callable[[bytes, random.Random, "list[bytes]"], bytes]


def _reader(name: str, folder: Path) -> tuple[Callable[[Path], object], list[Damage]]:
    """How a file is read, and how it is damaged before."""
    archives: list[Damage] = [damaged, damaged_inside, damaged_inside]
    if name == "torch":
        from foldkernels.compat.checkpoints.torch_file import read_torch_file

        return read_torch_file, archives
    if name == "multiflow":
        from foldkernels.compat.multiflow.checkpoint.files import read_checkpoint

        return read_checkpoint, archives
    if name == "multiflow-safetensors":
        from foldkernels.compat.multiflow.checkpoint import loading

        return loading.load, [damaged_safetensors]
    if name == "config":
        from foldkernels.compat.multiflow.checkpoint import loading

        return _with_config(loading.load, folder), [damaged_text]
    if name == "boltz":
        from foldkernels.compat import boltz

        return lambda path: boltz.load_pairformer(path), archives
    if name == "boltz-safetensors":
        from foldkernels.compat import boltz

        return lambda path: boltz.load_pairformer(path), [damaged_safetensors]
    if name == "esm":
        from foldkernels.compat import esm

        return lambda path: esm.load(path, contacts=False), archives
    if name == "esm-config":
        from foldkernels.compat import esm

        return _in_a_folder(lambda path: esm.load(path, contacts=False)), [damaged_text, damaged]
    if name == "structure":
        from foldkernels.compat.multiflow.structures.reading import read_structure

        return read_structure, [damaged, damaged_text]
    if name == "results":
        return _compared, [damaged_text, damaged]
    if name == "verify":
        from foldkernels.cli.explain import empty_model

        return empty_model, [damaged_text]
    if name == "rna":
        from foldkernels.compat import rna_frameflow

        return _with_config(rna_frameflow.load, folder), [damaged_text]
    if name == "structure-cache":
        return _kept(next((folder / "whole").iterdir())), [damaged_safetensors, damaged]
    raise SystemExit(f"no reader {name!r}")


def _with_config(load: Callable[[Path], object], folder: Path) -> Callable[[Path], object]:
    """A damaged config beside whole weights."""

    def read(path: Path) -> object:
        (folder / "config.yaml").write_bytes(path.read_bytes())
        return load(folder / "last.ckpt")

    return read


def _in_a_folder(load: Callable[[Path], object]) -> Callable[[Path], object]:
    """A damaged config.json beside whole weights."""

    def read(path: Path) -> object:
        (path.parent / "config.json").write_bytes(path.read_bytes())
        return load(path.parent)

    return read


def _compared(path: Path) -> object:
    """What `bench --compare` tells of a file and its whole self; files that it cannot compare are refused as well."""
    import dataclasses

    from foldkernels.benchmarks.report.comparison import as_dict, as_text, compare_results
    from foldkernels.benchmarks.report.results import read
    from foldkernels.errors import BadInput

    found = read(path)
    whole = read(next((path.parent / "whole").iterdir()))
    for old, new in ((whole, found), (found, whole), (found, dataclasses.replace(found))):
        try:
            for beside_baseline in (False, True):
                told = compare_results(old, new, beside_baseline=beside_baseline)
                json.dumps([as_text(told), as_dict(told)])
        except BadInput as error:  # of two files: it need not name them
            raise BadInput(f"{path}: {error}") from error
    return found


def _kept(whole: Path) -> Callable[[Path], object]:
    """An entry of the structures' cache: what it holds, or nothing; never anything else."""
    from foldkernels.compat.multiflow.dataset import parsed
    from foldkernels.errors import BadInput

    expected = parsed._load(whole)
    assert expected is not None

    def read(path: Path) -> object:
        found = parsed._load(path)
        if found is None:  # the structure itself is read then
            raise BadInput(f"{path}: of no use")
        assert parsed._to_bytes(found) == parsed._to_bytes(expected), "it holds something else"
        return found

    return read


# The process ----------------------------------------------------------------------------------------------------------


def _alarm(*_: object) -> None:
    raise TooSlow


def _watched(seen: list[str]) -> Callable[[str, tuple[Any, ...]], None]:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if DEEDS.match(event) and len(seen) < 20:
            seen.append(f"{event} {str(arguments)[:120]}")

    return hook


def files(seeds: list[bytes], damages: list[Damage], count: int, seed: int) -> Iterator[bytes]:
    """The same for the same seed; with a count of 0, the files as they are."""
    if count == 0:
        yield from seeds
    for i in range(count):
        rng = random.Random(f"{seed} {i}")
        yield rng.choice(damages)(rng.choice(seeds), rng, seeds)


def main(count: int, seed: int, jobs: dict[str, Path]) -> dict[str, Any]:
    """Read the whole files of every reader, and then damaged ones."""
    import warnings

    warnings.simplefilter("ignore")
    made = {}
    for name, folder in jobs.items():
        read, damages = _reader(name, folder)
        whole = sorted((folder / "whole").iterdir())
        made[name] = folder, read, damages, whole
        for path in whole if count else sorted((folder / "good").iterdir()):  # imports what is imported lazily
            read(Path(shutil.copy(path, folder / f"damaged{path.suffix}")))
    for codec in ("cp437", "raw_unicode_escape"):  # what zipfile and old pickles read names with
        "".encode(codec)
    importlib.import_module("omegaconf.vendor.antlr4.LL1Analyzer")  # what omegaconf words some errors with
    deeds: list[str] = []
    sys.addaudithook(_watched(deeds))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    signal.signal(signal.SIGPROF, _alarm)
    return {
        name: _tried(folder, read, files([path.read_bytes() for path in whole], damages, count, seed), whole[0], deeds)
        for name, (folder, read, damages, whole) in made.items()
    }


def _tried(
    folder: Path, read: Callable[[Path], object], contents: Iterator[bytes], like: Path, deeds: list[str]
) -> dict[str, Any]:
    """What came of reading each."""
    from foldkernels.errors import BadInput

    counts = {"read": 0, "refused": 0, "wrong": 0}
    wrong: list[str] = []
    accepted: list[int] = []
    slowest = 0.0
    path = folder / f"damaged{like.suffix}"
    for i, content in enumerate(contents):
        path.write_bytes(content)
        start, said, outcome = time.process_time(), "", "wrong"
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            read(path)
            outcome = "read"
            accepted.append(i)
        except BadInput as error:
            outcome = "refused"
            if str(folder) not in str(error) or len(str(error)) > 6000:
                said = f"names no file, or goes on and on: {str(error)[:300]}"
        except TooSlow:
            said = f"took more than {SECONDS} s"
        except BaseException as error:
            said = f"{type(error).__name__}: {str(error)[:300]}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        slowest = max(slowest, time.process_time() - start)
        if deeds:
            said += f" did {deeds}"
            deeds.clear()
        counts["wrong" if said else outcome] += 1
        if said:
            wrong.append(f"file {i}: {said}")
            (folder / f"wrong-{i}{path.suffix}").write_bytes(content)
    return {**counts, "slowest": round(slowest, 2), "problems": wrong[:40], "accepted": accepted}


if __name__ == "__main__":
    count, seed, *jobs = sys.argv[1:]
    folders = {name: Path(folder) for name, _, folder in (job.partition("=") for job in jobs)}
    print(json.dumps(main(int(count), int(seed), folders)))
