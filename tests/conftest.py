import copy
import gc
import inspect
import json
import logging
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import textwrap

# Before vspdf is imported: the suite neither reads nor leaves anything in the user's cache.
_cache = tempfile.TemporaryDirectory(prefix="vspdf-tests-")
os.environ["VSPDF_CACHE"] = _cache.name
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core: threads that wait for others leave it to those
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job, whose children would ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402

TINY_RUN = """
    name: tiny
    model: {n_layer: 2, d_model: 32, n_head: 4, sequence_length: 16}
    data: {corpus: CORPUS, validation_fraction: 0.1}
    optimizer: {lr: 3.0e-3}
    train:
      batch_size: 8
      threads: 1
      log_every: 1
      eval_every: 0
      eval_tokens: 512
      sample_tokens: 0
      checkpoint_every: 0
      measure_dense: 0
    phases:
      - {name: sparse, sparsity: 0.9, steps: 12, lr_multiple: 2}
      - {name: half, sparsity: 0.5, steps: 8}
      - {name: dense, steps: 8}
"""


@pytest.fixture(scope="module", autouse=True)
def _imports_stay():
    """What imports have left is not looked through again whenever garbage is collected, or referrers are asked for."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A text file of some ten thousand words."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("\n\n".join(inspect.getsource(module) for module in (logging, inspect, textwrap)))
    return path


@pytest.fixture(scope="session")
def tiny_config(corpus):
    """Writes into a folder a configuration that trains in a second; its run goes to run/ beside it."""

    def write(folder):
        path = folder / "tiny.yaml"
        path.write_text(f"run_dir: {folder}/run\n" + textwrap.dedent(TINY_RUN).replace("CORPUS", str(corpus)))
        return path

    return write


@pytest.fixture
def tiny(tmp_path, tiny_config):
    """Path of such a configuration in `tmp_path`."""
    return tiny_config(tmp_path)


@pytest.fixture
def older():
    """Makes a run directory one of before its files had digests, so that they may be altered."""
    from vspdf.runs import digests

    def make(folder):
        for path in folder.glob("checkpoints/*/state.json"):
            body = json.loads(path.read_text())
            del body["files"], body["state_sha256"]
            path.write_text(json.dumps({**body, "state_sha256": digests.of_body(body)}))
        return folder

    return make


@pytest.fixture
def vspdf(monkeypatch, capsys):
    """`vspdf ARGUMENTS` in this process: status, stdout, stderr."""
    from vspdf.cli import app

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["vspdf", *map(str, arguments)])
        status = 0
        try:
            app.main()
        except SystemExit as end:
            status = end.code
        captured = capsys.readouterr()
        return status or 0, captured.out, captured.err

    return call


@pytest.fixture
def refused(vspdf):
    """`vspdf ARGUMENTS` ends with status 2, nothing on stdout, and words that match; no traceback."""

    def check(message, *arguments):
        status, out, err = vspdf(*arguments)
        assert status == 2 and out == ""
        assert re.search(message, " ".join(err.split())) and "Traceback" not in err

    return check


FLAGS = (
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium under Playwright; without them a test that needs it says that it is skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser test")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: no browser test")
    with playwright.sync_playwright() as session:
        browser = session.chromium.launch(executable_path=chromium, args=list(FLAGS))
        yield browser
        browser.close()


# What a value may turn into in a file that somebody damaged or made up.
_NASTY = [None, True, "", "x", -1, 0, 0.5, 10**9, 2**63, float("nan"), {}, [], [[]], [None], {"": 1}, "\0", "\ud800",
         "a" * 5000]  # fmt: skip


def _bent(text, chance):
    """The bytes of `text` after one to three changes: of values, where every line or the whole is JSON, or of bytes."""
    lines = text.splitlines() if text.count("\n") and not text.startswith("[") else [text]
    if text[:1] in "[{" and chance.random() < 0.7:
        trees = [json.loads(line) for line in lines]
        for _ in range(chance.randint(1, 3)):
            _bend_tree(trees, chance)
        return "\n".join(json.dumps(tree) for tree in trees).encode()
    body = bytearray(text.encode())
    for _ in range(chance.randint(1, 3)):
        where = chance.randrange(len(body))
        match chance.randrange(4):
            case 0:
                body[where] ^= 1 << chance.randrange(8)
            case 1:
                del body[where : where + chance.randint(1, 16)]
            case 2:
                body[where:where] = chance.choice((b"\0", b"\xff\xfe", b"\r", b'"', b"[" * 50, b"||", b"]]>", b"&x;"))
            case _:
                del body[max(1, where) :]
    return bytes(body)


def _bend_tree(tree, chance):
    """Changes one value somewhere in nested lists and dicts."""
    places = []

    def walk(node):
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
            places.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    walk(tree)
    if not places:
        return
    holder, key = chance.choice(places)
    match chance.randrange(5):
        case 0 if isinstance(holder, dict):
            holder[key + "x"] = holder.pop(key)
        case 1:
            del holder[key]
        case 2:
            holder[key] = [holder[key]]
        case _:
            holder[key] = copy.deepcopy(chance.choice(_NASTY))


@pytest.fixture
def bent():
    """From a file's text to the bytes of one bent at random, always the same in the same order."""
    chance = random.Random(0)
    return lambda text: _bent(text, chance)
