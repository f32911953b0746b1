"""The native encoder against sentencepiece, and its reader of JSON against Python's."""

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import sentencepiece

from orchestrator.errors import DataError
from orchestrator.tokenize.engine import EngineError
from orchestrator.tokenize.engines import load_engine
from orchestrator.tokenize.native_engine import NativeEngine
from orchestrator.tokenize.sentencepiece_engine import SentencePieceEngine
from orchestrator.tokenize.sentencepiece_model import NotHonouredError, read_bpe_model
from tests.encoder_fuzz import VOCABULARIES, compare, strings

HARD = [
    "",
    " ",
    "  ",
    "a",
    " a",
    "a ",
    "a  b   c    d",
    "▁",
    "▁▁a ▁b",
    "\ufeff",
    "\ufeffa",
    "\x00",
    "a\x00b\x00",
    "\t\n\r\x0b\x0c",
    "line\r\nline\rline\n\n\n",
    "</s>",
    "<s>text</s><unk><pad>",
    "<0x0A><0x41>",
    "[INST] a [/INST][IMG][IMG_BREAK][IMG_END][PREFIX]",
    "[[INST]][IMG[IMG]]",
    "e\u0301 é ﬁ Å Å ǆ",
    "👩‍👩‍👧‍👦 🏳️‍🌈 \U0001f468\u200d\U0001f680",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff \ufffd \uffff",
    "한국어 문장입니다. 日本語の文。 中文句子。 ไทย العربية עברית हिन्दी ελληνικά русский",
    "\u202eright to left\u202c",
    "0123456789 1e10 0x41 3.14159",
    "def main() -> None:\n    return None\n\tindented\n" + " " * 100 + "x" + "\t" * 50,
    "a" * 10_000,
    "ab" * 5_000,
    " " * 10_000,
    "\n" * 10_000,
    "=" * 999 + "-" * 998,
    "가" * 3_000,
    "\U0001f600" * 1_000,
    "http://example.org/" + "a/b-c_d.e?" * 200,
]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_hard_strings_have_sentencepieces_ids(vocabulary: str) -> None:
    texts = HARD + [f"{one}{other}" for one in HARD[:27] for other in HARD[:27]]
    assert compare(VOCABULARIES[vocabulary], texts) == len(texts)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_random_strings_have_sentencepieces_ids(vocabulary: str) -> None:
    model = VOCABULARIES[vocabulary]
    assert sum(compare(model, batch) for batch in strings(model, 200_000, seed=20)) == 200_000


@pytest.mark.parametrize(
    ("add_dummy_prefix", "user_defined", "large"),
    [
        (True, [], False),
        (False, [], False),
        (True, ["<a>", "<a><b>", "b", "  ", "▁the", "한"], False),
        (False, ["\n"], True),
    ],
)
def test_the_rules_of_other_models_are_read_from_them(
    tmp_path: Path, add_dummy_prefix: bool, user_defined: list[str], large: bool
) -> None:
    """Trained here: other vocabularies, no space in front, USER_DEFINED pieces within each other, int32 ids."""
    text = tmp_path / "text.txt"
    sources = sorted(Path(dataclasses.__file__).parent.glob("*.py"))[:60]
    text.write_text("\n".join(path.read_text(encoding="utf-8") for path in sources) + "한국어 문장 the the\n" * 50)
    model = train(tmp_path, text, vocab_size=1500, add_dummy_prefix=add_dummy_prefix, user_defined_symbols=user_defined)
    if large:
        model = with_more_pieces(model, 70_000)
    rules = read_bpe_model(model)
    assert rules.add_dummy_prefix is add_dummy_prefix
    # Text has no space once each is a ▁, so a piece with one is never found.
    assert len(rules.user_defined) == sum(" " not in symbol for symbol in user_defined)
    engines: dict[Path, Any] = {}
    assert compare(model, [*HARD, "<a><b>the<a>b<a><bb  b", "한the\n \nthe"], engines)
    for batch in strings(model, 60_000, seed=5):
        compare(model, batch, engines)


def train(folder: Path, text: Path, **settings: Any) -> Path:
    settings = {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "minloglevel": 2,
        **settings,
    }
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=str(folder / "trained"), **settings)
    return folder / "trained.model"


def with_more_pieces(model: Path, count: int) -> Path:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.read_bytes())
    for number in range(len(proto.pieces), count):
        proto.pieces.add(piece=f"nowhere{number}", score=-1e6, type=1)
    model.write_bytes(proto.SerializeToString())
    return model


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "unigram"}, "model type UNIGRAM, not BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "the normalizer nmt_nfkc"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
        ({"byte_fallback": False}, "no byte fallback"),
    ],
)
def test_a_model_with_other_rules_is_refused_by_name_and_served_by_sentencepiece(
    tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(dataclasses.__file__).read_text())
    model = train(tmp_path, text, vocab_size=500, **settings)
    with pytest.raises(NotHonouredError, match=reason):
        NativeEngine(model)
    with pytest.raises(DataError, match=f"(?s)native encoder does not serve.*{reason}.*--engine sentencepiece"):
        load_engine(model, "native")
    notices: list[str] = []
    engine, file = load_engine(model, notice=notices.append)
    assert engine.name.startswith("sentencepiece")
    assert file == model
    assert len(notices) == 1
    assert reason in notices[0]


def test_unused_pieces_are_not_honoured(tmp_path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(VOCABULARIES["v1"].read_bytes())
    proto.pieces[5000].type = 5
    (tmp_path / "unused.model").write_bytes(proto.SerializeToString())
    with pytest.raises(NotHonouredError, match="1 UNUSED pieces"):
        NativeEngine(tmp_path / "unused.model")


def test_long_runs_are_encoded_in_the_end() -> None:
    """By the square of their length the first alone would take an hour; benchmarks/tokenize.py has the times."""
    draw = random.Random(4)
    base64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    runs = [
        "a" * 1_000_000,
        " " * 1_000_000,
        "".join(draw.choices(base64, k=2_000_000)),
        "".join(map(chr, draw.choices(range(0xAC00, 0xD7A4), k=400_000))),
    ]
    assert compare(VOCABULARIES["v1"], runs) == len(runs)


# --- JSON


def blocks(vocabulary: str = "v1") -> tuple[NativeEngine, SentencePieceEngine]:
    return NativeEngine(VOCABULARIES[vocabulary]), SentencePieceEngine(VOCABULARIES[vocabulary])


def assert_same_block(one: Any, other: Any) -> None:
    assert bytes(one.ids) == bytes(other.ids)
    for name in ("lengths", "text_bytes", "checksums"):
        assert numpy.array_equal(getattr(one, name), getattr(other, name)), name
    assert (one.records, one.empty) == (other.records, other.empty)
    assert one.bad == other.bad


PLAIN = [
    {"text": 'a "quoted" \\ back/slash \b\f\n\r\t', "n": [1, -2.5e-3, 0, 10, True, False, None, {"a": {}}, []]},
    {"id": 7, "text": "한국어 😀 </s>", "meta": {"text": "inner", "url": "http://example.org/?q=a&b"}},
    {"text": ""},
    {"text": "\x00\x7f ▁ \u2028 \ufeff"},
    {"Text": "no", "texts": "no", "tex": "no"},
    {"text": 3},
    {"text": None},
    {"a": "\ud83d\ude00", "text": "last"},
    ["text", "text"],
]


def test_json_lines_are_read_as_python_reads_them_whatever_is_done_to_them() -> None:
    """Each block holds lines with bytes changed, removed, repeated and exchanged at random places."""
    native, reference = blocks()
    draw = random.Random(11)
    whole = [
        json.dumps(record, ensure_ascii=flag, indent=None).encode("utf-8", "surrogatepass")
        for record in PLAIN
        for flag in (True, False)
    ]
    whole += [
        b'{"text": "\\ud800"}',
        b'{"text": "\\udc00\\ud800"}',
        b'{"text": "\\ud83d\\ude00 \\u00e9 \\u0000 \\/"}',
        b'{"text": "a", "text": "b"}',
        b'{"t\\u0065xt": "escaped key"}',
        b'{"text": "a", "x": {"k": 1, "k": 2}}',
        b'  {"text" : "spaces" , "x" : [ 1 , 2 ] }  \r',
        b'{"text": "a", "n": 01}',
        b'{"text": "a", "n": 1.}',
        b'{"text": "a", "n": .5}',
        b'{"text": "a", "n": -}',
        b'{"text": "a", "n": NaN}',
        b'{"text": "a", "n": -Infinity}',
        b'{"text": "a", "n": 1e999}',
        b'{"text": "a",}',
        b'{"text": "a"} x',
        b'{"text": "a", "x": ' + b"[" * 40 + b"]" * 40 + b"}",
        b'{"text": "a", ' + b", ".join(b'"k%d": 1' % k for k in range(50)) + b"}",
        b'{"text": "a", "n": ' + b"9" * 5000 + b"}",
        b'{"text": "a\tb"}',
        b'{"text": "\xff"}',
        b'{"text": "\xed\xa0\x80"}',
        b'{"text": "\xc0\x80"}',
        b"\x0b \x0c",
        b"\xef\xbb\xbf{}",
    ]
    alphabet = [bytes([byte]) for byte in b'"\\{}[],:0-.eu \t\r\x00\xfft'] + [b"\\u", "▁".encode(), b"null"]
    accepted = refused = 0
    for _ in range(60):
        lines = []
        for _ in range(500):
            line = draw.choice(whole)
            for _ in range(draw.choice([0, 0, 1, 1, 2, 5])):
                at, to = sorted(draw.choices(range(len(line) + 1), k=2))
                middle = draw.choice([b"", draw.choice(alphabet), line[at:to] * 2, line[at : at + 1]])
                line = line[:at] + middle + line[draw.choice([at, min(at + 1, len(line)), to]) :]
            lines.append(line.replace(b"\n", b""))
        block = b"\n".join(lines) + draw.choice([b"", b"\n"])
        found, expected = native.encode_lines(block, "text"), reference.encode_lines(block, "text")
        assert_same_block(found, expected)
        accepted += len(found.lengths)
        refused += len(found.bad)
    assert accepted > 4000
    assert refused > 5000


def test_texts_that_are_no_utf8_are_refused_with_the_references_reason() -> None:
    native, reference = blocks()
    texts = [b"good", b"caf\xe9", b"", b"\xf4\x90\x80\x80", b"\xed\xbf\xbf", "좋다".encode(), b"\xe2\x96"]
    found = native.encode_texts(texts)
    assert_same_block(found, reference.encode_texts(texts))
    assert [record.offset for record in found.bad] == [1, 3, 4, 6]


def test_a_word_has_the_same_ids_first_and_again_and_after_many_others() -> None:
    engine = NativeEngine(VOCABULARIES["v1"])
    texts = [text.encode() for text in HARD if text]
    first = bytes(engine.encode_texts(texts).ids)
    for batch in strings(VOCABULARIES["v1"], 100_000, seed=9):
        engine.encode_texts([text.encode() for text in batch])
    assert bytes(engine.encode_texts(texts).ids) == first


def test_a_document_with_other_ids_than_sentencepieces_stops_the_run_and_is_kept(tmp_path: Path) -> None:
    """The reference is of another vocabulary, as a wrong encoder would look."""
    engine = NativeEngine(VOCABULARIES["v1"])
    engine._reference = SentencePieceEngine(VOCABULARIES["v3"])
    with pytest.raises(EngineError, match="other ids than sentencepiece") as caught:
        engine.encode_lines(b'{"text": "a document"}\n', "text")
    assert caught.value.document == b"a document"


def test_where_no_compiler_made_the_encoder_sentencepiece_serves_with_a_notice(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['orchestrator.tokenize.native_encoder'] = None\n"
        "from pathlib import Path; from orchestrator.tokenize.engines import load_engine\n"
        f"engine, _ = load_engine(Path({str(VOCABULARIES['v1'])!r}), notice=print); print(engine.name)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    notice, name = done.stdout.splitlines()
    assert "the compiled encoder is not installed" in notice
    assert name.startswith("sentencepiece")
