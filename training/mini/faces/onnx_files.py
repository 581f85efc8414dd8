"""`python -m training.mini.faces.onnx_files FOLDER`: the ONNX files of all face models from their safetensors.

For workspaces that were trained where ONNX's packages are not installed; the same bytes as training would have written.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from torch import nn

from training.mini.faces import attributes, body_keypoints, detector, gender_age, parser, recognisers
from training.mini.faces.artefacts import OnnxForm, write_onnx

MODELS: dict[str, tuple[Callable[[Path], nn.Module], OnnxForm]] = {
    recognisers.CONDITIONING.name: (recognisers.load_recogniser, recognisers.CONDITIONING.form),
    recognisers.JUDGE.name: (recognisers.load_judge, recognisers.JUDGE.form),
    detector.NAME: (detector.load_detector, detector.FORM),
    parser.NAME: (parser.load_parser, parser.FORM),
    gender_age.NAME: (gender_age.load_gender_age, gender_age.FORM),
    body_keypoints.NAME: (body_keypoints.load_body_keypoints, body_keypoints.FORM),
    attributes.NAME: (attributes.load_attributes, attributes.FORM),
}
"""Name of the safetensors -> how it is loaded, and the outside of its ONNX file."""


def write_all(folder: Path) -> dict[str, float]:
    """Writes the ONNX file of every model whose safetensors lie in the folder; file -> the difference that fp16 storage made.

    Raises FileNotFoundError if there is none.
    """
    present = {name: model for name, model in MODELS.items() if (folder / f"{name}.safetensors").is_file()}
    if not present:
        raise FileNotFoundError(f"{folder} holds none of {', '.join(f'{name}.safetensors' for name in MODELS)}: train a face stage first")
    return {form.file: write_onnx(load(folder / f"{name}.safetensors"), form, folder) for name, (load, form) in present.items()}


def main() -> None:
    arguments = argparse.ArgumentParser("training.mini.faces.onnx_files", description=__doc__)
    arguments.add_argument("folder", type=Path, help="a workspace of training.mini.train")
    for file, difference in write_all(arguments.parse_args().folder).items():
        print(f"{file:20s} storing the weights as fp16 changed an output by at most {difference:.1e}")


if __name__ == "__main__":
    main()
