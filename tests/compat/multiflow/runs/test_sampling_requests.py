"""What people ask of sampling: ranges, folders, any seed, complexes, motifs, formats."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import gemmi
import pytest
import torch
import typer

from foldkernels.cli.options import lengths
from foldkernels.compat.multiflow.checkpoint.loading import load
from foldkernels.compat.multiflow.runs.contigs import Contigs, motif_inputs
from foldkernels.compat.multiflow.runs.sampling import run_sampling
from foldkernels.compat.multiflow.structures.reading import Backbone, read_structure
from foldkernels.compat.multiflow.structures.writing import ResidueLabels, pdb_chain_names, write_mmcif, write_pdb
from foldkernels.configs.seeds import generator_seed
from foldkernels.errors import BadInput

from ....support.pdb_text import LETTERS, NAMES, pdb_lines

SMALL = Path(__file__).parents[3] / "goldens" / "multiflow" / "small"
SMALL_CHAIN = Path(__file__).parents[3] / "goldens" / "multiflow" / "small_chain"


@pytest.fixture(scope="module")
def model() -> Any:
    return load(SMALL)


@pytest.fixture
def dimer(tmp_path: Path) -> Path:
    """Chains B and H, numbered from 13 and from 101, the latter with an insertion."""
    heavy = [
        line[:22] + " 104A" + line[27:] if line[22:26] == " 105" else line
        for line in pdb_lines(chain="H", start=101, shift=12)
    ]
    path = tmp_path / "dimer.pdb"
    path.write_text("\n".join([*pdb_lines(chain="B", start=13), "TER", *heavy, "TER", "END"]))
    return path


def sample(model: Any, out: Path, **arguments: Any) -> Any:
    return run_sampling(model, model.config.interpolant, out, num_timesteps=3, write_trajectories=False, **arguments)


def numbering(structure: gemmi.Structure) -> dict[str, list[str]]:
    return {chain.name: [str(residue.seqid) for residue in chain] for chain in structure[0]}


# Lengths and seeds


def test_lengths() -> None:
    assert lengths(["60-64", "100,60"]) == [60, 61, 62, 63, 64, 100]
    assert lengths(["60-80:10"]) == [60, 70, 80]
    assert lengths(["7 - 7"]) == [7]
    assert lengths(None) == []
    for wrong in ("80-60", "0-5", "5-6:0", "a-b", "1-99999", "-5"):
        with pytest.raises(typer.BadParameter):
            lengths([wrong])


@pytest.mark.parametrize("seed", [0, 123, 2**63 - 2, -1, 2**63, 2**200, -(2**200)])
def test_any_whole_number_is_a_seed(model: Any, tmp_path: Path, seed: int) -> None:
    own = generator_seed(seed)
    torch.Generator().manual_seed(own)
    assert own == seed or not 0 <= seed < 2**63 - 1
    assert own != generator_seed(seed + 1)
    first, again = (sample(model, tmp_path / name, lengths=[5], seed=seed) for name in "ab")
    assert first.samples[0].seed == again.samples[0].seed
    texts = [(tmp_path / name / "length_5/sample_0/sample.pdb").read_text() for name in "ab"]
    assert texts[0] == texts[1]


# Files and folders


def test_folders_and_equal_names(model: Any, tmp_path: Path) -> None:
    for folder, count in (("one", 5), ("two", 6), ("two/deep", 7)):
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / folder / "x.pdb").write_text("\n".join(pdb_lines(NAMES[:count])))
    (tmp_path / "in/two/y.pdb").write_text("\n".join(pdb_lines(NAMES[:4])))
    (tmp_path / "in/two/y.ent").write_text("\n".join(pdb_lines(NAMES[:3])))
    (tmp_path / "in/two/broken.pdb").write_text("<html></html>")
    with pytest.warns(UserWarning, match=r"1 of 6 files cannot be used and are passed over, the first: .*an HTML page"):
        run = sample(model, tmp_path / "out", task="inverse_folding", pdb=[tmp_path / "in", tmp_path / "in/one/x.pdb"])
    assert [record.folder for record in run.samples] == [
        "length_5/one_x", "length_7/deep_x", "length_6/two_x", "length_3/y_ent", "length_4/y_pdb",
    ]  # fmt: skip
    assert len((tmp_path / "out/sample.fasta").read_text().split(">")) == 6
    with pytest.raises(BadInput, match="an HTML page"):
        sample(model, tmp_path / "out", task="inverse_folding", pdb=tmp_path / "in/two/broken.pdb")
    shutil.copytree(tmp_path / "in/two", tmp_path / "more/in/two")
    (tmp_path / "more/in/two/broken.pdb").unlink()
    (tmp_path / "in/two/broken.pdb").unlink()
    run = sample(
        model,
        tmp_path / "again",
        task="inverse_folding",
        pdb=[tmp_path / "in/two/y.pdb", tmp_path / "more/in/two/y.pdb"],
    )
    assert [record.folder for record in run.samples] == [
        f"length_4/{tmp_path.name}_in_two_y", "length_4/more_in_two_y",
    ]  # fmt: skip


# Complexes


@pytest.mark.parametrize("form", ["pdb", "mmcif"])
@pytest.mark.parametrize("task", ["inverse_folding", "forward_folding"])
def test_a_complex_keeps_its_chains_and_numbers(model: Any, dimer: Path, tmp_path: Path, task: Any, form: Any) -> None:
    run_sampling(model, model.config.interpolant, tmp_path / "out", task=task, pdb=dimer, num_timesteps=3, form=form)
    folder = tmp_path / "out/length_16/dimer"
    ending = {"pdb": ".pdb", "mmcif": ".cif"}[form]
    expected = {
        "B": [str(number) for number in range(13, 21)],
        "H": ["101", "102", "103", "104", "104A", "106", "107", "108"],
    }
    names = ["sample", "bb_traj", "x0_traj"] + ["dimer_gt_1"] * (task == "forward_folding")
    for name in names:
        structure = gemmi.read_structure(str(folder / f"{name}{ending}"))
        assert numbering(structure) == expected, name
        assert len(structure) == (4 if name == "bb_traj" else 3 if name == "x0_traj" else 1)
    written = read_structure(folder / f"sample{ending}")
    lines = (folder / "sample.fasta").read_text().splitlines()
    assert lines[::2] == [">length_16_dimer_B", ">length_16_dimer_H"]
    assert "".join(lines[1::2]) == written.sequence
    assert (tmp_path / "out/sample.fasta").read_text().splitlines() == lines
    if task == "inverse_folding":
        known = read_structure(dimer)
        torch.testing.assert_close(written.trans, known.trans, rtol=0, atol=2e-3)
        assert (folder / "true_aa.fa").read_text() == f">seq_1_B\n{LETTERS}\n>seq_1_H\n{LETTERS}\n"
    again = run_sampling(
        model, model.config.interpolant, tmp_path / "out", task=task, pdb=dimer, num_timesteps=3, form=form
    )
    assert [record.status for record in again.samples] == ["kept"]


def test_what_the_model_sees_of_a_complex(model: Any, dimer: Path, tmp_path: Path) -> None:
    """Without `embed_chain` what the original's inference gives it, one chain; with it the chains."""
    for own, chains, numbers in (
        (model, [1] * 16, list(range(16))),
        (load(SMALL_CHAIN), [1] * 8 + [2] * 8, [*range(1, 9), 1, 2, 3, 4, 4, 6, 7, 8]),
    ):
        seen = []
        own.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        sample(own, tmp_path / str(len(set(chains))), task="inverse_folding", pdb=dimer)
        own._forward_pre_hooks.clear()
        assert seen[0]["chain_idx"][0].tolist() == chains
        assert seen[0]["res_idx"][0].tolist() == numbers


def test_names_of_chains_in_pdb_files(tmp_path: Path) -> None:
    assert pdb_chain_names(["A", "B"]) == ("A", "B")
    assert pdb_chain_names(["B", "heavy", "A1", "a"]) == ("B", "A", "C", "a")
    labels = ResidueLabels(("heavy", "A"), torch.tensor([1, 2]), torch.tensor([5, -3]), ("", "B"))
    atoms, types = torch.randn(2, 37, 3), torch.tensor([0, 1])
    write_pdb(tmp_path / "x.pdb", atoms, types, labels=labels)
    write_mmcif(tmp_path / "x.cif", atoms, types, labels=labels)
    assert numbering(gemmi.read_structure(str(tmp_path / "x.pdb"))) == {"B": ["5"], "A": ["-3B"]}
    assert numbering(gemmi.read_structure(str(tmp_path / "x.cif"))) == {"heavy": ["5"], "A": ["-3B"]}
    with pytest.raises(ValueError, match="63 chains"):
        pdb_chain_names([str(number) for number in range(100, 163)])


# Motifs


@pytest.fixture
def known(dimer: Path) -> Backbone:
    return read_structure(dimer)


def test_contigs(known: Backbone) -> None:
    contigs = Contigs(" ['2-4/B15-17/3/H104/1-2'] ", known)
    assert contigs.text == "2-4/B15-17/3/H104/1-2"
    assert (contigs.shortest, contigs.longest) == (2 + 3 + 3 + 2 + 1, 4 + 3 + 3 + 2 + 2)
    drawn = {contigs.draw(seed).drawn for seed in range(60)}
    assert drawn == {f"{first}/B15-17/3/H104/{last}" for first in (2, 3, 4) for last in (1, 2)}
    motif = contigs.draw(3, lengths=[12])
    assert len(motif.source) == 12
    assert motif.source[motif.source >= 0].tolist() == [2, 3, 4, 11, 12]  # 104 and 104A
    assert torch.equal(motif.source, contigs.draw(3, lengths=[12]).source)
    assert motif.labels is None
    two = Contigs("B13-15/2/0 1/H101-102", known).draw(0)
    assert two.chain_index.tolist() == [1] * 5 + [2] * 3
    assert two.drawn == "B13-15/2/0 1/H101-102"
    assert two.labels is not None
    assert (two.labels.chains, two.labels.numbers.tolist()) == (("A", "B"), [0, 1, 2, 3, 4, 0, 1, 2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "nothing in it"),
        ("10-20", "keeps no residue"),
        ("5/C10-12", "'C10-12' is neither a length nor residues of a chain of the structure"),
        ("5/B10-14", "no residue 10, 11, 12 with a backbone in chain B \\(it has 13 to 20\\)"),
        ("5/B16-14", "counts down"),
        ("9-5/B13", "counts down"),
        ("5//B13", "two strokes"),
        ("5/B13 H101", "does not end with '/0'"),
        ("B13-15/5/B15-16", "residue B15 is kept twice"),
        ("5/B13-x", "neither a length"),
    ],
)
def test_contigs_that_are_wrong(known: Backbone, text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        Contigs(text, known)
    assert "10-40/A163-181/10-40" in str(error.value.hint)


def test_lengths_that_contigs_never_give(known: Backbone) -> None:
    with pytest.raises(BadInput, match="give 13 to 15 residues, never 3, 99"):
        Contigs("5-7/B13-20", known).draw(0, lengths=[3, 99])


def test_motifs_are_centred(known: Backbone) -> None:
    motifs = [Contigs("1-9/B15-17/2/H101-103/1-9", known).draw(seed, lengths=[18]) for seed in range(3)]
    inputs = motif_inputs(motifs, known)
    for item, motif in enumerate(motifs):
        kept = motif.source >= 0
        places = motif.source[kept]
        assert inputs["diffuse_mask"][item].tolist() == (~kept).float().tolist()
        assert float(inputs["trans_1"][item][kept].mean(0).abs().max()) < 1e-5
        shifted = known.trans[places] - known.trans[places].mean(0)
        torch.testing.assert_close(inputs["trans_1"][item][kept], shifted, rtol=0, atol=1e-5)
        assert torch.equal(inputs["rotmats_1"][item][kept], known.rotmats[places])
        assert torch.equal(inputs["aatypes_1"][item][kept], known.aatypes[places])


@pytest.mark.parametrize("rewrite", [False, True])
def test_a_motif_stays(model: Any, dimer: Path, known: Backbone, tmp_path: Path, rewrite: bool) -> None:
    run = sample(
        model,
        tmp_path / "out",
        task="motif_scaffolding",
        pdb=dimer,
        contigs="3-6/B14-18/2/H102-103/3-6",
        lengths=[16, 17, 18],
        num=5,
        batch_size=3,
        rewrite_fixed_types=rewrite,
    )
    assert len(run.written) == 5
    changed = 0
    for record in run.samples:
        assert record.folder == f"length_{record.length}/dimer_3-6_B14-18_2_H102-103_3-6_sample_{record.index}"
        assert record.length in (16, 17, 18)
        folder = tmp_path / "out" / record.folder
        written = read_structure(folder / "sample.pdb", center=False)
        assert written.num_res == record.length
        told = json.loads((folder / "contigs.json").read_text())
        assert [entry["from_number"] for entry in told["kept"]] == [14, 15, 16, 17, 18, 102, 103]
        places = [entry["place"] for entry in told["kept"]]
        sources = [1, 2, 3, 4, 5, 9, 10]
        expected = known.trans[sources] - known.trans[sources].mean(0)
        torch.testing.assert_close(written.trans[places], expected, rtol=0, atol=2e-3)
        torch.testing.assert_close(written.rotmats[places], known.rotmats[sources], rtol=0, atol=2e-3)
        changed += sum(int(written.aatypes[a]) != int(known.aatypes[b]) for a, b in zip(places, sources, strict=True))
        temperatures = [residue[0].b_iso for residue in gemmi.read_structure(str(folder / "sample.pdb"))[0][0]]
        assert [place for place, value in enumerate(temperatures) if value == 0] == places
    # The original's last step predicts them anew, in a model of random weights hardly the same.
    assert (changed > 0) == rewrite
    arguments = json.loads((tmp_path / "out/run.json").read_text())["arguments"]
    assert arguments["rewrite_fixed_types"] is rewrite
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = sample(
            model, tmp_path / "out", task="motif_scaffolding", pdb=dimer, contigs="3-6/B14-18/2/H102-103/3-6",
            lengths=[16, 17, 18], num=5, batch_size=3, rewrite_fixed_types=rewrite,
        )  # fmt: skip
    assert {record.status for record in again.samples} == {"kept"}


def test_a_motif_in_two_chains(model: Any, dimer: Path, tmp_path: Path) -> None:
    sample(model, tmp_path, task="motif_scaffolding", pdb=dimer, contigs="2/B14-18/0 3/H102-103", form="mmcif")
    folder = next(tmp_path.glob("length_12/*"))
    assert numbering(gemmi.read_structure(str(folder / "sample.cif"))) == {
        "A": [str(number) for number in range(7)],
        "B": [str(number) for number in range(5)],
    }
    assert (folder / "sample.fasta").read_text().count(">") == 2


def test_any_seed_in_a_training_config() -> None:
    from foldkernels.compat.multiflow.training.settings import ExperimentConfig

    assert ExperimentConfig(seed=7).seed == 7
    for seed in (-3, 2**70):
        assert ExperimentConfig(seed=seed).seed == generator_seed(seed)
