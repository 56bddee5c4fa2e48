"""Shared set-up of the tests."""

import gc

import pytest

from tests.support.corpus import corpus, tokenizer, tokenizer_path  # noqa: F401 - fixtures
from tests.support.jobs import run_job
from tests.support.ranks import start_forkserver

start_forkserver()


def pytest_collection_finish():
    """Modules and tests stay to the end: garbage collection need not look through them again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """One process; one run for each change of the model or the batch among the layouts."""
    folder = tmp_path_factory.mktemp("oracle")
    results = {}

    def result(extra):
        key = tuple(
            word
            for word in extra
            if word.startswith(("model.", "train.global", "train.micro", "data.", "precision."))
        )
        if key not in results:
            results[key] = run_job(folder, 1, *key, run_name=f"oracle{len(results)}")
        return results[key]

    return result
