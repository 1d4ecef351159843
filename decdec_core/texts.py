"""Texts to calibrate on and to measure on, from a local folder, the hub, or CPython itself.

wikitext2   WikiText-2 raw: $DECDEC_DATA_DIR/wikitext-2-raw-v1/*.parquet, else the hub's Salesforce/wikitext
pydoc       CPython's own reference in pydoc_data.topics, 373 KB of English, where neither of these is
a path      a text file, whole, for calibration
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
import platform
import threading
from dataclasses import dataclass
from pathlib import Path

from decdec_core.config import DecDECError, require_one_of, suggest

NAMES = ("wikitext2", "pydoc")
SPLITS = ("test", "validation", "calibration")
_WIKITEXT_FOLDER = "wikitext-2-raw-v1"
_WIKITEXT_REPOSITORY = "Salesforce/wikitext"
# published folders without the whole train split carry its beginning, empty lines left out
_TRAIN_HEAD = "train_head_nonempty.parquet"
_TRAIN_HEAD_NAME = "wikitext-2-raw-v1 train, first 9 %"
_HUB_SECONDS = 4.0  # a download retries for 23 s where there is no network at all: ask once, briefly


@dataclass(frozen=True)
class Text:
    """A text, the name that results state, and the SHA-256 of its UTF-8 bytes."""

    name: str
    text: str
    sha256: str


def load_text(name: str, split: str = "test") -> Text:
    """Return the text `name` ("wikitext2", "pydoc" or the path of a text file).

    split: "test", "validation" or "calibration"; calibration never overlaps the others. Raises DecDECError
    for a text that is not there, naming the file.
    """
    require_one_of("split", split, SPLITS)
    if name == "wikitext2":
        return _wikitext2(split)
    if name == "pydoc":
        return _pydoc(split)
    if not Path(name).is_file():
        raise DecDECError(
            f"text must be {', '.join(NAMES)} or a text file that exists, got {name!r}{suggest(name, NAMES)}"
        )
    if split != "calibration":
        raise DecDECError(f"split must be calibration for a text file, got {split!r} of {name}")
    try:
        return _text(Path(name).name, Path(name).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise DecDECError(f"text must be in UTF-8, got {name}: {error}") from None


def available_text(split: str = "test") -> str:
    """Return "wikitext2" where $DECDEC_DATA_DIR, the hub's cache or the hub has the split, else "pydoc"."""
    require_one_of("split", split, SPLITS)
    if _local_files(split):
        return "wikitext2"
    upstream = _upstream(split)
    return "wikitext2" if _cached_file(upstream) or _hub_refusal(upstream) is None else "pydoc"


def data_dir() -> Path | None:
    """Return the folder $DECDEC_DATA_DIR, or None where it is not set; one that is missing raises."""
    value = os.environ.get("DECDEC_DATA_DIR")
    if not value:
        return None
    if not Path(value).is_dir():
        raise DecDECError(f"DECDEC_DATA_DIR must be a folder that exists, got {value}")
    return Path(value)


def _text(name: str, text: str) -> Text:
    return Text(name, text, hashlib.sha256(text.encode("utf-8")).hexdigest())


def _wikitext2(split: str) -> Text:
    """Return the split's rows joined by two newlines, as published perplexities do (method.md, section 8)."""
    local = _local_files(split)
    file = local[0] if local else _hub_file(split)
    name = _TRAIN_HEAD_NAME if file.name == _TRAIN_HEAD else f"{_WIKITEXT_FOLDER} {_upstream(split)}"
    import pandas

    try:
        rows = pandas.read_parquet(file, columns=["text"])["text"]
    except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors are ValueErrors
        first = str(error).partition("\n")[0]
        raise DecDECError(f"{file} must be a Parquet file with a column text, got: {first}") from None
    return _text(name, "\n\n".join(rows))


def _upstream(split: str) -> str:
    return "train" if split == "calibration" else split


def _local_files(split: str) -> list[Path]:
    """Return the split's files that $DECDEC_DATA_DIR has, the best first."""
    folder = data_dir()
    if folder is None:
        return []
    return [file for file in _wanted_files(folder, split) if file.is_file()]


def _wanted_files(folder: Path, split: str) -> list[Path]:
    names = [f"{_upstream(split)}.parquet", *([_TRAIN_HEAD] if split == "calibration" else [])]
    return [folder / _WIKITEXT_FOLDER / name for name in names]


def _name_on_hub(split: str) -> str:
    return f"{_WIKITEXT_FOLDER}/{split}-00000-of-00001.parquet"


def _cached_file(split: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(_WIKITEXT_REPOSITORY, _name_on_hub(split), repo_type="dataset")
    return Path(found) if isinstance(found, str) else None


def _hub_file(split: str) -> Path:
    cached = _cached_file(_upstream(split))
    if cached is not None:
        return cached
    refusal = _hub_refusal(_upstream(split))
    if refusal is not None:
        folder = data_dir()
        missing = "not set" if folder is None else f"no {' or '.join(map(str, _wanted_files(folder, split)))}"
        raise DecDECError(
            f"wikitext2 must come from DECDEC_DATA_DIR ({missing}) or the hub's "
            f"{_WIKITEXT_REPOSITORY}, got no answer from the hub: {refusal}"
        )
    from huggingface_hub import hf_hub_download

    name = _name_on_hub(_upstream(split))
    return Path(hf_hub_download(_WIKITEXT_REPOSITORY, name, repo_type="dataset"))


def _hub_refusal(split: str) -> str | None:
    """Return why the hub does not serve the split's file now, or None if it does; within 4 s.

    In a thread of its own: resolving a host name has no time limit that a caller could set.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(_WIKITEXT_REPOSITORY, _name_on_hub(split), repo_type="dataset")
    answer: list[str | None] = []

    def ask() -> None:
        try:
            get_hf_file_metadata(url, timeout=_HUB_SECONDS)
            answer.append(None)
        except Exception as error:  # which ones depends on the HTTP library below the hub's client
            answer.append(f"{type(error).__name__}: {error}".splitlines()[0])

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_HUB_SECONDS)
    return answer[0] if answer else f"nothing within {_HUB_SECONDS:.0f} s"


def _pydoc(split: str) -> Text:
    """Return the first half of the paragraphs for test, the second for calibration.

    Topics quote each other (the class topic holds much of the special methods'), so a paragraph counts
    where it first occurs, in the order of the topics' names: the halves share none.
    """
    from pydoc_data.topics import topics

    if split == "validation":
        raise DecDECError("split must be test or calibration for pydoc, got 'validation'")
    ordered = (paragraph for name in sorted(topics) for paragraph in topics[name].strip().split("\n\n"))
    paragraphs = list(dict.fromkeys(ordered))
    ends = list(itertools.accumulate(map(len, paragraphs)))
    middle = bisect.bisect(ends, ends[-1] // 2)
    half = paragraphs[:middle] if split == "test" else paragraphs[middle:]
    name = f"pydoc_data.topics of CPython {platform.python_version()}, {split} half"
    return _text(name, "\n\n".join(half))
