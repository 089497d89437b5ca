import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from favae.errors import DataError, FolderInUse, hint
from favae.files import atomic_path, lock_folder, read_json, read_json_lines, write_text


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    final = tmp_path / "parent/final"
    with atomic_path(final) as folder:
        folder.mkdir()
        (folder / "weights").touch()
    with pytest.raises(RuntimeError), atomic_path(final) as folder:
        folder.mkdir()
        (folder / "part").touch()
        raise RuntimeError
    assert [path.name for path in final.iterdir()] == ["weights"]
    assert [path.name for path in final.parent.iterdir()] == ["final"]


def test_a_folder_that_cannot_get_its_name_leaves_the_old_one(tmp_path, monkeypatch):
    final, rename = tmp_path / "final", Path.replace
    final.mkdir()
    (final / "old").touch()

    def fails(self: Path, target: Path) -> Path:
        if target == final and "old" not in self.name:
            raise PermissionError
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(PermissionError), atomic_path(final) as folder:
        folder.mkdir()
    assert [path.name for path in final.iterdir()] == ["old"] and [*tmp_path.iterdir()] == [final]


def test_shared_memory_is_not_the_disk(tmp_path):
    message = "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
    with pytest.raises(RuntimeError, match="shared memory"), atomic_path(tmp_path / "final"):
        raise RuntimeError(message)


def test_a_file_replaces_the_older_one_and_what_a_killed_process_left(tmp_path):
    killed = subprocess.Popen(["true"])
    killed.wait()
    host = socket.gethostname()
    (tmp_path / f".writing-{killed.pid}-{host}-text").mkdir()
    others = {f".writing-{os.getppid()}-{host}-text", f".writing-{killed.pid}-other-host-text"}
    for name in others:
        (tmp_path / name).touch()
    for text in ("one", "two"):
        write_text(tmp_path / "text", text)
    assert (tmp_path / "text").read_text() == "two"
    assert {path.name for path in tmp_path.iterdir()} == {"text"} | others


def test_a_file_does_not_replace_a_folder(tmp_path):
    (tmp_path / "name/inside").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match="there is a folder of this name"):
        write_text(tmp_path / "name", "text")
    assert (tmp_path / "name/inside").is_dir() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("is_locked", [False, True])
def test_a_kill_between_two_names_loses_no_folder(tmp_path, is_locked):
    script = """
import os, sys
from pathlib import Path
from favae.files import atomic_path
rename = Path.replace
def replace(path, target):
    if target.name == "final":
        os._exit(9)  # the old one has another name already
    return rename(path, target)
Path.replace = replace
with atomic_path(Path(sys.argv[1]) / "final") as folder:
    folder.mkdir()
"""
    (tmp_path / "final").mkdir()
    (tmp_path / "final/weights").touch()
    subprocess.run([sys.executable, "-c", script, tmp_path])
    assert not (tmp_path / "final").exists()
    lock_folder(tmp_path).close() if is_locked else write_text(tmp_path / "text", "")
    assert [file.name for file in (tmp_path / "final").iterdir()] == ["weights"]
    assert not [*tmp_path.glob(".writing-*")]


def test_names_may_be_as_long_as_the_disk_takes(tmp_path):
    name = "写" * 80 + ".png.fav"
    write_text(tmp_path / name, "text")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_all_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """What a power cut leaves is not seen without one; this is the order of the calls that decide it."""
    calls, fsync, replace = [], os.fsync, Path.replace

    def recorded_fsync(descriptor):
        calls.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}").split("-")[-1]))
        fsync(descriptor)

    def recorded_replace(path, target):
        calls.append(("rename", target.name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    with atomic_path(tmp_path / "final") as folder:
        (folder / "part").mkdir(parents=True)
        (folder / "part/weights").write_text("weights")
    names = ["final", "final/part", "final/part/weights"]
    assert set(calls[:3]) == {("sync", name) for name in names}
    assert calls[3] == ("rename", "final") and calls[4][0] == "sync" and len(calls) == 5


def test_one_process_writes_a_folder_and_a_dead_one_leaves_no_lock(tmp_path):
    hold = "import sys; from pathlib import Path; from favae.files import lock_folder;"
    hold += "file = lock_folder(Path(sys.argv[1])); print(flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", hold, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(FolderInUse, match=f"process {holder.pid} on {socket.gethostname()}"):
        lock_folder(tmp_path)
    holder.kill()
    holder.wait()
    (tmp_path / ".writing-1-elsewhere-file").touch()
    lock_folder(tmp_path).close()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_damaged_json_is_named(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step":')
    assert read_json_lines(file) == [{"step": 1}, {"step": 2}]
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"log\.jsonl: line 2"):
        read_json_lines(file)
    for content in ("", "[1]", '{"a": '):
        file.write_text(content)
        with pytest.raises(DataError, match=r"log\.jsonl is damaged"):
            read_json(file)


def test_hints_are_added_to_our_own_errors_only():
    with pytest.raises(DataError, match="^no image; give another folder$"), hint("give another folder"):
        raise DataError("no image")
    with pytest.raises(ValueError, match="^other$"), hint("give another folder"):
        raise ValueError("other")
