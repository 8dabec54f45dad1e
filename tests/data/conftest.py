"""Text to prepare, and how: what the tests of corpora, samples and the token cache share."""

import random

import pytest

from vspdf.config.resolve import resolve_data
from vspdf.config.settings import DataConfig
from vspdf.data.text import prepare
from vspdf.errors import UserError

WORDS = ["sparse", "dense", "weight", "token", "layer", "gradient", "step", "café", "naïve", "世界", "\U0001f600"]


@pytest.fixture(scope="session")
def prose():
    """Paragraphs of a few words at random, by a seed."""

    def prose(seed: int, paragraphs: int = 60) -> str:
        rng = random.Random(seed)
        return "\n\n".join(" ".join(rng.choices(WORDS, k=rng.randint(5, 60))) for _ in range(paragraphs)) + "\n"

    return prose


@pytest.fixture
def text_file(tmp_path, prose):
    """A file of such text."""
    path = tmp_path / "text.txt"
    path.write_text(prose(1), encoding="utf-8", newline="")
    return path


@pytest.fixture
def settings_for(tmp_path):
    """Of a corpus: what `prepare` takes, its cache in `tmp_path`."""

    def settings(corpus, **more):
        return resolve_data(DataConfig(**{"corpus": str(corpus), "cache_dir": str(tmp_path / "cache")} | more))

    return settings


@pytest.fixture
def refused(settings_for):
    """The one line with which `prepare` refuses."""

    def message(corpus, sequence_length=16, seed=0, **more) -> str:
        with pytest.raises(UserError) as error:
            prepare(settings_for(corpus, **more), sequence_length, seed)
        assert "\n" not in str(error.value)
        return str(error.value)

    return message
