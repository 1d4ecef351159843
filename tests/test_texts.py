"""Texts: what they hold, that splits are disjoint, and one test per refused input."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import huggingface_hub
import pandas
import pytest

from decdec_core import texts
from decdec_core.config import DecDECError
from decdec_core.texts import available_text, load_text


@pytest.fixture
def no_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DECDEC_DATA_DIR", raising=False)


def write_rows(folder: Path, name: str, rows: list[str]) -> None:
    (folder / "wikitext-2-raw-v1").mkdir(exist_ok=True)
    pandas.DataFrame({"text": rows}).to_parquet(folder / "wikitext-2-raw-v1" / name)


def test_wikitext2_joins_rows_with_blank_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path, "test.parquet", ["", " = A = \n", "b"])
    monkeypatch.setenv("DECDEC_DATA_DIR", str(tmp_path))
    text = load_text("wikitext2", "test")
    assert text.text == "\n\n = A = \n\n\nb"
    assert text.sha256 == hashlib.sha256(text.text.encode()).hexdigest()
    assert text.name == "wikitext-2-raw-v1 test"
    assert available_text() == "wikitext2"


def test_real_wikitext2_is_whole(data_dir: Path) -> None:
    text = load_text("wikitext2", "test").text
    assert len(text) == 1294336
    assert text.count(" = Robert Boulter = \n") == 1


def test_calibration_prefers_the_whole_train_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECDEC_DATA_DIR", str(tmp_path))
    write_rows(tmp_path, "train_head_nonempty.parquet", ["head"])
    assert load_text("wikitext2", "calibration").name == "wikitext-2-raw-v1 train, first 9 %"
    write_rows(tmp_path, "train.parquet", ["whole"])
    text = load_text("wikitext2", "calibration")
    assert (text.name, text.text) == ("wikitext-2-raw-v1 train", "whole")


@pytest.mark.parametrize(
    ("split", "file"), [("test", "test.parquet"), ("calibration", "train_head_nonempty")]
)
def test_missing_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str, file: str
) -> None:
    monkeypatch.setenv("DECDEC_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(texts, "_cached_file", lambda split: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    with pytest.raises(DecDECError, match=f"DECDEC_DATA_DIR .no .*{file}"):
        load_text("wikitext2", split)
    assert available_text(split) == "pydoc"


def test_each_split_is_asked_for_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECDEC_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(texts, "_cached_file", lambda split: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    write_rows(tmp_path, "test.parquet", ["a"])
    assert (available_text("test"), available_text("calibration")) == ("wikitext2", "pydoc")


def test_damaged_texts_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DecDECError, match="text must be in UTF-8, got"):
        load_text(str(tmp_path / "own.txt"), "calibration")
    (tmp_path / "wikitext-2-raw-v1").mkdir()
    (tmp_path / "wikitext-2-raw-v1" / "test.parquet").write_bytes(b"PAR1 no PAR1")
    monkeypatch.setenv("DECDEC_DATA_DIR", str(tmp_path))
    with pytest.raises(DecDECError, match="must be a Parquet file with a column text") as caught:
        load_text("wikitext2", "test")
    assert "\n" not in str(caught.value)


def test_missing_data_dir_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECDEC_DATA_DIR", str(tmp_path / "none"))
    with pytest.raises(DecDECError, match=r"DECDEC_DATA_DIR must be a folder that exists, got .*none"):
        available_text()


def test_pydoc_halves_are_disjoint_prose_of_like_length() -> None:
    test, calibration = load_text("pydoc", "test"), load_text("pydoc", "calibration")
    assert len(test.text) > 150_000
    assert 0.8 < len(test.text) / len(calibration.text) < 1.25
    assert not set(test.text.split("\n\n")).intersection(calibration.text.split("\n\n"))
    assert "CPython" in test.name


def test_pydoc_has_no_validation_split() -> None:
    with pytest.raises(DecDECError, match="test or calibration for pydoc, got 'validation'"):
        load_text("pydoc", "validation")


def test_text_file(tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("Grüße\n", encoding="utf-8")
    assert load_text(str(file), "calibration").text == "Grüße\n"
    with pytest.raises(DecDECError, match="split must be calibration for a text file, got 'test'"):
        load_text(str(file), "test")


@pytest.mark.parametrize(
    ("name", "hint"), [("wikitxt2", "did you mean 'wikitext2'"), ("none.txt", "got 'none.txt'")]
)
def test_unknown_text_is_refused(name: str, hint: str) -> None:
    with pytest.raises(DecDECError, match=hint):
        load_text(name, "calibration")


def test_unknown_split_is_refused() -> None:
    with pytest.raises(DecDECError, match="split must be one of test, validation, calibration, got 'train'"):
        load_text("pydoc", "train")


def unreachable(*_args: object, **_kwargs: object) -> None:
    raise OSError("no such host")


@pytest.mark.usefixtures("no_data_dir")
def test_without_a_hub_pydoc_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_cached_file", lambda split: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    assert available_text() == "pydoc"
    with pytest.raises(DecDECError, match="got no answer from the hub: OSError: no such host"):
        load_text("wikitext2", "test")


@pytest.mark.usefixtures("no_data_dir")
def test_a_hub_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_cached_file", lambda split: None)
    monkeypatch.setattr(texts, "_HUB_SECONDS", 0.1)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_args, **_kwargs: time.sleep(20))
    start = time.monotonic()
    assert available_text() == "pydoc"
    assert time.monotonic() - start < 10  # 0.1 s, and a machine that is busy with other things


@pytest.mark.usefixtures("no_data_dir")
def test_the_hub_is_read_where_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path, "train.parquet", ["from the hub"])
    monkeypatch.setattr(texts, "_cached_file", lambda split: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_args, **_kwargs: None)
    asked: list[tuple[object, ...]] = []

    def download(*names: object, repo_type: str) -> str:
        asked.append((*names, repo_type))
        return str(tmp_path / "wikitext-2-raw-v1" / "train.parquet")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert available_text() == "wikitext2"
    assert load_text("wikitext2", "calibration").text == "from the hub"
    file = "wikitext-2-raw-v1/train-00000-of-00001.parquet"
    assert asked == [("Salesforce/wikitext", file, "dataset")]
