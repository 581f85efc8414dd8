"""From a request type to a subcommand: one option a field, its help the field's own. Knows typer, and no workflow by name."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from deployments.errors import InvalidRequest
from serve.attachments import PICTURE_FIELDS

_PICTURES = "reference_images"
_LORAS, _CONTROLS = "loras", "controls"
# One way on the command line for what a body may say in several: people with all that is theirs come as --body.
_LEFT_OUT = frozenset({"reference_image", "identity", "identities", "response_format"})
_FIRST = ("prompt", _PICTURES, "workflow")
_SHORT: Mapping[str, str] = {"prompt": "-p", _PICTURES: "-r", "seed": "-s", "n": "-n", "size": "-S", "workflow": "-w"}
_SPELT: Mapping[str, tuple[str, ...]] = {
    _PICTURES: ("--reference-image", "--reference"),
    "num_inference_steps": ("--steps", "--num-inference-steps"),
    _LORAS: ("--lora",),
    _CONTROLS: ("--control",),
}
_TEXTS: Mapping[str, str] = {
    _PICTURES: "A picture of the person (PNG, JPEG, WebP). Give it again for more pictures of the same person; see --blend.",
    _LORAS: "ID or ID:SCALE of a LoRA (`likeness loras list`). Give it again for more.",
    _CONTROLS: "TYPE=PICTURE, like canny=house.jpg. Give it again for more; scales, windows and edits come in --body.",
}

Run = Callable[[dict[str, Any]], None]


def command(request: type[BaseModel], run: Run, extra: Mapping[str, Any]) -> Callable[..., None]:
    """A function that typer makes a command of: every field of `request` as an option that is None where it is not given, then `extra`.

    run: gets the values by field name, those not given left out. extra: further parameters, name -> an Annotated type with its default.
    """

    def body(**values: Any) -> None:
        given = {name: value for name, value in values.items() if value is not None and value != []}
        run({name: [_READ[name](item) for item in value] if name in _READ else value for name, value in given.items()})

    names = [*(name for name in _FIRST if name in request.model_fields), *(name for name in request.model_fields if name not in _FIRST)]
    parameters = [_option(name, request.model_fields[name]) for name in names if name not in _LEFT_OUT]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in extra.items()
    ]
    body.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    body.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return body


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    flags = list(_SPELT.get(name, (f"--{name.replace('_', '-')}",)))
    annotation = _plain(field.annotation)
    if annotation is bool:
        flags[0] += f"/--no-{name.replace('_', '-')}"
    if name in _SHORT:
        flags.append(_SHORT[name])
    text = _TEXTS.get(name, field.description or "")
    if field.is_required():
        text = f"{text} [needed, here or in --body]"
    elif field.default not in (None, "") and name not in _TEXTS and field.default_factory is None:
        text = f"{text} [default: {field.default}]"
    info = typer.Option(*flags, help=text, show_default=False)
    kind: Any = Path if name in PICTURE_FIELDS else annotation
    if name in _TEXTS:
        kind = list[Path] if name == _PICTURES else list[str]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info])


def _lora(text: str) -> dict[str, Any]:
    """`ID:SCALE`; a scale that is no number is the server's to refuse."""
    name, _, scale = text.partition(":")
    return {"id": name, **({"scale": scale} if scale else {})}


def _control(text: str) -> dict[str, Any]:
    kind, mark, picture = text.partition("=")
    if not mark:
        raise typer.BadParameter(f"{text!r} is not TYPE=PICTURE, like canny=house.jpg", param_hint="--control")
    return {"type": kind, "image": Path(picture)}


_READ: Mapping[str, Callable[[str], dict[str, Any]]] = {_LORAS: _lora, _CONTROLS: _control}


def _plain(annotation: Any) -> Any:
    """What the command line reads: int, float, bool, str, a choice. Constraints stay with the request type, which checks them."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [_plain(part) for part in get_args(annotation) if part is not type(None)]
        return kinds[0] if len(kinds) == 1 else str
    if get_origin(annotation) is Literal or annotation in (int, float, bool):
        return annotation
    return str


def read_body(path: Path) -> dict[str, Any]:
    """The fields that a file of `--body` holds. Raises InvalidRequest."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # of which JSON is a part
    except (OSError, yaml.YAMLError) as error:
        raise InvalidRequest(f"The file {path} cannot be read: {error}.", "Give a JSON or YAML file with fields of a request.") from error
    if not isinstance(content, dict):
        raise InvalidRequest(f"The file {path} holds no fields.", "Give a JSON or YAML file with fields of a request.")
    return content
