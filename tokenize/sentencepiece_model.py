"""Read a SentencePiece model's pieces and rules, and say whether the native encoder honours them."""

import dataclasses
from pathlib import Path
from typing import Any

from orchestrator.errors import DataError
from orchestrator.tokenize.hugging_face import SPACE


@dataclasses.dataclass(frozen=True, kw_only=True)
class BpeModel:
    """The tables of a model that the native encoder honours."""

    pieces: tuple[tuple[str, float], ...]
    """Text and score of each NORMAL piece, by id; an empty text for all others."""
    user_defined: tuple[tuple[str, int], ...]
    """Text and id of the pieces that are taken out of the text before anything merges."""
    bytes: tuple[int, ...]
    """Ids of the 256 byte pieces."""
    add_dummy_prefix: bool
    """Whether a space is put in front of the text."""


class NotHonouredError(DataError):
    """A model with rules that the native encoder does not know."""


def read_bpe_model(file: Path) -> BpeModel:
    """Return a model's tables.

    Raises:
        DataError: the file is no SentencePiece model.
        NotHonouredError: it has rules that are not honoured; the message has all of them.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise DataError(f"tokenizer {file} should be a SentencePiece model (tokenizer.model): {error}") from error
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece
    by_type: dict[int, list[tuple[int, str]]] = {}
    for number, piece in enumerate(model.pieces):
        by_type.setdefault(piece.type, []).append((number, piece.piece))
    byte_ids = {text: number for number, text in by_type.get(kind.BYTE, [])}
    byte_pieces = [byte_ids.get(f"<0x{value:02X}>") for value in range(256)]
    normal = {text for _, text in by_type.get(kind.NORMAL, [])}
    problems = _rules_not_honoured(model)
    if kind.UNUSED in by_type:
        problems.append(f"{len(by_type[kind.UNUSED])} UNUSED pieces, which are split again after merging")
    if None in byte_pieces or not model.trainer_spec.byte_fallback:
        problems.append("no byte fallback")
    if SPACE not in normal:
        problems.append(f"no piece for the space, {SPACE}")
    reserved = [*by_type.get(kind.CONTROL, []), *by_type.get(kind.UNKNOWN, [])]
    problems += [f"the special piece {text!r} of one character" for _, text in reserved if len(text) == 1]
    if problems:
        raise NotHonouredError("; ".join(problems))

    def text_of(text: str) -> str:
        # Text never has a space once each is written as ▁, so a piece that has one is never found.
        return "" if " " in text else text.replace(SPACE, " ")

    return BpeModel(
        pieces=tuple((text_of(p.piece) if p.type == kind.NORMAL else "", p.score) for p in model.pieces),
        user_defined=tuple((text_of(text), id_) for id_, text in by_type.get(kind.USER_DEFINED, []) if text_of(text)),
        bytes=tuple(number for number in byte_pieces if number is not None),
        add_dummy_prefix=model.normalizer_spec.add_dummy_prefix,
    )


def _rules_not_honoured(model: Any) -> list[str]:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    names = trainer.ModelType.Name(trainer.model_type)
    return [
        problem
        for problem, is_found in {
            f"model type {names}, not BPE": names != "BPE",
            f"the normalizer {normalizer.name or 'without a name'}": bool(normalizer.precompiled_charsmap),
            "spaces removed (remove_extra_whitespaces)": normalizer.remove_extra_whitespaces,
            "spaces left as they are (no escape_whitespaces)": not normalizer.escape_whitespaces,
            "the space behind a word (treat_whitespace_as_suffix)": trainer.treat_whitespace_as_suffix,
        }.items()
        if is_found
    ]
