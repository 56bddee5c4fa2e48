"""Adds the pieces of a second sentencepiece model to a first, as Chinese-LLaMA did (Cui et al. 2023, arXiv:2304.08177).

Every old id keeps its piece, type and score. New pieces get scores below all old ones, in the order of the second
model. In a BPE model the pair of the highest score merges first, so all old merges happen before any new one: the new
tokens of a text are the old ones, joined. (With the scores of the second model, or 0, new pieces tear old words apart.)
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from megallama.corpus.script import NO_LETTERS, count_scripts
from megallama.host.errors import UserError
from megallama.tokenizers.interface import SPACE_MARK
from megallama.tokenizers.load import SentencePieceTokenizer, Tokenizer, load_tokenizer
from megallama.tokenizers.training import check_model_output, write_model

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
_FLOAT_BITS = 24
_LARGEST_FLOAT = (2.0 - 2.0**-23) * 2.0**127
"""Of the numbers in which scores are stored."""
_MODEL_TYPES = {
    sentencepiece_model_pb2.TrainerSpec.BPE: "bpe",
    sentencepiece_model_pb2.TrainerSpec.UNIGRAM: "unigram",
}


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    path: Path
    """The merged model."""
    old_size: int
    """Ids of the first model; they are the ids 0 .. old_size - 1 of the merged one."""
    new_size: int
    """Ids of the merged model."""
    skipped: dict[str, int]
    """Pieces of the second model that were left out, by reason."""
    unreachable: int
    """Added pieces that their own text does not encode to: old merges go another way."""


def merge_tokenizers(
    first: str | Path,
    second: str | Path,
    output: str | Path,
    *,
    max_pieces: int | None = None,
    scripts: Sequence[str] = (),
    overwrite: bool = False,
) -> MergeReport:
    """Writes `<output>/tokenizer.model`: all of `first`, then the pieces of `second` that it lacks.

    Args:
        first: A sentencepiece model; its normalization and special tokens stay.
        second: Another of the same type (BPE or Unigram). Its control, unknown and byte pieces are left out.
        output: Folder of the result.
        max_pieces: At most so many pieces are added, the best ones.
        scripts: Only pieces whose letters are all of these scripts (`han`, `latin`, ...); empty: all.
        overwrite: Replace the tokenizer of that folder.

    Raises:
        UserError: a file that is no sentencepiece model, models of different types, nothing to add, an output
            that cannot be written or has a tokenizer already.
    """
    base, other = (_load(path, role) for path, role in ((first, "first"), (second, "second")))
    _check_pair(base, other)
    if max_pieces is not None and max_pieces < 1:
        raise UserError(f"max_pieces ({max_pieces}) must be at least 1: leave it out to add all pieces")
    folder = Path(output)
    check_model_output(folder, overwrite=overwrite)
    chosen, skipped = _choose(base, other, scripts=frozenset(scripts))
    if max_pieces is not None and len(chosen) > max_pieces:
        skipped["beyond max_pieces"] = len(chosen) - max_pieces
        chosen = _best(chosen, known={piece.piece for piece in base.proto.pieces}, count=max_pieces)
    if not chosen:
        raise UserError(
            f"{second} adds nothing to {first} ({other.vocab_size} pieces, all left out: {_listed(skipped)}):"
            " train the second on other text"
        )
    merged = sentencepiece_model_pb2.ModelProto()
    merged.CopyFrom(base.proto)
    scores = _new_scores(base.proto, chosen)
    for piece, score in zip(chosen, scores, strict=True):
        merged.pieces.add(piece=piece.piece, score=score, type=piece.type)
    merged.trainer_spec.vocab_size = len(merged.pieces)
    path = write_model(folder, merged.SerializeToString())
    loaded = load_tokenizer(path)
    return MergeReport(
        path=path,
        old_size=base.vocab_size,
        new_size=loaded.vocab_size,
        skipped=dict(skipped),
        unreachable=_count_unreachable(loaded, range(base.vocab_size, loaded.vocab_size)),
    )


def _load(path: str | Path, role: str) -> SentencePieceTokenizer:
    loaded = load_tokenizer(path)
    if not isinstance(loaded, SentencePieceTokenizer):
        raise UserError(
            f"{role} tokenizer {path} is no sentencepiece model ({loaded.name}): give a .model file; of an imported"
            " model it lies in the folder that was imported, beside its tokenizer.json, if it has one"
        )
    return loaded


def _check_pair(first: SentencePieceTokenizer, second: SentencePieceTokenizer) -> None:
    types = [_MODEL_TYPES.get(model.proto.trainer_spec.model_type) for model in (first, second)]
    if types[0] is None or types[0] != types[1]:
        raise UserError(
            f"the models are of different types ({types[0]} and {types[1]}; BPE or Unigram, both the same):"
            f" train the second with --model-type {types[0] or 'bpe'}"
        )
    suffix = [model.proto.trainer_spec.treat_whitespace_as_suffix for model in (first, second)]
    if suffix[0] != suffix[1]:
        raise UserError(
            "one model puts the space mark before words, the other after them"
            f" (treat_whitespace_as_suffix {suffix[0]} and {suffix[1]}): train the second like the first"
        )


def _choose(
    first: SentencePieceTokenizer, second: SentencePieceTokenizer, *, scripts: frozenset[str]
) -> tuple[list[Any], Counter[str]]:
    """Pieces of `second` to add, the best first, and how many were left out for which reason."""
    known = {piece.piece for piece in first.proto.pieces}
    chosen: list[Any] = []
    skipped: Counter[str] = Counter()
    for piece in second.proto.pieces:
        reason = _reason_to_skip(piece, known, first, scripts)
        if reason:
            skipped[reason] += 1
        else:
            chosen.append(piece)
            known.add(piece.piece)
    # User-defined pieces have no score of their own: first. Equal scores keep their order, the sort is stable.
    chosen.sort(key=lambda piece: (piece.type != _Piece.USER_DEFINED, -piece.score))
    return chosen, skipped


def _best(chosen: Sequence[Any], *, known: set[str], count: int) -> list[Any]:
    """The first `count` of `chosen`, with the characters that they consist of, which have the lowest scores.

    sentencepiece joins characters that are no pieces, too, but no other program does: a `tokenizer.json` needs them.
    """
    singles = {piece.piece: place for place, piece in enumerate(chosen) if len(piece.piece) == 1}
    places: set[int] = set()
    for place, piece in enumerate(chosen):
        letters = () if piece.type == _Piece.USER_DEFINED else set(piece.piece) - known
        wanted = {place, *(singles[letter] for letter in letters if letter in singles)} - places
        if len(places) + len(wanted) <= count:
            places |= wanted
        if len(places) == count:
            break
    return [chosen[place] for place in sorted(places)]


def _reason_to_skip(
    piece: Any, known: set[str], first: SentencePieceTokenizer, scripts: frozenset[str]
) -> str:
    if piece.type in (_Piece.CONTROL, _Piece.UNKNOWN, _Piece.BYTE, _Piece.UNUSED):
        return "special, byte or unused"
    if piece.piece in known:
        return "in the first already"
    # A piece that the first model's normalization changes can never be met.
    if first.normalized(piece.piece) != piece.piece:
        return "changed by the first's normalization"
    if scripts:
        found = set(count_scripts(piece.piece.replace(SPACE_MARK, ""))) - {NO_LETTERS}
        if not found or not found <= scripts:
            return "of another script"
    return ""


def _new_scores(first: Any, chosen: Sequence[Any]) -> list[float]:
    """A score below all of `first` for each chosen piece, each lower than the one before as the file stores it.

    A file has float32, whose steps are 64 near the -1e9 that LLaMA and Mistral give their runs of spaces. BPE scores
    only rank merges: whole steps where that is enough. Unigram scores are log-probabilities: the differences stay, so
    that the commonest new piece lies 1 below the rarest old one.

    Raises:
        UserError: there are not so many numbers below the scores of `first`.
    """
    before = min(piece.score for piece in first.pieces if piece.type == _Piece.NORMAL)
    is_bpe = first.trainer_spec.model_type == sentencepiece_model_pb2.TrainerSpec.BPE
    best = max((piece.score for piece in chosen if piece.type == _Piece.NORMAL), default=0.0)
    highest = before - 1
    scores = []
    for piece in chosen:
        if not is_bpe and piece.type != _Piece.NORMAL:
            scores.append(piece.score)
            continue
        least_step = 2.0 ** (math.frexp(before)[1] - _FLOAT_BITS)
        before -= max(1.0, least_step) if is_bpe else max(before - highest - piece.score + best, least_step)
        if before < -_LARGEST_FLOAT:
            raise UserError(
                "the first model has a piece with the lowest score that there is, below which no new piece can stand:"
                " raise that score"
            )
        (before,) = struct.unpack("<f", struct.pack("<f", before))
        scores.append(before)
    return scores


def _count_unreachable(tokenizer: Tokenizer, ids: range) -> int:
    return sum(tokenizer.split(tokenizer.surface(number)) != [number] for number in ids)


def _listed(skipped: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in skipped.items())
