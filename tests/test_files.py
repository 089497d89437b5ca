import pytest

from favae.errors import DataError, hint
from favae.files import atomic_path, write_text


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


def test_a_file_replaces_the_older_one_and_what_a_killed_process_left(tmp_path):
    (tmp_path / ".writing-text").mkdir()
    for text in ("one", "two"):
        write_text(tmp_path / "text", text)
    assert (tmp_path / "text").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_hints_are_added_to_our_own_errors_only():
    with pytest.raises(DataError, match="^no image; give another folder$"), hint("give another folder"):
        raise DataError("no image")
    with pytest.raises(ValueError, match="^other$"), hint("give another folder"):
        raise ValueError("other")
