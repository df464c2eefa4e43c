"""Files and folders appear whole or not at all."""

from pathlib import Path

import pytest

from ldm.files.atomic import clear_partials, durable_file, durable_folder, write_text


def test_a_file_appears_at_the_end_of_its_block(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with durable_file(path) as partial:
        partial.write_text("half")
        assert not path.exists()
        partial.write_text("whole")
    assert path.read_text() == "whole"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


def test_an_error_leaves_the_file_before_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "before")
    with pytest.raises(OSError, match="no room"), durable_file(path) as partial:
        partial.write_text("half")
        raise OSError("no room")
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


def test_a_folder_replaces_the_one_before_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for round_ in ("one", "two"):
        with durable_folder(path) as partial:
            (partial / round_).mkdir()
            (partial / round_ / "file.txt").write_text(round_)
    assert [file.name for file in path.iterdir()] == ["two"]
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(OSError, match="no room"), durable_folder(path) as partial:
        (partial / "half").touch()
        raise OSError("no room")
    assert (path / "two" / "file.txt").read_text() == "two"
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("then", ["an error", "a kill, cleared", "a kill, made again"])
def test_between_the_two_renames_a_folder_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then) -> None:
    """The folder that was about to be replaced is there again."""
    path = tmp_path / "a [folder]"
    with durable_folder(path) as partial:
        (partial / "before").touch()
    replace, renamed = Path.replace, []

    def fails(self: Path, target: Path) -> Path:
        renamed.append(target)
        if len(renamed) == 2:
            raise OSError("no more")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fails)
        if then != "an error":  # nothing is tidied up
            patch.setattr("ldm.files.atomic.restore", lambda path: None)
            patch.setattr("shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(OSError, match="no more"), durable_folder(path) as partial:
            (partial / "after").touch()
    if then == "a kill, cleared":
        clear_partials(tmp_path)
    if then == "a kill, made again":
        assert not path.exists() and len(list(tmp_path.iterdir())) == 2
        with pytest.raises(OSError, match="again"), durable_folder(path):
            raise OSError("again")
        assert [file.name for file in path.iterdir()] == ["before"]
        with durable_folder(path) as partial:
            (partial / "before").touch()
        clear_partials(tmp_path)
    assert [file.name for file in path.iterdir()] == ["before"]
    assert [file.name for file in tmp_path.iterdir()] == ["a [folder]"]


def test_what_a_kill_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    (tmp_path / ".partial-0-file").touch()
    (tmp_path / ".partial-0-folder" / "inner").mkdir(parents=True)
    clear_partials(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
