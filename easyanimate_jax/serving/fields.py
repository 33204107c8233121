"""The fields of a request over HTTP, made from the one table of options: `SampleRequest`.

A field has the option's name with `_` for `-`. Some have a second name, by which OpenAI's clients
and those of other servers know them. Values come as JSON or as text of a form; the option's type
says how a text is read.
"""

import ast
import base64
import binascii
import dataclasses
import inspect
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

from easyanimate_jax.data.buckets import whole_frames
from easyanimate_jax.data.decode import decoders
from easyanimate_jax.generation.request import FILES, SampleRequest, check
from easyanimate_jax.serving.engine import LORA, Settings, request_of
from easyanimate_jax.serving.store import Store

ALIASES = {
    "num_frames": "frames",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
}
OTHERS = ("model", LORA, "seconds", "size", "input_reference", "user")  # not in the table
WRITTEN = ("trajectory", "camera")  # files that may also be given as text
TYPES = get_type_hints(SampleRequest)
SIZE = re.compile(r"(\d{1,5})x(\d{1,5})", re.ASCII)
DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+(?:;[\w.+=-]+)*?;base64,", re.ASCII)
MOST_CHARACTERS = 10_000  # of a text
MOST_WEIGHT = 100.0  # of a LoRA
NAMES = {Path: "file", str: "text", int: "whole number", float: "number"}


class Fault(Exception):
    """A request that is refused: its HTTP status, message, field and code."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str = "invalid"):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


class Field(NamedTuple):
    """One field of a request: its name, type, choices, default and help text."""

    name: str
    kind: type  # str, int, float, Path for a file, or tuple for two numbers
    choices: tuple[str, ...]  # of a text; empty if any is allowed
    default: object
    help: str


def table() -> list[Field]:
    """Return the fields of a request in the order of the options."""
    body = ast.parse(inspect.getsource(SampleRequest)).body[0].body
    helps = [node.value.value for node in body if isinstance(node, ast.Expr)][1:]
    options = dataclasses.fields(SampleRequest)
    return [_field(one, text) for one, text in zip(options, helps, strict=True)]


def _field(option: dataclasses.Field, text: str) -> Field:
    kind, choices = TYPES[option.name], ()
    if get_origin(kind) is Literal:
        kind, choices = str, get_args(kind)
    elif get_origin(kind) is tuple:
        kind = tuple
    elif option.name in FILES:
        kind = Path
    elif get_args(kind):  # X | None
        kind = next(one for one in get_args(kind) if one is not NoneType)
    return Field(option.name, kind, choices, option.default, text)


FIELDS = {field.name: field for field in table()}


def described() -> dict:
    """Return the description of a request's fields for OpenAPI."""
    kinds = {str: "string", int: "integer", float: "number", tuple: "array", Path: "string"}
    properties = {}
    for field in FIELDS.values():
        one = properties[field.name] = {"type": kinds[field.kind], "description": field.help}
        if field.kind is Path:
            one["format"] = "binary"
        if field.choices and field.name != "size":
            one["enum"] = list(field.choices)
    schema = {"type": "object", "required": ["prompt"], "properties": properties}
    return {"requestBody": {"content": {"multipart/form-data": {"schema": schema}}}}


def parse(given: Mapping[str, object], store: Store, id: str, rate: int) -> dict:
    """Return the set fields of a `SampleRequest`; files are written to the job's folder.

    `rate` is the model's frames per second.

    `given` holds JSON values, texts of a form, and files as `bytes`. The value of a file in the
    result is its name in the folder. Raises Fault for what is not understood.
    """
    fields, first = {}, {}

    def put(name: str, value, said: str) -> None:
        if name in fields:
            raise Fault(400, f"{first[name]} and {said} say the same: give one of them", said)
        fields[name], first[name] = value, said

    for said, value in given.items():
        name = ALIASES.get(said, said)
        if value is None or said in ("model", "user"):
            continue
        if said == "size" and value not in FIELDS["size"].choices:
            match = SIZE.fullmatch(value) if isinstance(value, str) else None
            if match is None:
                raise Fault(400, f"size is {value!r}: give WIDTHxHEIGHT, such as 672x384", "size")
            put("width", int(match[1]), said)
            put("height", int(match[2]), said)
        elif said == "seconds":
            put("seconds", read(Field(said, float, (), None, ""), value), said)
        elif said == LORA:
            put(said, read_loras(value), said)
        elif said == "input_reference":
            put("input_reference", content(value, said), said)
        elif name not in FIELDS:
            known = ", ".join([*OTHERS, *FIELDS])
            raise Fault(400, f"there is no field {said!r}; the fields are {known}", said)
        elif FIELDS[name].kind is Path:
            put(name, content(value, said), said)
        else:
            put(name, read(FIELDS[name], value), said)
    if "seconds" in fields:
        if "frames" in fields:
            raise Fault(400, "seconds and num_frames say the same: give one of them", "seconds")
        seconds, rate = fields.pop("seconds"), fields.get("fps", rate)
        if not 0 <= seconds <= 86400:
            raise Fault(400, f"seconds is {seconds:g}: give 0 to 86400", "seconds")
        fields["frames"] = whole_frames(int(seconds * rate) + 1)
    return place(fields, store.uploads / id)


def place(fields: dict, folder: Path) -> dict:
    """Write the files of a request to `folder`; return the fields with the files' names."""
    fields = dict(fields)
    if "input_reference" in fields:
        folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / "input_reference"
        path.write_bytes(fields.pop("input_reference"))
        try:
            kind = decoders().probe(path).kind  # "image" or "video", as the fields are called
        except ValueError as error:
            raise Fault(415, clean(str(error), folder), "input_reference") from error
        if kind in fields:
            raise Fault(400, f"input_reference and {kind} say the same: give one", kind)
        path.rename(folder / kind)
        fields[kind] = kind
    for name in FILES:
        if isinstance(fields.get(name), bytes):
            folder.mkdir(mode=0o700, exist_ok=True)
            (folder / name).write_bytes(fields[name])
            fields[name] = name
    return fields


def read(field: Field, value):
    """Return a field's value from JSON or from the text of a form. Raises Fault."""
    name = field.name
    text = value.strip() if isinstance(value, str) else value
    if field.kind is str:
        if not isinstance(value, str) or len(value) > MOST_CHARACTERS:
            raise Fault(400, f"{name}: give a text of at most {MOST_CHARACTERS} characters", name)
        if field.choices and value not in field.choices:
            raise Fault(400, f"{name} is {value!r}: use {' or '.join(field.choices)}", name)
        return value
    try:
        if isinstance(text, str):
            text = json.loads(f"[{text}]" if field.kind is tuple and text[:1] != "[" else text)
        if field.kind is tuple:
            low, high = text
            return number(low, float), number(high, float)
        return number(text, field.kind)
    except (ValueError, TypeError, RecursionError):
        wanted = "two numbers" if field.kind is tuple else f"a {NAMES[field.kind]}"
        raise Fault(400, f"{name} is {str(value)[:80]!r}: give {wanted}", name) from None


def read_loras(value) -> list[list]:
    """Return [name, weight] of each LoRA in a text such as "style:0.8, face", or in a list of such.

    The weight is 1 if it is left out; a LoRA of weight 0 is left out. Raises Fault.
    """
    words = value.split(",") if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise Fault(400, 'lora: give names and weights, such as "style:0.8, face"', LORA)
    found = []
    for word in filter(None, map(str.strip, words)):
        name, colon, weight = word.rpartition(":")
        try:
            weight = float(weight) if colon else 1.0
        except ValueError:
            weight = math.nan
        if not abs(weight) <= MOST_WEIGHT:
            raise Fault(400, f"lora {word[:80]!r}: give a weight such as 0.8 behind the name", LORA)
        if weight:
            found.append([name if colon else word, weight])
    return found


def number(value, kind: type) -> int | float:
    """Return a JSON number as `kind`. Raises ValueError for other values."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 2**53:
        raise ValueError
    if kind is int and value != int(value):
        raise ValueError
    return kind(value)


def content(value, name: str) -> bytes:
    """Return the bytes of a file from an upload, a data URL, or a text where one is allowed."""
    if isinstance(value, Mapping) and set(value) <= {"image_url", "type"}:
        value = value.get("image_url")
        value = value.get("url") if isinstance(value, Mapping) else value
    if name in WRITTEN and isinstance(value, list):
        return json.dumps(value).encode()
    if isinstance(value, str):
        match = DATA_URL.match(value[:200])
        if match:
            try:
                return base64.b64decode(value[match.end() :], validate=True)
            except binascii.Error:
                raise Fault(400, f"{name}: the data URL is not base64", name) from None
        if name in WRITTEN:
            return value.encode()
        value = None
    if not isinstance(value, bytes):
        raise Fault(
            400, f"{name}: give a file, or a data URL; nothing is fetched from the network", name
        )
    return value


def told(message: str, store: Store, id: str, settings: Settings) -> str:
    """Return a message of the library in the words of the API, without a path of the server."""
    for name, path in settings.models.items():
        message = message.replace(path, name)
    return clean(message, store.uploads / id)


def clean(message: str, folder: Path) -> str:
    """Return a message without the path of a job's folder; options become fields."""
    message = message.replace(f"{folder}/", "")
    return re.sub(r"--([a-z][a-z-]*)", lambda match: match[1].replace("-", "_"), message)


def field_of(message: str) -> str | None:
    """Return the field that a message of the library names as an option, or None."""
    match = re.search(r"--([a-z][a-z-]*)", message)
    return match and match[1].replace("-", "_")


def checked(fields: dict, store: Store, id: str) -> SampleRequest:
    """Return the request of parsed fields. Raises ValueError if no model could serve it."""
    request = request_of(fields, store.folder, id)
    check(request)
    return request
