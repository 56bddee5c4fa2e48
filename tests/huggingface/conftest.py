"""Models that all tests of this folder look at."""

import pytest

from megallama.huggingface.import_model import import_model
from tests.huggingface.models import FAMILIES, make_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """`<family>` as transformers saves it and `<family>-imported`, for every family."""
    folder = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        make_model(name, folder / name)
        import_model(folder / name, folder / f"{name}-imported", name=name)
    return folder
