"""`python -m benchmarks.curation [--pictures 120] [--size 1024] [--workers 2]`: how fast a folder of pictures becomes a dataset.

Pictures of the character world at the size of photographs, as JPEG files, with groups among them, through the embedded face models.
Prints pictures a minute by the clock and CPU seconds a picture, which another load on the machine does not change: on two cores 200
pictures a minute are 0.6 CPU seconds each. The published face models are larger than mini's; their share is not in these figures. `curate`
is the whole way to a dataset; `looked_at` the first pass alone; `again` the whole way over a folder that was curated before.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image

from deployments.face_server import FaceSettings
from training.dataset.analyse import analyse
from training.dataset.curate import curate
from training.dataset.search import FaceFinder
from training.dataset.settings import CurationSettings
from training.dataset.sources import PictureSource, from_bytes
from training.mini.heldout import character_identity
from training.mini.world.groups import paint_group, sample_group
from training.mini.world.render import render
from training.mini.world.scene import sample_scenes

_MINI = FaceSettings(faces="faces-mini", judge="face-judge-mini", parser="face-parser-mini")
_SEED = 940_000
_GROUP_EVERY, _OTHER_EVERY = 6, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=120)
    parser.add_argument("--size", type=int, default=1024, help="side in pixels")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(measured(options.pictures, options.size, options.workers)))


def measured(pictures: int, size: int, workers: int) -> dict[str, object]:
    """size: side of a picture in pixels. CPU seconds are of this process, all threads together."""
    sources, finder = folder_of(pictures, size), FaceFinder.of(_MINI)
    settings = CurationSettings(workers=workers)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder)
        figures = {
            "looked_at": _timed(lambda: analyse(sources, finder, workers=workers), pictures),
            "curate": _timed(lambda: curate(sources, whole, finder, settings), pictures),
            "again": _timed(lambda: curate(sources, whole, finder, settings), pictures),
        }
    return {"pictures": pictures, "size": size, "workers": workers, **figures}


def folder_of(pictures: int, size: int) -> tuple[PictureSource, ...]:
    """Ada in most of them, Bruno in a quarter, both in a sixth."""
    return from_bytes([(f"{number:04}.jpg", _jpeg(number, size)) for number in range(pictures)])


def _jpeg(number: int, size: int) -> bytes:
    ada, bruno = character_identity("Ada"), character_identity("Bruno")
    if number % _GROUP_EVERY == 1:
        picture = paint_group(torch.cat([ada, bruno])[None], sample_group(1, 2, _SEED + number), size).picture
    else:
        person = bruno if number % _OTHER_EVERY == 2 else ada
        picture = render(person, sample_scenes(1, _SEED + number), size)
    stream = BytesIO()
    pixels = ((picture[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _timed(run: Callable[[], object], pictures: int) -> dict[str, float]:
    clock, cpu = time.perf_counter(), time.process_time()
    run()
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    return {"pictures_a_minute": round(60 * pictures / clock, 1), "cpu_seconds_a_picture": round(cpu / pictures, 3)}


if __name__ == "__main__":
    main()
