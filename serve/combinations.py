"""`python -m serve.combinations > docs/combinations.md`: the catalogue's table of combinations, as a page. Knows no model."""

from __future__ import annotations

from deployments.catalog import Catalog, Combination, load_catalog

_HEAD = """# What goes together

Written by `python -m serve.combinations` from `configs/catalog.yaml`; `GET /v1/workflows` shows the same. What is not allowed is refused
before any model is touched, with the reason. Beside the methods of identity: `loras`; `controls` (pose, edges, depth, ...); `image`, a
picture to begin from; `true_cfg`; `people`, several in one picture; `masks` and regions, where each of them is.
"""


def page(catalog: Catalog) -> str:
    """Markdown: a table for each family of base models, refusals first."""
    families = list(dict.fromkeys(rule.base_family for rule in catalog.combinations))
    parts = [_HEAD]
    for family in families:
        rules = sorted((rule for rule in catalog.combinations if rule.base_family == family), key=lambda rule: rule.works)
        parts.append(f"\n## {family}\n\n| | | | |\n|---|---|---|---|\n" + "".join(map(_row, rules)))
    for refusal in catalog.refusals:
        parts.append(f"\n{refusal.method} does not work on {refusal.base_family}: {refusal.reason} {refusal.instead}\n")
    return "".join(parts)


def _row(rule: Combination) -> str:
    note = rule.note if rule.works else f"{rule.note} {rule.instead}"
    return f"| `{rule.first}` | `{rule.second}` | {'yes' if rule.works else '**no**'} | {note} |\n"


if __name__ == "__main__":
    print(page(load_catalog()), end="")
