"""A corpus of about 230 MB of real text in nine scripts and code, from documentation packages of Debian.

    python -m tests.text_corpus [--folder FOLDER]

`apt-get download` as any user fetches 155 MB; nothing is installed. Building takes 110 CPU-seconds, once: the corpus
stays in the user's cache folder. The packages are a fixed list, a document is a file of them, split at blank lines
where it is larger than 50 kB, exact duplicates are dropped, and the order is that of the documents' SHA-256: the same
packages give the same bytes. Web pages lose their tags but where HTML itself is the kind, manual pages keep their
roff. Lines are {"text", "source", "lang"}, characters as themselves.
"""

import argparse
import dataclasses
import gzip
import hashlib
import html.parser
import json
import multiprocessing
import os
import re
import shutil
import struct
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

LARGEST_DOCUMENT_BYTES = 50_000
SMALLEST_DOCUMENT_BYTES = 200

HELP = "usr/share/libreoffice/help/*/text/**/*.html"
MANUAL = "usr/share/man/**/*.gz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Files of one package, all of one kind.

    Attributes:
        lang: a natural or a programming language.
        most_megabytes: of the documents in the order of the corpus, those up to here are taken.
    """

    package: str
    lang: str
    files: str
    most_megabytes: float = 1000.0


def _sources() -> tuple[Source, ...]:
    language = {
        "ko": "Korean", "ja": "Japanese", "zh-cn": "Chinese", "zh-tw": "Chinese", "de": "German", "fr": "French",
        "ru": "Russian", "el": "Greek", "hi": "Hindi", "en-us": "English", "ar": "Arabic", "he": "Hebrew",
        "th": "Thai",
    }  # fmt: skip
    pages = {
        "C": "English", "ko": "Korean", "ja": "Japanese", "zh_CN": "Chinese", "de": "German", "fr": "French",
        "ru": "Russian", "el": "Greek", "hi": "Hindi", "fa": "Persian", "he": "Hebrew", "ta": "Tamil", "te": "Telugu",
        "gu": "Gujarati", "mr": "Marathi", "pa": "Punjabi", "kn": "Kannada", "as": "Assamese",
    }  # fmt: skip
    installed = ("ko", "ja", "zh_CN", "de", "fr", "ru", "el", "en")
    manuals = {"de": "German", "fr": "French", "ru": "Russian", "ja": "Japanese", "zh": "Chinese"}
    with_developers = ("de", "fr", "ru", "ja")
    return (
        *(
            Source(package=f"libreoffice-help-{code}", lang=language[code], files=HELP)
            for code in ("ko", "ja", "zh-cn", "zh-tw", "de", "fr", "ru", "el", "hi", "en-us")
        ),
        *(
            Source(package=f"libreoffice-l10n-{code}", lang=language[code], files="usr/lib/libreoffice/**/*.mo")
            for code in ("ko", "ar", "he", "th", "hi", "ru")
        ),
        *(
            Source(package="gnome-user-docs", lang=lang, files=f"usr/share/help/{code}/**/*.page")
            for code, lang in pages.items()
        ),
        *(
            Source(
                package="installation-guide-amd64",
                lang="English" if code == "en" else pages[code],
                files=f"usr/share/doc/installation-guide-amd64/{code}/*.html",
            )
            for code in installed
        ),
        *(Source(package=f"manpages-{code}", lang=lang, files=MANUAL) for code, lang in manuals.items()),
        *(Source(package=f"manpages-{code}-dev", lang=manuals[code], files=MANUAL) for code in with_developers),
        Source(package="manpages", lang="English", files=MANUAL),
        Source(package="manpages-dev", lang="English", files=MANUAL),
        Source(package="perl-doc", lang="English", files="usr/share/perl/*/pod/*.pod", most_megabytes=7),
        Source(package="wordnet-base", lang="English", files="usr/share/wordnet/data.*", most_megabytes=6),
        Source(package="git-doc", lang="English", files="usr/share/doc/git-doc/**/*.txt"),
        Source(package="libhangul-data", lang="Korean", files="usr/share/libhangul/hanja/*.txt"),
        Source(package="hunspell-ko", lang="Korean", files="usr/share/hunspell/ko.dic"),
        Source(package="fortunes-ru", lang="Russian", files="usr/share/games/fortunes/ru/*"),
        Source(package="glibc-source", lang="C", files="usr/src/glibc/glibc-*.tar.xz", most_megabytes=25),
        Source(package="python3-sympy", lang="Python", files="usr/lib/python3/**/*.py", most_megabytes=12),
        Source(package="python3-django", lang="Python", files="usr/lib/python3/**/*.py"),
        Source(
            package="node-typescript",
            lang="JavaScript",
            files="usr/share/nodejs/typescript/lib/typescript.js",
            most_megabytes=8,
        ),
        Source(package="iso-codes", lang="JSON", files="usr/share/iso-codes/json/*.json"),
        Source(package="sqlite3-doc", lang="HTML", files="usr/share/doc/sqlite3/**/*.html", most_megabytes=8),
    )


SOURCES = _sources()
SMALL = (
    "gnome-user-docs", "manpages", "manpages-fr", "manpages-ru", "libreoffice-l10n-ko", "libreoffice-l10n-hi",
    "libhangul-data", "hunspell-ko", "git-doc", "python3-django", "iso-codes", "sqlite3-doc",
)  # fmt: skip
"""Packages of a part that is built in seconds, with text of every script."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One line of the corpus; the key is the SHA-256 of its text."""

    key: bytes
    text_bytes: int
    lang: str
    line: bytes


def corpus(folder: Path | None = None, megabytes: float | None = None, *, small: bool = False) -> Path:
    """Return the corpus as a file of JSON lines; it is built where the folder does not hold it yet.

    Args:
        folder: keeps the corpus for the next time; the user's cache folder by default.
        small: build it of the packages of `SMALL` alone.
        megabytes: return a file of only the first documents, up to that much text.

    Raises:
        RuntimeError: this is no Debian system, or a package cannot be downloaded.
    """
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    home = (folder or _cache_folder()) / recipe
    whole = home / ("small.jsonl" if small else "text.jsonl")
    if not whole.exists():
        home.mkdir(parents=True, exist_ok=True)
        sources = [source for source in SOURCES if not small or source.package in SMALL]
        with tempfile.TemporaryDirectory(prefix="building-", dir=home) as building:
            _build(Path(building), sources).replace(whole)
    if megabytes is None:
        return whole
    part = home / f"{whole.stem}-{megabytes:g}.jsonl"
    if not part.exists():
        with tempfile.TemporaryDirectory(prefix="building-", dir=home) as building:
            file = Path(building) / part.name
            file.write_bytes(b"".join(first_lines(whole, megabytes)))
            file.replace(part)
    return part


def languages(file: Path) -> Counter[str]:
    """Return the bytes of text in each language of the corpus."""
    sizes: Counter[str] = Counter()
    with file.open("rb") as lines:
        for line in lines:
            record = json.loads(line)
            sizes[record["lang"]] += len(record["text"].encode())
    return sizes


def first_lines(file: Path, megabytes: float) -> Iterator[bytes]:
    """Yield the lines at the beginning of a corpus that have up to so much text."""
    size = 0
    with file.open("rb") as lines:
        for line in lines:
            size += len(json.loads(line)["text"].encode())
            if size > megabytes * 1e6:
                return
            yield line


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orchestrate" / "corpus"


# --- From packages to documents


def _build(folder: Path, sources: Sequence[Source]) -> Path:
    packages = _download(folder, sorted({source.package for source in sources}))
    unpacked = {name: folder / name for name in packages}
    for name, archive in packages.items():
        subprocess.run(["dpkg-deb", "--extract", archive, unpacked[name]], check=True)
    documents: dict[bytes, Document] = {}
    # Spawned, since a caller may hold threads that a fork would lose.
    with multiprocessing.get_context("spawn").Pool(min(8, os.cpu_count() or 1)) as pool:
        for found in pool.starmap(_documents, [(source, unpacked[source.package]) for source in sources], chunksize=1):
            for document in found:
                documents.setdefault(document.key, document)
    whole = folder / "text.jsonl"
    with whole.open("wb") as file:
        file.writelines(documents[key].line for key in sorted(documents))
    return whole


def _download(folder: Path, packages: list[str]) -> dict[str, Path]:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise RuntimeError(
            "the corpus is built from packages of Debian, and this system has no apt-get and dpkg-deb; "
            "build it on a Debian system and copy the file, or give another file of JSON lines"
        )
    command = ["apt-get", "download", "--quiet", *packages]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(
            f"the corpus needs packages of Debian that apt-get could not download; bring its lists up to date by "
            f"`apt-get update`, or look at the network. It says:\n{done.stderr.strip()}"
        )
    return {package: next(folder.glob(f"{package}_*.deb")) for package in packages}


def _documents(source: Source, folder: Path) -> list[Document]:
    """Return the documents of a source in the order of their keys.

    Raises:
        RuntimeError: there are none; the distribution has moved the files.
    """
    found = {}
    for name, text in _files(source, folder):
        for number, part in enumerate(_parts(text)):
            content = part.encode()
            if len(content) >= SMALLEST_DOCUMENT_BYTES:
                key = hashlib.sha256(content).digest()
                record = {"text": part, "source": f"{source.package}/{name}#{number}", "lang": source.lang}
                line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
                found[key] = Document(key=key, text_bytes=len(content), lang=source.lang, line=line)
    if not found:
        raise RuntimeError(f"package {source.package} has no text in {source.files}; mend the list in {__file__}")
    taken, size = [], 0
    for key in sorted(found):
        size += found[key].text_bytes
        if size > source.most_megabytes * 1e6:
            break
        taken.append(found[key])
    return taken


def _files(source: Source, folder: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(folder.glob(source.files)):
        if not file.is_file() or file.is_symlink():
            continue
        name = str(file.relative_to(folder))
        if file.suffix == ".xz":
            yield from _program_text(file)
            continue
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        if file.suffix == ".mo":
            yield name, "\n".join(_translations(content))
        elif file.suffix == ".page" or (file.suffix == ".html" and source.lang != "HTML"):
            yield name, _without_tags(content.decode(errors="replace"))
        else:
            yield name, content.decode(errors="replace")


def _program_text(archive: Path) -> Iterator[tuple[str, str]]:
    with tarfile.open(archive) as members:
        for member in members:
            content = members.extractfile(member) if member.name.endswith((".c", ".h")) else None
            if content is not None:
                yield member.name, content.read().decode(errors="replace")


def _parts(text: str) -> Iterator[str]:
    """Yield a text in parts of at most 50 kB, cut at blank lines, else at lines; a longer line stays whole."""
    if len(text.encode()) <= LARGEST_DOCUMENT_BYTES:
        yield text
        return
    part: list[str] = []
    size = 0
    for paragraph in re.split(r"(?<=\n\n)", text):
        for piece in [paragraph] if len(paragraph) < LARGEST_DOCUMENT_BYTES // 4 else paragraph.splitlines(True):
            length = len(piece.encode())
            if part and size + length > LARGEST_DOCUMENT_BYTES:
                yield "".join(part)
                part, size = [], 0
            part.append(piece)
            size += length
    yield "".join(part)


class _Text(html.parser.HTMLParser):
    LEFT_OUT = frozenset(("script", "style", "header", "aside", "nav"))
    LINES = frozenset(("p", "div", "br", "li", "h1", "h2", "h3", "h4", "tr", "pre", "dt", "dd", "title", "item", "td"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.left_out = 0

    def handle_starttag(self, tag: str, _attributes: object) -> None:
        if tag in self.LEFT_OUT:
            self.left_out += 1
        elif tag in self.LINES:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.LEFT_OUT:
            self.left_out -= 1
        elif tag in self.LINES:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.left_out:
            self.parts.append(data)


def _without_tags(page: str) -> str:
    parser = _Text()
    parser.feed(page)
    parser.close()
    return re.sub(r"\n\s*\n", "\n\n", "".join(parser.parts)).strip()


def _translations(catalogue: bytes) -> Iterator[str]:
    """Yield the translations of a gettext .mo file but its header; both numbers of a plural."""
    magic, _, count, _, table = struct.unpack_from("<5I", catalogue)
    assert magic == 0x950412DE
    for number in range(1, count):
        length, start = struct.unpack_from("<2I", catalogue, table + 8 * number)
        yield catalogue[start : start + length].decode(errors="replace").replace("\x00", "\n")


def main() -> None:
    """Build the corpus and print how much text it has of each language."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    file = corpus(parser.parse_args().folder)
    sizes = languages(file)
    for lang, size in sizes.most_common():
        print(f"{lang:<12}{size / 1e6:>8.1f} MB")
    print(f"{'together':<12}{sizes.total() / 1e6:>8.1f} MB in {file}")


if __name__ == "__main__":
    main()
