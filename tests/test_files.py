"""written_aside: whoever reads at any moment finds the old file or the new one, whole."""

import builtins
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_ref import files
from qlora_ref.files import written_aside


def write(path: Path, text: str, as_folder: bool) -> None:
    if as_folder:
        (path / "inner").mkdir(parents=True)
        (path / "inner" / "content").write_text(text)
        (path / text).write_text("")  # a name of its own: remains of the old folder would show
    else:
        path.write_text(text)


def content(path: Path) -> str:
    if path.is_dir():
        text = (path / "inner" / "content").read_text()
        assert sorted(child.name for child in path.iterdir()) == sorted(["inner", text])
        return text
    return path.read_text()


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize("as_string", [False, True])
def test_what_the_block_wrote_takes_its_place_at_the_end(
    tmp_path: Path, as_folder: bool, as_string: bool
) -> None:
    path = tmp_path / "some" / "folder" / "model.bin"
    for text in ("first", "second", "third"):
        with written_aside(str(path) if as_string else path) as aside:
            assert aside.parent == path.parent and aside != path  # a rename stays on the disk
            write(aside, text, as_folder)
        assert content(path) == text
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_reader_sees_the_old_content_until_the_end(tmp_path: Path, as_folder: bool) -> None:
    path = tmp_path / "model"
    write(path, "old", as_folder)
    with written_aside(path) as aside:
        assert content(path) == "old"
        write(aside, "new", as_folder)
        assert content(path) == "old"
    assert content(path) == "new"


def test_an_open_file_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_text("old")
    with open(path) as reader:
        with written_aside(path) as aside:
            aside.write_text("new")
        assert reader.read() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_the_old_content_stays_when_the_block_raises(
    tmp_path: Path, as_folder: bool, error: type[BaseException]
) -> None:
    path = tmp_path / "model"
    write(path, "old", as_folder)
    with pytest.raises(error), written_aside(path) as aside:
        write(aside, "half of the new", as_folder)
        raise error
    assert content(path) == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_there_when_the_first_write_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError), written_aside(tmp_path / "model") as aside:
        aside.write_text("half")
        raise ValueError
    assert list(tmp_path.iterdir()) == []


class FullDisk:
    """A file on a disk that is full after a few bytes."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> "FullDisk":
        return self

    def __exit__(self, *details: object) -> None:
        self.file.close()

    def write(self, text: str) -> int:
        self.file.write(text[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_full_disk_leaves_the_old_content_and_no_remains(
    tmp_path: Path, as_folder: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, really_open = tmp_path / "model", builtins.open
    write(path, "old", as_folder)
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", lambda *args: FullDisk(really_open(*args)))
        with pytest.raises(OSError) as raised, written_aside(path) as aside:
            if as_folder:
                aside.mkdir()
            with open(aside / "content" if as_folder else aside, "w") as file:
                file.write("new content")
    assert raised.value.errno == errno.ENOSPC
    assert content(path) == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_failing_sync_leaves_the_old_content_and_no_remains(
    tmp_path: Path, as_folder: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Many file systems notice only now that there is no space.
    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "model"
    write(path, "old", as_folder)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", no_space)
        with pytest.raises(OSError), written_aside(path) as aside:
            write(aside, "new", as_folder)
    assert content(path) == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("as_folder", [False, True])
def test_every_file_is_on_the_disk_before_it_is_renamed(
    tmp_path: Path, as_folder: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = tmp_path / "model", []

    def record(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        assert not path.exists()

    monkeypatch.setattr(files.os, "fsync", record)
    with written_aside(path) as aside:
        write(aside, "new", as_folder)
    written = [file for file in (path, *path.rglob("*")) if file.is_file()]
    assert len(written) == (2 if as_folder else 1)
    assert {file.stat().st_ino for file in written} <= set(synced)


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_block_that_writes_nothing_raises_and_keeps_the_old_content(
    tmp_path: Path, as_folder: bool
) -> None:
    path = tmp_path / "model"
    write(path, "old", as_folder)
    with pytest.raises(FileNotFoundError), written_aside(path):
        pass
    assert content(path) == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("old_is_folder", [False, True])
def test_a_file_may_replace_a_folder_and_a_folder_is_not_lost_to_a_file(
    tmp_path: Path, old_is_folder: bool
) -> None:
    path = tmp_path / "model"
    write(path, "old", old_is_folder)
    try:
        with written_aside(path) as aside:
            write(aside, "new", not old_is_folder)
    except OSError:  # the system may refuse; then the old one must be there
        assert content(path) == "old"
    else:
        assert content(path) == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path, as_folder: bool) -> None:
    path, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    write(elsewhere, "old", as_folder)
    path.symlink_to(elsewhere)
    with written_aside(path) as aside:
        write(aside, "new", as_folder)
    assert content(path) == "new" and content(elsewhere) == "old"
    assert sorted(tmp_path.iterdir()) == [elsewhere, path]


def test_remains_of_a_killed_process_of_the_same_id_are_cleared(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with written_aside(path) as aside:
        name = aside
        write(aside, "first", as_folder=False)
    write(name, "remains", as_folder=True)
    with written_aside(path) as aside:
        write(aside, "second", as_folder=False)
    assert content(path) == "second"
    assert list(tmp_path.iterdir()) == [path]


KILLED_IN_THE_MIDDLE = """
import os, signal, sys
from qlora_ref.files import written_aside
with written_aside(sys.argv[1]) as aside:
    if sys.argv[2] == "folder":
        aside.mkdir()
        aside = aside / "content"
    with open(aside, "w") as file:
        file.write("half of the new")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_process_killed_while_writing_leaves_the_old_content(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model"
    write(path, "old", as_folder=kind == "folder")
    # files.py needs nothing of torch, but importing the package may be slow: only the time.
    finished = subprocess.run([sys.executable, "-c", KILLED_IN_THE_MIDDLE, str(path), kind])
    assert finished.returncode == -signal.SIGKILL
    assert content(path) == "old"


# How a system may be without renameat2, and a process killed at its first rename or removal.
WITHOUT = {
    "C library": "files.ctypes.CDLL = lambda name: object()",
    "file system": "files._RENAME_EXCHANGE = 1 << 20",  # the answer to a flag unknown to it: EINVAL
}
KILLED_AFTER_THE_FIRST_RENAME = """
import os, shutil, signal, sys
from pathlib import Path
from qlora_ref import files
def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
rename = Path.rename
Path.rename = lambda *arguments: (rename(*arguments), die())
shutil.rmtree = die
exec(sys.argv[2])
with files.written_aside(sys.argv[1]) as aside:
    (aside / "inner").mkdir(parents=True)
    (aside / "inner" / "content").write_text("new")
    (aside / "new").write_text("")
"""


def replace_and_be_killed(path: Path, change: str) -> None:
    write(path, "old", as_folder=True)
    arguments = [sys.executable, "-c", KILLED_AFTER_THE_FIRST_RENAME, str(path), change]
    assert subprocess.run(arguments).returncode == -signal.SIGKILL
    assert len(list(path.parent.iterdir())) == 2  # it was killed before the end


def write_again(path: Path, and_fail: bool) -> None:
    try:
        with written_aside(path) as aside:
            write(aside, "newer", as_folder=True)
            if and_fail:
                raise ValueError
    except ValueError:
        assert and_fail


@pytest.mark.parametrize("and_fail", [False, True])
def test_a_folder_is_there_whenever_the_process_that_replaces_it_is_killed(
    tmp_path: Path, and_fail: bool
) -> None:
    one, other, path = tmp_path / "one", tmp_path / "other", tmp_path / "models" / "model"
    one.mkdir(), other.mkdir()
    if not files._exchange(one, other):
        pytest.skip("renameat2 with RENAME_EXCHANGE is missing on this system or file system")
    replace_and_be_killed(path, "")
    assert content(path) == "new"
    write_again(path, and_fail)
    assert content(path) == ("new" if and_fail else "newer")
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("and_fail", [False, True])
@pytest.mark.parametrize("missing", WITHOUT)
def test_a_folder_lost_between_two_renames_is_put_back_by_the_next_writer(
    tmp_path: Path, missing: str, and_fail: bool
) -> None:
    path = tmp_path / "model"
    replace_and_be_killed(path, WITHOUT[missing])
    assert not path.exists()
    write_again(path, and_fail)
    assert content(path) == ("old" if and_fail else "newer")
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_without_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    path = tmp_path / "model"
    for text in ("first", "second"):
        with written_aside(path) as aside:
            write(aside, text, as_folder=True)
        assert content(path) == text
        assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_between_two_renames_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: Path, target: Path) -> None:
        os.rename(source, target)
        if source == path:
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    monkeypatch.setattr(Path, "rename", interrupted)
    path = tmp_path / "model"
    write(path, "old", as_folder=True)
    with pytest.raises(KeyboardInterrupt), written_aside(path) as aside:
        write(aside, "new", as_folder=True)
    assert content(path) == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_running_process_or_another_path_has_aside_is_left_alone(tmp_path: Path) -> None:
    path, parent = tmp_path / "model", os.getppid()
    others = [f".model.{parent}.aside", f".model.{parent}.old", f".model.b.{os.getpid()}.old"]
    for other in others:
        (tmp_path / other).mkdir()
    with written_aside(path) as aside:
        write(aside, "new", as_folder=True)
    assert sorted(child.name for child in tmp_path.iterdir()) == sorted([*others, "model"])
