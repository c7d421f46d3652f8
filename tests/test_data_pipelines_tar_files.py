"""Are all files of a tar file found, and one that is damaged in any way refused rather than read in part?"""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from ghostmask.data_pipelines.photographs.places import LARGEST_FILE, Place, Places
from ghostmask.data_pipelines.photographs.tar_files import Member, fingerprint_tars, members
from ghostmask.engine.errors import InputError

FILE_BYTES, EACH = 600, 1536
"""A file, and what it takes with its header."""


def _tar(path: Path, names: list[str], form: int = tarfile.GNU_FORMAT) -> bytes:
    with tarfile.open(path, "w", format=form) as archive:
        for k, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = FILE_BYTES
            archive.addfile(info, io.BytesIO(bytes([k + 1]) * FILE_BYTES))
    return path.read_bytes()


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_files_of_any_name_are_found_but_hidden_ones(tmp_path: Path, form: int) -> None:
    names = [
        "./a/0.jpg",
        "ü/" + "long" * 60 + ".jpg",
        "not utf \udcff.jpg",
        ".hidden.jpg",
        "a/.hidden/1.jpg",
        "../1.jpg",
    ]
    content = _tar(tmp_path / "x.tar", names, form)
    found = list(members(tmp_path / "x.tar"))
    assert [member.name for member in found] == [name for name in names if ".hidden" not in name]
    assert [content[m.offset] for m in found] == [1, 2, 3, 6]
    assert {m.size for m in found} == {FILE_BYTES}


@pytest.mark.parametrize("inner", [False, True])
def test_a_tar_file_that_is_not_whole_is_refused(tmp_path: Path, inner: bool) -> None:
    whole = _tar(tmp_path / "x.tar", ["0.jpg", "1.jpg", "2.jpg"])
    odd = bytearray(whole)
    odd[EACH + 150] ^= 255  # in the header's checksum: tarfile takes it for the end
    cases = {
        "neither a file nor its end": (bytes(odd), whole + whole, whole[: 3 * EACH] + b"x" * 512),
        "end is missing": (whole[: 2 * EACH], whole[: 2 * EACH + 100]),
        "goes on after its end": (whole[: 2 * EACH + 700],),
    }
    for said, contents in cases.items():
        for content in contents:
            path, within = tmp_path / "y.tar", Member("n01.tar", 1024, len(content)) if inner else None
            path.write_bytes(bytes(1024) + content + bytes(2048) if inner else content)
            with pytest.raises(InputError, match=rf"y\.tar.* is not a whole, uncompressed tar file \(.*{said}"):
                list(members(path, within))


@pytest.mark.parametrize(("kind", "said"), [(tarfile.LNKTYPE, "a link to 0"), (tarfile.SYMTYPE, "a link to 0"),
                                            (tarfile.GNUTYPE_SPARSE, "stored with its holes left out")])  # fmt: skip
def test_a_link_in_the_place_of_an_image_is_not_passed_over(tmp_path: Path, kind: bytes, said: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        info = tarfile.TarInfo("1.jpg")
        info.type, info.linkname = kind, "0.jpg"
        archive.addfile(info)
    with pytest.raises(InputError, match=rf"x\.tar: 1\.jpg is {said}"):
        list(members(tmp_path / "x.tar"))


def test_a_tar_file_that_is_gone_and_a_member_that_cannot_be_an_image_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.tar").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"x\.tar cannot be read \(No such file"):
        fingerprint_tars([tmp_path / "x.tar"])
    places = Places.of(tmp_path, (tmp_path / "x.tar",), [Place("a", 0, 0, 0, LARGEST_FILE + 1, 0)])
    with pytest.raises(OSError, match="bytes, more than"):
        places.read(0)


def test_a_tar_file_that_is_replaced_while_it_is_read_is_not_read_at_the_old_places(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    _tar(path, ["0.jpg"])
    (found,) = members(path)
    place = Place(found.name, 0, 0, found.offset, found.size, path.stat().st_mtime_ns)
    places = Places.of(tmp_path, (path,), [place])
    assert places.read(0) == b"\x01" * FILE_BYTES
    os.utime(path, ns=(0, place.changed + 1))
    with pytest.raises(InputError, match=r"x\.tar has changed while images of it were written"):
        places.read(0)
