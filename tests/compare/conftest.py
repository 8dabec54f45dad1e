"""Studies in a file, changed as a test asks."""

import textwrap

import pytest


@pytest.fixture(scope="session")
def study_file(corpus):
    """Writes the text of a study into a folder, each (old, new) replaced."""

    def written(text, folder, *changes):
        text = textwrap.dedent(text).replace("CORPUS", str(corpus))
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = folder / "mine.yaml"
        path.write_text(text)
        return path

    return written
