"""Masks from files of every kind that people have: read as they were written, refused where they are not."""

import io
import json
import zipfile

import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp
import torch
import torch.nn.utils.prune as prune
from safetensors.torch import save_file
from torch import nn

import vspdf
from vspdf.errors import UserError
from vspdf.interop import mask_files
from vspdf.pattern import Pattern

SHAPE = (12, 20)
PATTERN = Pattern.random(SHAPE, 0.7, seed=3)
MASK = PATTERN.mask()
WEIGHT = torch.where(MASK, torch.arange(1.0, 241.0).reshape(SHAPE), 0.0)
OTHER = Pattern.random(SHAPE, 0.5, seed=4)


def smtx(path):
    rows, columns = PATTERN.csr()
    lines = (" ".join(map(str, numbers)) for numbers in (rows, columns))
    path.write_text(f"12, 20, {PATTERN.nnz}\n" + " \n".join(lines) + " \n")


def pruned(path):
    layer = nn.Linear(20, 12, bias=False)
    prune.custom_from_mask(layer, "weight", MASK)
    torch.save({f"h.0.{name}": tensor for name, tensor in layer.state_dict().items()}, path)


def parametrized(path):
    save_file({"fc.parametrizations.weight.original": torch.randn(SHAPE), "fc.parametrizations.weight.0.mask": MASK,
               "fc.bias": torch.zeros(12)}, path)  # fmt: skip


WRITERS = {
    "smtx of DLMC": ("a.smtx", smtx),
    "mtx": ("a.mtx", lambda path: scipy.io.mmwrite(path, sp.coo_matrix(WEIGHT.numpy()))),
    "mtx of a pattern": ("a.mtx", lambda path: scipy.io.mmwrite(path, sp.coo_matrix(WEIGHT.numpy()), field="pattern")),
    "mtx of an array": ("a.mtx", lambda path: scipy.io.mmwrite(path, WEIGHT.numpy())),
    **{
        f"npz of scipy's {kind}": ("a.npz", lambda path, k=kind: sp.save_npz(path, sp.csr_matrix(MASK).asformat(k)))
        for kind in ("csr", "csc", "coo")
    },
    "npz of scipy's arrays": ("a.npz", lambda path: sp.save_npz(path, sp.csr_array(WEIGHT.numpy()), compressed=False)),
    "npz of booleans": ("a.npz", lambda path: np.savez(path, mask=MASK.numpy())),
    "npz of bytes": ("a.npz", lambda path: np.savez_compressed(path, MASK.numpy().astype(np.uint8))),
    "pt of booleans": ("a.pt", lambda path: torch.save(MASK, path)),
    "pt of bytes": ("a.pt", lambda path: torch.save({"weight_mask": MASK.to(torch.uint8)}, path)),
    "pt of zeros": ("a.pt", lambda path: torch.save(WEIGHT, path)),
    "pt of a CSR tensor": ("a.pt", lambda path: torch.save({"w": WEIGHT.to_sparse_csr()}, path)),
    "pt of a COO tensor": ("a.pt", lambda path: torch.save(WEIGHT.to_sparse(), path)),
    "pt of torch.nn.utils.prune": ("a.pt", pruned),
    "safetensors of booleans": ("a.safetensors", lambda path: save_file({"h.0.fc": MASK}, path)),
    "safetensors of NaN": (
        "a.safetensors",
        lambda path: save_file({"h.0.fc.weight": torch.where(MASK, WEIGHT, float("nan")), "b": torch.ones(3)}, path),
    ),
    "safetensors of a weight and its mask": (
        "a.safetensors", lambda path: save_file({"fc.weight": torch.randn(SHAPE), "fc.weight_mask": MASK}, path),
    ),
    "safetensors of torchao": ("a.safetensors", parametrized),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITERS)
def test_what_others_write_is_read(tmp_path, kind):
    name, write = WRITERS[kind]
    write(tmp_path / name)
    assert Pattern.read(tmp_path / name) is PATTERN
    ((label, found),) = mask_files.files(tmp_path)
    assert found is PATTERN and label == "a"


@pytest.mark.parametrize("ending", ["smtx", "mtx", "npz", "pt", "safetensors"])
@pytest.mark.parametrize("sparsity", [0.0, 0.7, 1.0], ids=["full", "some", "none"])
def test_what_is_written_is_read_again(tmp_path, ending, sparsity):
    pattern = Pattern.random((7, 9), sparsity, seed=1)
    pattern.write(tmp_path / f"m.{ending}")
    assert Pattern.read(str(tmp_path / f"m.{ending}")) is pattern


def test_others_read_what_is_written(tmp_path):
    for ending in ("npz", "mtx", "pt"):
        PATTERN.write(tmp_path / f"m.{ending}")
    assert (sp.load_npz(tmp_path / "m.npz").toarray() == MASK.numpy()).all()
    assert (scipy.io.mmread(tmp_path / "m.mtx").toarray() == MASK.numpy()).all()
    assert torch.equal(torch.load(tmp_path / "m.pt", weights_only=True), MASK)


@pytest.mark.parametrize("symmetry", ["symmetric", "skew-symmetric", "hermitian"])
def test_symmetric_matrices_are_made_whole(tmp_path, symmetry):
    dense = np.tril(np.arange(25.0).reshape(5, 5) % 3, -1)
    whole = dense + (-dense.T if symmetry == "skew-symmetric" else dense.T)
    matrix = sp.coo_matrix(whole + 0j if symmetry == "hermitian" else whole)
    scipy.io.mmwrite(tmp_path / "a.mtx", matrix, symmetry=symmetry)
    assert (Pattern.read(tmp_path / "a.mtx").mask().numpy() == (whole != 0)).all()


# -- sparse matrices --------------------------------------------------------------------------------------------------

SPARSE = {
    "torch COO": lambda: WEIGHT.to_sparse(), "torch CSR": lambda: WEIGHT.to_sparse_csr(),
    "torch CSC": lambda: WEIGHT.to_sparse_csc(),
    **{f"scipy {kind}": (lambda kind=kind: sp.csr_matrix(WEIGHT.numpy()).asformat(kind))
       for kind in ("csr", "csc", "coo", "lil", "dok", "dia")},
    "scipy array": lambda: sp.csr_array(WEIGHT.numpy()),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_matrices(kind):
    assert torch.equal(Pattern.from_sparse(SPARSE[kind]()).mask(), MASK)


def test_blocks_and_explicit_zeros_are_kept():
    dense = torch.zeros(8, 8)
    dense[0, 0] = dense[5, 7] = 1
    for matrix in (
        dense.to_sparse_bsr((4, 4)),
        dense.to_sparse_bsc((4, 4)),
        sp.bsr_matrix(dense.numpy(), blocksize=(4, 4)),
    ):
        assert Pattern.from_sparse(matrix).nnz == 32
    stored = torch.sparse_coo_tensor([[0, 0, 1], [1, 1, 2]], [1.0, -1.0, 0.0], (3, 4))  # one twice, one of zero
    assert Pattern.from_sparse(stored).positions().tolist() == [1, 6]


@pytest.mark.parametrize(
    "matrix, message",
    [(torch.ones(3, 3), "a dense tensor"), (np.eye(3), "ndarray"), ([[1]], "got list"),
     (torch.ones(2, 3, 4).to_sparse(), r"expected a matrix"), (torch.ones(3, 3, 2).to_sparse(2), "expected a matrix")],
    ids=["dense", "NumPy", "list", "three sides", "hybrid"],
)  # fmt: skip
def test_what_is_no_sparse_matrix(matrix, message):
    with pytest.raises(UserError, match=message):
        Pattern.from_sparse(matrix)


def test_indices_outside_are_refused():
    wrong = sp.csr_matrix(MASK.numpy())
    wrong.indices[3] = 10**6
    with pytest.raises(UserError, match="do not fit"):
        Pattern.from_sparse(wrong)
    wrong = sp.csr_matrix(MASK.numpy())
    wrong.indptr[1:3] = (10**6, 0)
    with pytest.raises(UserError, match="do not fit"):
        Pattern.from_sparse(wrong)
    with pytest.raises(UserError, match="a column index lies outside of 0 to 3"):
        Pattern.from_positions((4, 4), np.array([0]), np.array([-1]))


# -- many in one file, folders ----------------------------------------------------------------------------------------


def test_one_of_many(tmp_path):
    save_file({"h.0.fc": MASK, "h.1.fc": OTHER.mask()}, tmp_path / "many.safetensors")
    for name, pattern in {"h.0.fc": PATTERN, "h.1.fc.weight": OTHER, "1.fc": OTHER, "model.h.0.fc": PATTERN}.items():
        assert Pattern.read(tmp_path / "many.safetensors", name=name) is pattern
    for name, message in {
        None: r"holds 2 masks \('h.0.fc', 'h.1.fc'\): say which by name=", "fc": "may be h.0.fc or h.1.fc",
        "h.2.fc": "no mask of 'h.2.fc'. Did you mean 'h.1.fc'|Did you mean 'h.0.fc'",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=message):
            Pattern.read(tmp_path / "many.safetensors", name=name)
    assert dict(mask_files.files(tmp_path)) == {"many:h.0.fc": PATTERN, "many:h.1.fc": OTHER}


def test_the_weights_of_a_model_that_was_pruned(tmp_path):
    """Zeros count where nothing says it better; a matrix of weights alone is none, asked for or not."""
    tensors = {"fc.weight": WEIGHT, "wte.weight": WEIGHT.clone(), "out.weight": torch.ones(SHAPE), "b": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert mask_files.read_all(tmp_path / "model.safetensors") == {"fc": PATTERN}
    assert Pattern.read(tmp_path / "model.safetensors", name="wte") is PATTERN
    with pytest.raises(UserError, match=r"'out.weight' has no mask beside it, no NaN and no zeros"):
        Pattern.read(tmp_path / "model.safetensors", name="out")
    with pytest.raises(UserError, match=r"'b' has the shape \(2,\): expected a matrix"):
        Pattern.read(tmp_path / "model.safetensors", name="b")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_layer_of_a_hugging_face_folder(tmp_path, kind):
    """GPT-2's projections lie [in, out] there."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    name = "transformer.h.0.mlp.c_fc.weight" if kind == "gpt2" else "model.layers.0.mlp.up_proj.weight"
    weight = WEIGHT.T.contiguous() if kind == "gpt2" else WEIGHT
    save_file({name: weight, "ln.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert Pattern.read(path, name=name.removesuffix(".weight")) is PATTERN
        assert Pattern.read(path) is PATTERN


# -- what is not one --------------------------------------------------------------------------------------------------


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mask.npy", bytes(1 << 28))


def pickled(path):
    np.savez(path, mask=np.array([{"a": 1}], dtype=object), allow_pickle=True)


def loose(path, **arrays):
    stream = io.BytesIO()
    np.savez(stream, format=b"csr", shape=np.array(arrays.pop("shape", SHAPE)), **arrays)
    path.write_bytes(stream.getvalue())


BAD = {
    "no file": ("a.smtx", lambda path: None, "not found"),
    "another kind": ("a.txt", lambda path: path.write_text("1 2"), r"expected .smtx, .mtx, .npz, .pt or .safetensors"),
    "smtx of bytes": ("a.smtx", lambda path: path.write_bytes(bytes(range(256))), r"expected three lines: 'rows, col"),
    "smtx of words": ("a.smtx", lambda path: path.write_text("a, b, c\n0 1\n0\n"), "expected three lines"),
    "smtx cut off": ("a.smtx", lambda path: path.write_text("2, 2, 3\n0 1 3\n0 0\n"), "is no whole .smtx file"),
    "smtx of wrong columns": ("a.smtx", lambda path: path.write_text("2, 2, 2\n0 1 2\n0 7\n"), "column index lies out"),
    "smtx of equal columns": ("a.smtx", lambda path: path.write_text("1, 3, 2\n0 2\n1 1\n"), "1 positions come more"),
    "smtx of falling pointers": ("a.smtx", lambda path: path.write_text("3, 2, 2\n0 2 1 2\n0 1\n"), "no whole .smtx"),
    "smtx of a giant": ("a.smtx", lambda path: path.write_text("99999999, 99999999, 0\n0\n\n"), "more positions than"),
    "smtx of digits": ("a.smtx", lambda path: path.write_text("1, 1, 1\n0 9" + "9" * 40 + "\n0\n"), "expected three"),
    "smtx of nothing": ("a.smtx", lambda path: path.write_text(""), "expected three lines"),
    "smtx without rows": ("a.smtx", lambda path: path.write_text("0, 4, 0\n0\n\n"), "at least one row"),
    "mtx of words": ("a.mtx", lambda path: path.write_text("hello\n"), "expected Matrix Market's form"),
    "mtx of a giant": ("a.mtx", lambda path: path.write_text(
        "%%MatrixMarket matrix coordinate real general\n9 9 999999999999\n1 1 1\n"), "entries in"),
    "mtx cut off": ("a.mtx", lambda path: path.write_text(
        "%%MatrixMarket matrix coordinate real general\n9 9 3\n1 1 1\n"), "is no whole .mtx file"),
    "mtx outside": ("a.mtx", lambda path: path.write_text(
        "%%MatrixMarket matrix coordinate real general\n2 2 1\n3 1 1\n"), "is no whole .mtx file"),
    "npz of words": ("a.npz", lambda path: path.write_text("hello"), "is no whole .npz file"),
    "npz that unpacks without end": ("a.npz", bomb, "unpacks to 268,435,456: refused"),
    "npz of a pickle": ("a.npz", pickled, "is no whole .npz file"),
    "npz of scipy's, outside": ("a.npz", lambda path: loose(
        path, data=np.ones(2), indices=np.array([0, 99]), indptr=np.array([0, 2] + [2] * 11)), "npz|do not fit"),
    "npz of scipy's, a giant": ("a.npz", lambda path: loose(
        path, shape=(10**9, 10**9), data=np.ones(0), indices=np.zeros(0), indptr=np.zeros(1)), "more positions than"),
    "npz of numbers": ("a.npz", lambda path: np.savez(path, a=np.arange(6).reshape(2, 3)), "values beside 0 and 1"),
    "npz of a vector": ("a.npz", lambda path: np.savez(path, a=np.ones(3, dtype=bool)), "expected a matrix"),
    "pt of words": ("a.pt", lambda path: path.write_text("hello"), "is no whole checkpoint"),
    "pt of code": ("a.pt", lambda path: torch.save(nn.Linear(2, 2), path), "could run code: refused"),
    "pt of weights": ("a.pt", lambda path: torch.save({"a": torch.ones(2, 2), "b": torch.ones(2)}, path), "no mask"),
    "safetensors of words": ("a.safetensors", lambda path: path.write_text("hello"), "no whole safetensors file"),
    "a folder of nothing": ("a", lambda path: path.mkdir(), "no folder of a model or a run"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_mask_is_refused_in_one_line(tmp_path, kind):
    name, write, message = BAD[kind]
    write(tmp_path / name)
    with pytest.raises(UserError, match=message) as caught:
        Pattern.read(tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("kind", WRITERS)
def test_files_that_were_cut_off(tmp_path, kind):
    name, write = WRITERS[kind]
    write(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for share in (0.1, 0.5, 0.9):
        (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError):
            Pattern.read(tmp_path / name)


def test_writing_asks_for_a_known_ending(tmp_path):
    with pytest.raises(UserError, match=r"ends in .smtx, .mtx, .npz, .pt or .safetensors"):
        PATTERN.write(tmp_path / "mask.csv")
    with pytest.raises(UserError):
        PATTERN.write(tmp_path / "nowhere" / "mask.npz")


# -- where masks are given --------------------------------------------------------------------------------------------


def mlp():
    return nn.ModuleDict({"a": nn.Linear(20, 12), "b": nn.Linear(20, 12), "c": nn.Linear(12, 20)})


def test_sparsify_takes_files(tmp_path):
    save_file({"a": MASK, "b": OTHER.mask()}, tmp_path / "masks.safetensors")
    assert vspdf.sparsify(mlp(), tmp_path / "masks.safetensors") == {"a": PATTERN, "b": OTHER}
    PATTERN.write(tmp_path / "one.smtx")
    found = vspdf.sparsify(mlp(), {"[ab]": str(tmp_path / "one.smtx"), "c": 0.5})
    assert found["a"] is found["b"] is PATTERN and found["c"].sparsity == 0.5
    model = mlp()
    with pytest.raises(UserError, match="does not fit a layer of shape"):
        vspdf.sparsify(model, tmp_path / "one.smtx")
    save_file({"x.y": MASK, "x.z": OTHER.mask()}, tmp_path / "others.safetensors")
    with pytest.raises(
        UserError, match=r"names no layer of the model: it has masks of x.y, x.z, the model has a, b, c"
    ):
        vspdf.sparsify(model, tmp_path / "others.safetensors")
    assert type(model["a"]) is nn.Linear, "the model is as it was"


def test_training_starts_with_the_masks_of_a_file(tiny_config, tmp_path, vspdf):
    from vspdf.runs.folder import Run

    config = tiny_config(tmp_path)
    assert vspdf("train", config)[0] == 0
    again = ("train", config, f"run_dir={tmp_path}/again", "seed=7", "phases.0.init_method=file")
    status, _, err = vspdf(*again)
    assert status == 2 and "init_file, the file with the masks, belong together" in err
    status, _, err = vspdf(*again, f"phases.0.init_file={tmp_path}/run/patterns.npz")
    assert status == 0, err
    patterns = Run(tmp_path / "run").patterns
    assert Run(tmp_path / "again").patterns == patterns
    name, pattern = next(iter(patterns.items()))
    assert mask_files.read_all(tmp_path / "run") == patterns
    assert (
        Pattern.read(tmp_path / "run", name=name) is Pattern.read(tmp_path / "run/patterns.npz", name=name) is pattern
    )
    with pytest.raises(UserError, match=f"{len(patterns)} masks"):
        Pattern.read(tmp_path / "run")
    with pytest.raises(UserError, match="holds no mask"):
        Pattern.read(tmp_path / "run" / "checkpoints" / "step-00000028")
    status, _, err = vspdf(*again[:2], f"run_dir={tmp_path}/other", *again[4:], "phases.0.sparsity=0.8",
                           f"phases.0.init_file={tmp_path}/run/patterns.npz")  # fmt: skip
    assert status == 2 and "has a sparsity of 9" in err and "is to have 80.00%" in err


def test_a_layer_is_simulated_with_the_mask_of_a_file(tmp_path, vspdf):
    PATTERN.write(tmp_path / "m.mtx")
    status, out, err = vspdf("simulate", "layer", "--mask", tmp_path / "m.mtx", "--tokens", 512, "--json")
    assert status == 0, err
    body = json.loads(out)
    assert (body["in_features"], body["out_features"], body["mask"]) == (20, 12, "real")
    assert vspdf("simulate", "layer", "--mask", tmp_path / "m.mtx", "--tokens", 8, "--sparsity", 0.5)[0] == 2
