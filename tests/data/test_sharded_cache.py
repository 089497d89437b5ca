"""What caches of latents and of text embeddings share: plans, shares of processes, and what a kill leaves behind."""

import json
import multiprocessing
import os
import types

import pytest
import torch

from favae.data import sharded_cache
from favae.data.sharded_cache import CacheWriter, all_finite, find_damage, read_manifest
from favae.errors import CacheError, FolderInUse
from favae.files import lock_folder
from favae.hashing import checksum


def act_as_process(monkeypatch, index: int, count: int) -> None:
    state = types.SimpleNamespace(
        is_main_process=index == 0, process_index=index, num_processes=count, wait_for_everyone=lambda: None
    )
    monkeypatch.setattr(sharded_cache, "process_state", lambda: state)


def write(folder, **plan) -> list[int]:
    """The numbers of the files that this process wrote."""
    numbers = []

    def write_file(number, path):
        path.write_text(str(number))
        numbers.append(number)

    CacheWriter(folder, plan, "test cache").write_missing([folder / f"file-{k}" for k in range(5)], write_file, "files")
    return numbers


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_processes_share_the_files_and_a_continued_run_writes_what_is_missing(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    for index, numbers in ((0, [0, 2, 4]), (1, [1, 3])):
        act_as_process(monkeypatch, index, 2)
        assert write(folder, size=5) == numbers
    assert [(folder / f"file-{k}").read_text() for k in range(5)] == list("01234")
    (folder / "file-3").unlink()
    (folder / ".writing-1-elsewhere-file-3").write_text("torn")  # what a killed process of another host leaves
    act_as_process(monkeypatch, 0, 1)
    assert write(folder, size=5) == [3]
    assert names(folder) == [*(f"file-{k}" for k in range(5)), "plan.json"]


def test_files_that_are_written_anew_have_new_checksums(tmp_path):
    files = [tmp_path / f"file-{k}" for k in range(2)]

    def write(content: str) -> CacheWriter:
        writer = CacheWriter(tmp_path, {"size": 2}, "test cache")
        writer.write_missing(files, lambda _, path: path.write_text(content), "files")
        return writer

    before = write("old").finish(lambda: {"counts": [1, 1]})["checksums"]
    files[0].unlink()
    with pytest.raises(CacheError, match="another size"):
        CacheWriter(tmp_path, {"size": 3}, "test cache")
    assert [words.split("/")[-1] for words in find_damage(tmp_path, "test cache")] == ["file-0 is missing"]
    write("new")._lock.close()  # interrupted
    assert ["file-0 was written again" in words for words in find_damage(tmp_path, "test cache")] == [True]
    after = write("never").finish(lambda: {"counts": [1, 1]})["checksums"]
    assert after == {"file-0": checksum(files[0]), "file-1": before["file-1"]} and after["file-0"] != before["file-0"]
    assert files[0].read_text() == "new"


def test_a_file_that_fails_is_not_there_and_the_manifest_comes_last(tmp_path):
    folder = tmp_path / "cache"
    writer = CacheWriter(folder, {"size": 5}, "test cache")

    def fail(number, path):
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer.write_missing([folder / "file"], fail, "files")
    assert names(folder) == ["plan.json"]
    with pytest.raises(CacheError, match="no finished test cache"):
        read_manifest(folder, "test cache")
    manifest = writer.finish(lambda: {"counts": [1]})
    assert manifest == {"size": 5, "counts": [1], "checksums": {}, "quick_checksums": []}
    assert manifest.items() < json.loads((folder / "manifest.json").read_text()).items()


def test_another_plan_and_other_files_are_refused(tmp_path):
    write(tmp_path / "cache", size=5)
    with pytest.raises(CacheError, match="another size"):
        write(tmp_path / "cache", size=6)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    with pytest.raises(CacheError, match="not a test cache"):
        write(tmp_path / "other", size=5)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("has_plan", [True, False])
def test_a_cache_of_another_kind_is_named_and_left_as_it_is(tmp_path, has_plan):
    folder = tmp_path / "cache"
    CacheWriter(folder, {"tokenizer": "a"}, "latent cache").finish(lambda: {"counts": [1]})
    if not has_plan:
        (folder / "plan.json").unlink()
    before = names(folder)
    with pytest.raises(CacheError, match="another kind of cache, not a folder of text embeddings; choose"):
        CacheWriter(folder, {"encoder": "b"}, "folder of text embeddings")
    assert names(folder) == before


def test_two_commands_do_not_write_one_cache(tmp_path):
    write(tmp_path / "cache", size=5)
    other = multiprocessing.get_context("fork").Pool(1)
    with lock_folder(tmp_path / "cache"), other, pytest.raises(FolderInUse, match=f"process {os.getpid()} "):
        other.apply(write, [tmp_path / "cache"], {"size": 5})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_finite_is_about_the_numbers_and_not_their_sum(dtype):
    largest = torch.finfo(dtype).max
    assert all_finite(torch.full((3, 5), largest, dtype=dtype)) and all_finite(torch.zeros(0, 3, dtype=dtype))
    for wrong in ([torch.nan], [torch.inf], [-torch.inf], [torch.inf, -torch.inf]):
        assert not all_finite(torch.tensor([1.0, *wrong, -largest], dtype=dtype))
