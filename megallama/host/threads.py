"""Limits the threads that libraries start on their own. Imports no torch."""

from __future__ import annotations

import os


def one_tokenizer_thread() -> None:
    """Let Hugging Face's tokenizers work in the calling thread alone, where every core has a process of its own."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
