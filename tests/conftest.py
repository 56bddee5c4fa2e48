"""Shared set-up of the tests."""

from tests.ranks import start_forkserver

start_forkserver()
