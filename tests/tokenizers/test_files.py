"""Which file of a folder is its tokenizer, and that a copy is what was loaded, for every kind of file and folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import tokenizers
from megallama.host.errors import UserError
from megallama.tokenizers.begin import begin_token
from megallama.tokenizers.files import copy_tokenizer, find_tokenizer
from megallama.tokenizers.load import Tokenizer, load_tokenizer
from megallama.trainer.run_folder import RunFolder
from tests.tokenizers.test_load import TRICKY, save_hugging_face
from tests.tokenizers.test_rank_files import describe, small


def _model(folder: Path, model: Path) -> Path:
    shutil.copy(model, folder / "mine.model")
    return folder / "mine.model"


def _model_folder(folder: Path, model: Path) -> Path:
    shutil.copy(model, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}', encoding="utf-8")
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    return folder


def _json_folder(folder: Path, model: Path) -> Path:
    """With an end token that only a side file names."""
    path = save_hugging_face(folder / "tokenizer.json", end="<|完|>")
    path.with_name("special_tokens_map.json").write_text('{"eos_token": "<|完|>"}', encoding="utf-8")
    return folder


def _json_of_another_name(folder: Path, model: Path) -> Path:
    return save_hugging_face(folder / "mine.json")


def _both(folder: Path, model: Path) -> Path:
    """A model, and beside it a tokenizer.json that has one more end token."""
    _model_folder(folder, model)
    path = save_hugging_face(folder / "tokenizer.json")
    made = tokenizers.Tokenizer.from_file(str(path))
    made.add_special_tokens(["<|im_end|>"])
    made.save(str(path))
    settings = json.dumps({"eos_token": "<|im_end|>"})
    (folder / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    return folder


def _model_of_both(folder: Path, model: Path) -> Path:
    return _both(folder, model) / "tokenizer.model"


def _ranks(folder: Path, model: Path) -> Path:
    describe(small(folder / "mine.tiktoken"))
    return folder / "mine.tiktoken"


def _ranks_folder(folder: Path, model: Path) -> Path:
    return _ranks(folder, model).parent


KINDS = [
    _model,
    _model_folder,
    _json_folder,
    _json_of_another_name,
    _both,
    _model_of_both,
    _ranks,
    _ranks_folder,
]


def facts(tokenizer: Tokenizer) -> tuple[object, ...]:
    """What two tokenizers must have in common to be one."""
    ids = [tokenizer.encode(text) for text in TRICKY]
    return tokenizer.name, tokenizer.sha256, tokenizer.eod_id, tokenizer.bos_id, ids


@pytest.mark.parametrize("make", KINDS)
def test_the_run_folder_holds_the_tokenizer_that_was_loaded(
    tmp_path: Path, tokenizer_path: Path, make: Callable[[Path, Path], Path]
) -> None:
    source = make(tmp_path, tokenizer_path)
    wanted = facts(load_tokenizer(source))
    run = RunFolder(tmp_path / "run")
    # What an earlier start of the run left there is of another kind each time.
    for number, other in enumerate(KINDS):
        folder = tmp_path / f"other-{number}"
        folder.mkdir()
        run.write_start(config_yaml="", tokenizer=other(folder, tokenizer_path))
    run.write_start(config_yaml="", tokenizer=source)
    kept = run.tokenizer_file()
    assert kept is not None and kept == find_tokenizer(run.tokenizer_folder)
    assert facts(load_tokenizer(kept)) == facts(load_tokenizer(run.tokenizer_folder)) == wanted
    # Nothing is left of the others, and nothing that belongs to it is missing.
    beside = source if source.is_dir() else source.parent
    side = {path.name for path in beside.glob("*.j*") if path.is_file()} - {"tokenizer.json", "mine.json"}
    assert {path.name for path in run.tokenizer_folder.iterdir()} == {kept.name, *side}
    # A run that is given its own copy keeps it.
    run.write_start(config_yaml="", tokenizer=run.tokenizer_folder)
    assert facts(load_tokenizer(run.tokenizer_folder)) == wanted
    # Also one that it names itself, beside which lie files of another tokenizer.
    held = {path.name for path in run.tokenizer_folder.iterdir()}
    for name in {"tokenizer.json", "tokenizer.model", "stale.tiktoken"} - held:
        (run.tokenizer_folder / name).write_text("{}", encoding="utf-8")
    run.write_start(config_yaml="", tokenizer=kept)
    assert {path.name for path in run.tokenizer_folder.iterdir()} == held
    assert facts(load_tokenizer(run.tokenizer_folder)) == wanted


def test_a_begin_token_stands_where_the_files_say_so(tmp_path: Path, tokenizer_path: Path) -> None:
    bare = load_tokenizer(_model(tmp_path, tokenizer_path))
    assert begin_token(bare) is begin_token(bare, "never") is None and begin_token(bare, "always") == 1
    side = tmp_path / "tokenizer_config.json"
    for says, wanted in ((True, 1), (False, None)):
        side.write_text(json.dumps({"add_bos_token": says}), encoding="utf-8")
        assert begin_token(load_tokenizer(bare.path)) == wanted
        assert begin_token(load_tokenizer(bare.path), "never") is None
    # A tokenizer.json says it itself; what it says goes before the file beside it, as in transformers.
    settings = {"add_bos_token": True, "bos_token": "<|begin|>"}
    side.write_text(json.dumps(settings), encoding="utf-8")
    path = save_hugging_face(tmp_path / "tokenizer.json")
    assert begin_token(load_tokenizer(path)) == 0
    made = tokenizers.Tokenizer.from_file(str(path))
    for template, wanted in (("$A <|endoftext|>", None), ("<|begin|> $A", 0)):
        special = [("<|begin|>", 0), ("<|endoftext|>", 1)]
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=special
        )
        made.save(str(path))
        side.write_text(json.dumps({**settings, "add_bos_token": wanted is None}), encoding="utf-8")
        assert begin_token(load_tokenizer(path)) == wanted
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    loaded = load_tokenizer(_ranks(ranks, tokenizer_path))
    assert begin_token(loaded) is None
    with pytest.raises(UserError, match="mine.tiktoken has no begin-of-text token: use never"):
        begin_token(loaded, "always")
    describe(ranks / "mine.tiktoken", special_tokens={"<|始|>": 299, "<|完|>": 300}, bos_token="<|始|>")
    (ranks / "tokenizer_config.json").write_text('{"add_bos_token": true}', encoding="utf-8")
    assert begin_token(load_tokenizer(ranks)) == 299


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert find_tokenizer(tmp_path) is None and find_tokenizer(tmp_path / "nowhere") is None
    with pytest.raises(UserError, match="holds neither"):
        copy_tokenizer(tmp_path, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
