"""Shared set-up of the tests."""

import gc
import itertools
import logging
import os
import random

import pytest

from tests.support.corpus import corpus, tokenizer, tokenizer_path  # noqa: F401 - fixtures
from tests.support.jobs import run_job
from tests.support.ranks import start_forkserver

start_forkserver()

ORDER_SEED = "MEGALLAMA_TEST_ORDER"
"""Environment variable with the seed of the order of files, which all workers share; drawn where it is not set."""


def pytest_configure():
    """Draw the seed in the first process; workers inherit it."""
    os.environ.setdefault(ORDER_SEED, str(random.SystemRandom().randrange(10**6)))


def pytest_terminal_summary(terminalreporter):
    """How to run the tests in this order again."""
    terminalreporter.write_line(f"order of files: {ORDER_SEED}={os.environ[ORDER_SEED]}")


def pytest_collection_modifyitems(items):
    """Files in random order, so that none comes to need another. The longest ones stay first: no worker ends late."""
    files = [list(group) for _, group in itertools.groupby(items, key=lambda item: item.path)]
    random.Random(int(os.environ[ORDER_SEED])).shuffle(files)
    files.sort(key=lambda group: group[0].path.parent.name != "layouts")
    items[:] = [item for group in files for item in group]


def pytest_collection_finish():
    """Modules and tests stay to the end: garbage collection need not look through them again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def logging_as_before():
    """A run in this process sets the level of the package's log; the next test begins without it."""
    package = logging.getLogger("megallama")
    level = package.level
    yield
    package.setLevel(level)


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
