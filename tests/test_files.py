"""Files are replaced whole, on disk, or not at all; locks end with their process; nothing that was killed stays."""

import errno
import os
import signal
from contextlib import contextmanager

import pytest

from vspdf import files
from vspdf.errors import UserError


@contextmanager
def killed(work):
    """A fork that has done `work`, whose result it holds, until it is killed at the end of the block."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            held = work()
            os.write(writer, b"." if held is None else b"!")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 1)
    os.close(reader)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def left(folder):
    return sorted(path.name for path in folder.iterdir())


# -- whole, and on disk -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
def test_a_file_that_never_reached_the_disk_was_not_written(tmp_path, monkeypatch, number):
    path = tmp_path / "file"
    files.write_whole(path, "old")

    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=rf"file cannot be written: {os.strerror(number)}\."):
        files.write_whole(path, "new")
    with pytest.raises(UserError, match=r"'.*other' was not written: "), files.new_whole(tmp_path / "other") as whole:
        whole.write_text("new")
    assert path.read_text() == "old" and left(tmp_path) == ["file"]


def test_file_systems_that_cannot_flush_a_folder_are_taken_as_they_are(tmp_path, monkeypatch):
    flush = os.fsync

    def files_alone(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", files_alone)
    files.write_whole(tmp_path / "file", "text")
    with files.new_whole(tmp_path / "folder") as whole:
        whole.mkdir()
        (whole / "inside").write_text("text")
    assert left(tmp_path) == ["file", "folder"]


def test_content_is_flushed_before_the_name_and_the_name_after_it(tmp_path, monkeypatch):
    seen, flush, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda d: (seen.append(os.readlink(f"/proc/self/fd/{d}")), flush(d)))
    monkeypatch.setattr(os, "rename", lambda *a: (seen.append("rename"), replace(*a)))
    monkeypatch.setattr(os, "replace", lambda *a: (seen.append("rename"), replace(*a)))
    files.write_whole(tmp_path / "file", "text")
    content, rename, name = seen
    assert content.startswith(f"{tmp_path}/.") and rename == "rename" and name == str(tmp_path)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_disk_that_takes_nothing_and_lets_go_of_nothing_is_one_line(tmp_path, monkeypatch, number):
    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))

    for call in ("mkdir", "unlink", "rename", "replace", "rmdir"):
        monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError, match=rf"file cannot be written: {os.strerror(number)}\."):
        files.write_whole(tmp_path / "file", "new")


# -- what killed processes leave --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_drafts_of_killed_processes_go_and_those_of_others_stay(tmp_path, kind):
    def begin():
        held = files.draft(tmp_path / "one")
        whole = held.__enter__()
        if kind == "folder":
            whole.mkdir()
            (whole / "inside").write_text("half")
        else:
            whole.write_text("half")
        return held

    with killed(begin):
        files.write_whole(tmp_path / "other", "text")
        draft, other = left(tmp_path)
        assert other == "other" and (tmp_path / draft / "whole").exists()
    assert len(left(tmp_path)) == 2
    with files.new_whole(tmp_path / "third") as whole:
        whole.write_text("text")
    assert left(tmp_path) == ["other", "third"]


# -- locks ------------------------------------------------------------------------------------------------------------


def test_a_lock_is_held_until_its_process_ends_however_it_ends(tmp_path):
    path = tmp_path / ".lock"

    def hold():
        held = files.lock(path, "it")
        held.__enter__()
        return held

    with (
        killed(hold) as holder,
        pytest.raises(UserError, match=rf"^it is in use by process {holder}: another process is at work"),
        files.lock(path, "it", patience=0.1),
    ):
        pass
    assert path.exists()
    own = pytest.raises(UserError, match=rf"in use by process {os.getpid()}")
    with files.lock(path, "it"), own, files.lock(path, "it"):
        pass
    assert left(tmp_path) == []


def test_who_waits_gets_the_lock_and_nobody_else(tmp_path):
    """Four processes count up in one file, each under the lock that the one before removes."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    children = []
    for _ in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                for _ in range(10):
                    with files.lock(tmp_path / ".lock", "it", patience=60):
                        counter.write_text(str(int(counter.read_text()) + 1))
                os._exit(0)
            finally:
                os._exit(1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert counter.read_text() == "40" and left(tmp_path) == ["counter"]


def test_where_there_are_no_locks_it_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(files, "fcntl", None)
    with files.lock(tmp_path / ".lock", "it") as held:
        assert held is None
    assert "it cannot be locked" in caplog.text and "let no other process write to it" in caplog.text
    files.write_whole(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"
