"""Image files of the kinds that people's folders hold, made on the spot."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, height: int = 30, width: int = 40) -> Image.Image:
    """A smooth RGB picture."""
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def good(folder: Path) -> None:
    """One of each kind that can be read, each of another shape."""
    folder.mkdir(parents=True, exist_ok=True)
    picture(0).save(folder / "plain.jpg", quality=95)
    picture(1, 33, 21).convert("L").save(folder / "gray.JPG")
    picture(2, 24, 51).convert("CMYK").save(folder / "print.jpeg")
    picture(3, 41, 23).save(folder / "really_a.jpg", format="PNG")
    picture(4, 28, 45).convert("P").save(folder / "palette.png")
    picture(5, 29, 36).convert("RGBA").save(folder / "clear.png")
    picture(6, 27, 39).save(folder / "progressive.jpg", progressive=True)
    picture(7, 40, 26).save(folder / "moving.webp", save_all=True, append_images=[picture(8, 40, 26)], lossless=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(9, 22, 48).save(folder / "turned.jpg", exif=turned)
    picture(10, 31, 31).save(folder / "old.bmp")


def bad(folder: Path) -> list[str]:
    """One of each kind that cannot be read; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "zero.jpg").touch()
    picture(0, 300, 400).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:3000])
    (folder / "text.png").write_text("<html>404</html>")
    (folder / "gone.jpg").symlink_to("nowhere")
    picture(1).save(folder / "chunk.png")
    content = (folder / "chunk.png").read_bytes()
    at = content.rindex(b"IEND") - 4
    short = struct.pack(">I", 0) + b"iCCP" + struct.pack(">I", zlib.crc32(b"iCCP"))
    (folder / "chunk.png").write_bytes(content[:at] + short + content[at:])
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(folder / "real.tif")
    return sorted(path.name for path in folder.iterdir())
