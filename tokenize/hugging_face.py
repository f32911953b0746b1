"""A SentencePiece BPE model as a tokenizer.json that gives the same ids.

Transformers 5.23 reads a lone tokenizer.model with its merges in the order of ids instead of scores:
`a  b` then gives other ids than the model was trained on, without a word. So an export carries a
tokenizer.json made here: merges in the order of the scores, byte fallback, spaces as `▁` with one put
in front. Checked against sentencepiece in tests/test_conversion.py.
"""

import json
from pathlib import Path
from typing import Any

SPACE = "▁"
"""What SentencePiece writes for a space."""


def tokenizer_files(model_file: Path) -> dict[str, str]:
    """Return tokenizer.json and tokenizer_config.json of a SentencePiece BPE model, by file name."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    pieces = [model.id_to_piece(number) for number in range(model.vocab_size())]
    special = {number for number in range(len(pieces)) if model.is_control(number) or model.is_unknown(number)}
    known = {piece: number for number, piece in enumerate(pieces)}
    joins = []
    for number, piece in enumerate(pieces):
        if number in special or model.is_byte(number) or len(piece) < 2:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in known and right in known:
                joins.append((-model.get_score(number), number, known[left], known[right]))
    joins.sort()
    names = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
    tokens = {name: pieces[number] for name, number in names.items() if number >= 0}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokens}
    return {
        "tokenizer.json": json.dumps(_document(pieces, special, joins, tokens, model.bos_id()), ensure_ascii=False)
        + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }


def _document(
    pieces: list[str], special: set[int], joins: list[tuple[float, int, int, int]], tokens: dict[str, str], bos: int
) -> dict[str, Any]:
    """Return tokenizer.json's content, in the format of the library tokenizers 0.23."""
    begin = [{"SpecialToken": {"id": pieces[bos], "type_id": 0}}] if bos >= 0 else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": pieces[number],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number in sorted(special)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*begin, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [*begin, {"Sequence": {"id": "A", "type_id": 0}}, *begin, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": (
                {pieces[bos]: {"id": pieces[bos], "ids": [bos], "tokens": [pieces[bos]]}} if begin else {}
            ),
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokens.get("unk_token"),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: number for number, piece in enumerate(pieces)},
            "merges": [[pieces[left], pieces[right]] for _, _, left, right in joins],
        },
    }
