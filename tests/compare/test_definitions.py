"""Which finished runs a study takes for its own, and studies that cannot be run as they are written."""

import json
import textwrap

import pytest

from vspdf.compare import definition, runner
from vspdf.config import loading
from vspdf.errors import UserError

STUDY = """
    seeds: [0]
    tuning_seeds: [1]
    common:
      model: {n_layer: 1, d_model: 16, n_head: 2, sequence_length: 16}
      data: {corpus: CORPUS, validation_fraction: 0.05, test_fraction: 0.05}
      train: {batch_size: 8, threads: 1}
    arms:
      dense:
        phases: [{steps: 12}, {steps: 4}]
      sparse:
        phases: [{sparsity: 0.75, steps: 12}]
"""


@pytest.fixture
def write(tmp_path, corpus):
    """Writes the study, changed as asked."""

    def write(*changes):
        text = textwrap.dedent(STUDY).replace("CORPUS", str(corpus))
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return write


# -- whose a run is ---------------------------------------------------------------------------------------------------

LEFT_OUT = {
    "init_from": ("sparse:\n", "sparse:\n    init_from: earlier\n"),
    "train.threads": ("threads: 1", "threads: 2"),
}


@pytest.mark.parametrize("key", LEFT_OUT)
def test_a_run_with_a_setting_that_the_study_no_longer_has_is_refused(write, tmp_path, key):
    """What the trainer filled in, vocabulary and place in the data, is no such setting."""
    folder, old = tmp_path / "runs" / "sparse", write(LEFT_OUT[key])
    before = definition.load(old).arms["sparse"]
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(loading.to_yaml(before.configure({}, 0, folder).with_data(257, 0)))
    runner._StudyRun(before, {}, 0, True, folder).check()
    path = write(("threads: 1", "memory: normal")) if key == "train.threads" else write()
    with pytest.raises(UserError, match=rf"was trained with {key} = .*, the study says None: remove it, or give"):
        runner._StudyRun(definition.load(path).arms["sparse"], {}, 0, True, folder).check()


def test_results_that_are_kept_are_of_the_study_as_it_is(refused, vspdf):
    refused("--results shows what was kept of the study as it is: 'seeds=.77.' is for running",
            "compare", "toy", "folder=here", "seeds=[77]", "--results")  # fmt: skip
    status, out, _ = vspdf("compare", "toy", "folder=here", "--results", "--json")
    assert status == 0 and json.loads(out)["seeds"] == [0, 1, 2, 3, 4]
