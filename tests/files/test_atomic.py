"""ldm.files.atomic: files and folders are written atomically."""

from pathlib import Path

import pytest

from ldm.files.atomic import atomic_folder, atomic_write, clear_partials, write_text


def test_file_appears_when_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with atomic_write(path) as partial:
        partial.write_text("half")
        assert not path.exists()
        partial.write_text("complete")
    assert path.read_text() == "complete"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


def test_error_keeps_previous_file_and_deletes_partial_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "before")
    with pytest.raises(OSError, match="disk full"), atomic_write(path) as partial:
        partial.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


def test_folder_is_replaced_atomically(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for name in ("one", "two"):
        with atomic_folder(path) as partial:
            (partial / name).mkdir()
            (partial / name / "file.txt").write_text(name)
    assert [file.name for file in path.iterdir()] == ["two"]
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(OSError, match="disk full"), atomic_folder(path) as partial:
        (partial / "half").touch()
        raise OSError("disk full")
    assert (path / "two" / "file.txt").read_text() == "two"
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("failure", ["error", "kill, then clear_partials", "kill, then another write"])
def test_interruption_between_renames_keeps_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure) -> None:
    """The folder that was being replaced is restored."""
    path = tmp_path / "a [folder]"
    with atomic_folder(path) as partial:
        (partial / "before").touch()
    replace, renames = Path.replace, []

    def fail_on_second_rename(self: Path, target: Path) -> Path:
        renames.append(target)
        if len(renames) == 2:
            raise OSError("second rename")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail_on_second_rename)
        if failure != "error":  # a killed process does not clean up
            patch.setattr("ldm.files.atomic.restore", lambda path: None)
            patch.setattr("shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(OSError, match="second rename"), atomic_folder(path) as partial:
            (partial / "after").touch()
    if failure == "kill, then clear_partials":
        clear_partials(tmp_path)
    if failure == "kill, then another write":
        assert not path.exists() and len(list(tmp_path.iterdir())) == 2
        with pytest.raises(OSError, match="again"), atomic_folder(path):
            raise OSError("again")
        assert [file.name for file in path.iterdir()] == ["before"]
        with atomic_folder(path) as partial:
            (partial / "before").touch()
        clear_partials(tmp_path)
    assert [file.name for file in path.iterdir()] == ["before"]
    assert [file.name for file in tmp_path.iterdir()] == ["a [folder]"]


def test_clear_partials_deletes_unfinished_files(tmp_path: Path) -> None:
    (tmp_path / "complete").touch()
    (tmp_path / ".partial-0-file").touch()
    (tmp_path / ".partial-0-folder" / "inner").mkdir(parents=True)
    clear_partials(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["complete"]
