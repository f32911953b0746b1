"""Token ids back to text, for people to look at: what is special is marked, what would harm a terminal escaped."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from orchestrator.errors import DataError
from orchestrator.tokenize.sentencepiece_engine import open_model
from orchestrator.tokenize.tokenizers_engine import open_tokenizer


class Decoder:
    """Decodes ids with a tokenizer's own file.

    Args:
        decode: returns the text of ids that are none of the special ones.
        special: their names by id, such as `</s>`.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], special: dict[int, str], vocab_size: int) -> None:
        self._decode = decode
        self._special = special
        self._vocab_size = vocab_size

    def text(self, ids: Iterable[int]) -> str:
        """Return the text of ids; a special one as ⟨</s>⟩, one beyond the vocabulary as ⟨id 40000⟩.

        A piece of a document may begin or end inside a character, which shows as U+FFFD.
        """
        parts = []
        for name, run in itertools.groupby((int(number) for number in ids), self._mark):
            numbers = list(run)
            parts.append(self._decode(numbers) if name is None else name * len(numbers))
        return "".join(parts)

    def _mark(self, number: int) -> str | None:
        if number in self._special:
            return f"⟨{self._special[number]}⟩"
        return None if 0 <= number < self._vocab_size else f"⟨id {number}⟩"


def load_decoder(file: Path) -> Decoder:
    """Return the decoder of a data set's tokenizer: a SentencePiece model, or a tokenizer.json.

    Raises:
        DataError: the file is none, or the library for it is not installed.
    """
    try:
        return _hugging_face(file) if file.suffix == ".json" else _sentencepiece(file)
    except ImportError as error:
        raise DataError(
            f"decoding with {file} needs the package {error.name}, which is not installed; pip install {error.name}"
        ) from error


def _sentencepiece(file: Path) -> Decoder:
    processor = open_model(file)
    size = int(processor.get_piece_size())
    control = {number: str(processor.id_to_piece(number)) for number in range(size) if processor.is_control(number)}

    def decode(ids: Sequence[int]) -> str:
        return str(processor.decode(list(ids)))

    return Decoder(decode, control, size)


def _hugging_face(file: Path) -> Decoder:
    tokenizer = open_tokenizer(file)
    added = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False))

    return Decoder(decode, added, int(tokenizer.get_vocab_size(with_added_tokens=True)))


def printable(text: str, *, lines: bool = False) -> str:
    """Return text that no terminal obeys: control characters and invisible ones as \\x1b or \\u202e.

    Args:
        lines: whether line ends and tabs stay as they are.
    """
    kept = "\n\t" if lines else ""
    return "".join(
        character
        if character.isprintable() or character in kept
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
