"""A reference picture as the identity methods see it: the real chain, over a pack's own files.

insightface finds the face, the parser greys it, EVA and PuLID make tokens of it; the judge recogniser says afterwards whose face a
picture shows. For measuring; serving has deployments of its own for this.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from insightface.model_zoo import get_model
from insightface.utils import face_align
from numpy.typing import NDArray
from torch import Tensor

from deployments.identity.eva_clip import load_eva
from deployments.identity.pulid import PuLID, eva_pixels, face_to_grey, identity_condition
from training.mini.faces import parser, recognisers
from training.mini.faces.verification import Pictures, Run, face_analysis, open_session
from training.mini.world.landmarks import FFHQ_512

_FFHQ_PX = 512


class Sitting:
    """The face models of a pack. Pictures are uint8 RGB [n, H, W, 3]; of each the largest face counts."""

    def __init__(self, pack: Path) -> None:
        self.analysis = face_analysis(pack)
        self.judge = get_model(str((pack / "judge" / "arcface_judge.onnx").resolve()), providers=["CPUExecutionProvider"])
        self.parser: Run = open_session(pack / "parser" / parser.FORM.file)
        self.eva = load_eva(pack / "eva-clip" / "eva_clip_mini.safetensors")

    def judged(self, pictures: Pictures) -> NDArray[np.float32]:
        """[n, 512] unit embeddings by the judge, which conditions nothing; a row of NaN where there is no face."""
        rows = np.full((len(pictures), recognisers.EMBEDDING), np.nan, np.float32)
        for index, picture in enumerate(pictures):
            points = self._points(picture)
            if points is not None:
                raw = self.judge.get_feat([face_align.norm_crop(_bgr(picture), points, recognisers.CROP_PX)])[0]
                rows[index] = raw / np.linalg.norm(raw)
        return rows

    @torch.no_grad()
    def tokens(self, pictures: Pictures, pulid: PuLID) -> Tensor:
        """[n, queries, width]: PuLID's identity tokens. Raises ValueError naming the first picture without a face."""
        conditions = [self._condition(index, picture) for index, picture in enumerate(pictures)]
        device = next(pulid.parameters()).device
        faces = torch.cat([face for face, _ in conditions])
        embedding, states = self.eva(eva_pixels(faces, self.eva.config.image_size))
        recognised = torch.stack([vector for _, vector in conditions])
        return pulid(identity_condition(recognised, embedding).to(device), [state.to(device) for state in states])  # type: ignore[no-any-return]

    def _condition(self, index: int, picture: Pictures) -> tuple[Tensor, Tensor]:
        """The grey aligned face [1, 3, 512, 512] in 0..1, and the raw (un-normalised) conditioning embedding [512]."""
        points = self._points(picture)
        if points is None:
            raise ValueError(f"reference picture {index} shows no face that the detector finds; use another picture")
        crop = face_align.norm_crop(_bgr(picture), points, recognisers.CROP_PX)
        vector = self.analysis.models["recognition"].get_feat([crop])[0]
        # LMEDS, as facexlib's align_warp_face; grey beyond the picture's border (RGB order of its 135, 133, 132).
        affine, _ = cv2.estimateAffinePartial2D(points, np.array(FFHQ_512, np.float32), method=cv2.LMEDS)
        aligned = cv2.warpAffine(picture, affine, (_FFHQ_PX, _FFHQ_PX), borderMode=cv2.BORDER_CONSTANT, borderValue=(132, 133, 135))
        rgb = torch.from_numpy(aligned).permute(2, 0, 1)[None].float() / 255
        labels = torch.from_numpy(self.parser(parser.normalised(rgb * 2 - 1).numpy())[0].argmax(1))
        return face_to_grey(rgb, labels), torch.from_numpy(vector)

    def _points(self, picture: Pictures) -> NDArray[np.float32] | None:
        boxes, points = self.analysis.det_model.detect(_bgr(picture), max_num=1, metric="max")
        return np.asarray(points[0], np.float32) if len(boxes) else None


def _bgr(picture: Pictures) -> Pictures:
    return np.ascontiguousarray(picture[..., ::-1])


def cosines(embeddings: NDArray[np.float32], references: NDArray[np.float32]) -> tuple[list[float], float]:
    """Row by row the cosine of unit embeddings, 0 where there is no face, and the share of pictures without one."""
    values = (embeddings * references).sum(1)
    missing = np.isnan(values)
    return [float(v) for v in np.where(missing, 0.0, values)], float(missing.mean())


def mean_interval(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Mean with a 95 % bootstrap interval (2,000 resamples)."""
    sample = np.asarray(values)
    draws = np.random.default_rng(seed).choice(sample, (2000, len(sample))).mean(1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return {"mean": round(float(sample.mean()), 4), "low": round(float(low), 4), "high": round(float(high), 4), "n": len(sample)}
