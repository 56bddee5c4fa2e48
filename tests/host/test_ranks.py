"""Ranks of one machine are ranks on its CPU, whatever else it has."""

import os

from megallama.host.ranks import start_forkserver


def test_a_gpu_of_the_machine_is_hidden_from_them(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    start_forkserver()
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["DS_ACCELERATOR"]) == ("", "cpu")
