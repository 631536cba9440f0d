"""Who may change what lies at a path: links, owners, modes, and every folder on the way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dks.dispatch import trust
from dks.dispatch.trust import distrust, make_folder, strangers, tighten
from tests.volumes import as_a_volume


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "above" / "package"
    make_folder(path)
    (path / "a.py").write_text("")
    (path / "a.py").chmod(0o644)
    return path


def test_a_folder_of_one_s_own_is_trusted(folder: Path) -> None:
    assert distrust(folder) == "" and strangers(folder) == []
    assert distrust(Path("/usr/bin")) == "" and distrust(Path("/")) == ""


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o1777])
def test_a_folder_that_others_may_write_is_not(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    assert "package: others may write there" in distrust(folder)
    assert "others may write it" in strangers(folder)[0]


def test_what_others_could_put_in_its_place_is_not(folder: Path) -> None:
    folder.parent.chmod(0o777)
    assert "above: others may write there" in distrust(folder)
    folder.parent.chmod(0o1777)
    assert distrust(folder) == "", "as in /tmp, nobody else can rename what is ours"


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_files_that_others_may_write_are_strangers(folder: Path, mode: int) -> None:
    (folder / "a.py").chmod(mode)
    assert strangers(folder) == ["a.py: others may write it, expected that only you may: chmod go-w"]
    tighten(folder / "a.py")
    assert strangers(folder) == []


def test_a_group_of_one_s_own_is_nobody_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.parent.chmod(0o775)
    monkeypatch.setattr(trust, "_private", lambda gid: True)
    assert distrust(folder) == ""
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__").chmod(0o775)
    assert strangers(folder) == []
    monkeypatch.setattr(trust, "_private", lambda gid: False)
    assert "above: others may write there" in distrust(folder)
    assert "__pycache__: others may write it" in strangers(folder)[0]


def test_links_are_followed_to_where_they_could_be_exchanged(folder: Path, tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    (open_to_all / "link").symlink_to(folder)
    assert distrust(open_to_all / "link") == ""
    open_to_all.chmod(0o777)
    assert "open: others may write there" in distrust(open_to_all / "link")
    (tmp_path / "twice").symlink_to(open_to_all / "link")
    assert "open: others may write there" in distrust(tmp_path / "twice"), "on the way, though not at the end"
    assert "found a link that others could redirect" in strangers(tmp_path / "twice")[0]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "can't be examined" in distrust(tmp_path / "loop")
    assert "can't be examined" in distrust(tmp_path / "nothing" / "there")


def test_files_of_a_volume_are_links_and_as_good_as_what_they_lead_through(folder: Path, tmp_path: Path) -> None:
    as_a_volume(folder)
    version = folder / "..2026_11_29_19_45_00.1"
    assert (folder / "a.py").is_file() and distrust(folder) == "" and strangers(folder) == []
    (version / "a.py").chmod(0o666)
    assert "a.py: found a link that others could redirect" in strangers(folder)[0]
    (version / "a.py").chmod(0o664)
    assert "a.py: " in strangers(folder)[0], "stricter than for what lies outside"
    (version / "a.py").chmod(0o644)
    version.chmod(0o777)
    assert any("..data: found a link that others could redirect" in line for line in strangers(folder))
    version.chmod(0o755)
    assert strangers(folder) == []
    other = tmp_path / "open"
    other.mkdir()
    (other / "c.py").write_text("")
    (folder / "c.py").symlink_to(other / "c.py")
    assert strangers(folder) == []
    other.chmod(0o777)
    (line,) = strangers(folder)
    assert line.startswith("c.py: found a link that others could redirect") and "open: others may write" in line
    other.chmod(0o755)
    (other / "c.py").unlink()
    assert "can't be examined" in strangers(folder)[0]


def test_what_can_not_be_imported_by_its_name_is_no_module(folder: Path) -> None:
    as_a_volume(folder)
    assert [path.name for path in folder.iterdir() if trust.importable(path)] == ["a.py"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_the_remedy_is_one_that_this_user_can_apply(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.chmod(0o777)
    assert distrust(folder).endswith("chmod go-w")
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    assert distrust(folder).endswith("ask user 0 for chmod go-w, or copy it to a folder of your own")
    folder.chmod(0o755)
    os.chown(folder, 54322, -1)
    assert distrust(folder).endswith("ask root to chown it, or copy it to a folder of your own")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o644), (0o000, 0o644), (0o077, 0o600)])
def test_a_file_is_put_in_place_whole_and_closed_to_writers(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        trust.put(tmp_path / "a", b"one")
        trust.put(tmp_path / "a", b"two")
    finally:
        os.umask(before)
    assert (tmp_path / "a").read_bytes() == b"two" and (tmp_path / "a").stat().st_mode & 0o777 == mode
    with pytest.raises(OSError, match="nowhere"):
        trust.put(tmp_path / "nowhere" / "a", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_group_without_a_name_is_its_user_s_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    assert trust._private(54321) and not trust._private(54322) and not trust._private(0)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert not trust._private(54321)


def test_relative_ways_and_dots_mean_what_they_mean(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert distrust(Path()) == distrust(Path("../package/..")) == ""
    folder.parent.chmod(0o777)
    assert "above: others" in distrust(Path())


@pytest.mark.parametrize("which", ["folder", "file", "above", "link"])
def test_what_another_user_owns_is_not_trusted(
    folder: Path, tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder.parent)
    stranger = {"folder": folder, "file": folder / "a.py", "above": folder.parent, "link": link}[which]
    if os.geteuid() == 0:
        os.chown(stranger, 54321, -1, follow_symlinks=False)
    else:  # who can't give a file away: everybody else is a stranger then
        monkeypatch.setattr(trust, "trusted", lambda: {0, 54321})
    said = [distrust(link / "package"), *strangers(folder)]
    assert any("owned by user" in line for line in said), said


def test_whoever_owns_dks_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {0, os.geteuid(), Path(trust.__file__).stat().st_uid} == trust.trusted()


def test_folders_are_made_closed_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_folder(tmp_path / "a" / "b" / "c")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "a/b", "a/b/c")] == [0o755] * 3
