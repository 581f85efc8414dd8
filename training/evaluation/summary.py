"""What an evaluation found, as one JSON document, and the files that show it: a table, grids, a plot. Measures nothing itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deployments.catalog import Catalog, load_catalog
from deployments.errors import UnknownModel
from deployments.weights import WeightFolder
from training.evaluation import grid, plot
from training.evaluation.figures import by_slice, differences, differences_by_framing, figures, photographs
from training.evaluation.rows import Row
from training.evaluation.run import Evaluation
from training.evaluation.table import markdown


def summary(evaluation: Evaluation) -> dict[str, Any]:
    """Everything that is reported; numbers unrounded. Equal rows give an equal summary."""
    plan, configurations = evaluation.plan, by_configuration(evaluation)
    labels = {item.name: item.label for item in plan.configurations}
    catalog = load_catalog()
    models = [*dict.fromkeys([*(model for row in evaluation.rows for model in row.models), *evaluation.judges])]
    return {
        "description": plan.description,
        "judge": plan.faces.judge,
        "threshold": plan.threshold,
        "seeds": list(plan.seeds),
        "prompts": [prompt.name for prompt in plan.prompts],
        "subjects": {name: photographs(person) for name, person in evaluation.known.items()},
        "loras": {name: person.subject.lora_sha256 for name, person in evaluation.known.items() if person.subject.lora is not None},
        "configurations": {
            name: {
                "label": labels[name],
                "all": figures(rows, evaluation.known, plan.threshold),
                **by_slice(rows, evaluation.known, plan.threshold),
            }
            for name, rows in configurations.items()
        },
        "differences": differences(configurations),
        "differences_by_framing": differences_by_framing(configurations),
        "left_out": dict(evaluation.left_out),
        "plan": plan.model_dump(mode="json"),
        "models": {model: hashes(catalog, model) for model in models},
    }


def by_configuration(evaluation: Evaluation) -> dict[str, Sequence[Row]]:
    """In the plan's order; those that were left out are not there."""
    found = {item.name: [row for row in evaluation.rows if row.key.configuration == item.name] for item in evaluation.plan.configurations}
    return {name: rows for name, rows in found.items() if rows}


def write(evaluation: Evaluation) -> dict[str, Any]:
    """The summary, after everything beside the rows was written from it."""
    found, folder = summary(evaluation), evaluation.folder
    (folder / "summary.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(markdown(found), encoding="utf-8")
    grid.write(evaluation, folder / "grid.png", folder / "grid_small.png")
    plot.write(found, by_configuration(evaluation), folder / "plot.png")
    return found


def hashes(catalog: Catalog, model: str) -> Mapping[str, str | None]:
    """file -> sha256, as the catalogue pins them; None where it leaves that to the hub. Empty for a model that it does not know."""
    try:
        entry = catalog.entry(model)
    except UnknownModel:
        return {}
    files = [file for weight in entry.weights.values() for file in (weight.files if isinstance(weight, WeightFolder) else (weight,))]
    return {file.file: file.sha256 for file in files}


def files(folder: Path) -> list[Path]:
    """What lies in a folder after `write`."""
    return [folder / name for name in ("table.md", "summary.json", "scores.csv", "grid.png", "grid_small.png", "plot.png")]
