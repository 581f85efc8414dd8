"""`python docs/examples/handle.py`: Likeness from another Ray program on the same cluster, without HTTP.

`likeness serve` (or `serve deploy configs/serve/...`) has to run. The handle's methods are those of serve.workflows.Workflows: bodies are
the same as over HTTP, answers are the same objects, errors are raised as what they are.
"""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path

import ray
import ray.serve

_ROOT = Path(__file__).resolve().parents[2]


def main(out: Path) -> None:
    ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False)
    likeness = ray.serve.get_deployment_handle("Workflows", app_name="likeness")
    reference = base64.b64encode((_ROOT / "samples" / "characters" / "hugo-1.png").read_bytes()).decode()
    body = {
        "prompt": "a portrait of a smiling person in a park with warm light",
        "reference_image": reference,
        "seed": 3,
        "style": "stylized",
    }
    # Both are on their way before either is awaited; the second one waits for the denoiser, not for this program.
    answers = [likeness.generate.remote("flux-pulid", body | {"seed": seed}) for seed in (3, 4)]
    for answer in (pending.result() for pending in answers):
        picture = answer.data[0]
        print(picture.save(out / f"handle-{picture.seed}.png"), f"likeness {picture.scores[0].cosine:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("out"))
