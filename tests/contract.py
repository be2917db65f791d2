"""The OpenAPI document as a judge: whether a request's answer is one that it tells of."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re

import jsonschema

import monitor

CONFIG = monitor.Config.load({"MONITOR_DB": "sqlite::memory:"})


def document(config: monitor.Config = CONFIG) -> dict:
    """The document of a server with these settings."""
    routes = itertools.starmap(monitor.Route, monitor.ROUTES)
    return json.loads(monitor.dump(monitor.openapi(routes, config, "monitor_session_3000")))


def pattern(validator, text, instance, schema):
    """`pattern` as ECMAScript has it: `$` is the end, not also the line feed before it."""
    if isinstance(instance, str) and not re.search(re.sub(r"\$(?=$|\))", r"\\Z", text), instance):
        yield jsonschema.ValidationError(f"{instance[:80]!r} does not match {text!r}")


Validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"pattern": pattern})


@functools.cache
def strict() -> dict:
    """The document with its objects closed: an answer with a field that it does not tell of fails, too."""
    found = copy.deepcopy(document())
    for schema in found["components"]["schemas"].values():
        if "properties" in schema and "$ref" not in schema:
            schema["additionalProperties"] = False
    return found


@functools.cache
def validator(schema: str):
    """What judges by a schema of the document, which is given as JSON."""
    return Validator(json.loads(schema) | {"components": strict()["components"]})


def failures(schema: dict, value) -> list[str]:
    """What is wrong with a value, by a schema of the document. Of a long list both its ends are looked at."""
    if isinstance(value, dict) and len(value.get("items", ())) > 10:
        value = value | {"items": value["items"][:5] + value["items"][-5:]}
    errors = validator(json.dumps(schema)).iter_errors(value)
    return [f"{error.json_path}: {error.message[:300]}" for error in errors]


@functools.cache
def operations() -> list[tuple[re.Pattern, str, dict]]:
    """(path, its words as they are written, its methods), the ones without parameters first."""
    paths = sorted(strict()["paths"].items(), key=lambda each: each[0].count("{"))
    patterns = (re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(path)) for path, _ in paths)
    return [
        (re.compile(pattern), path, methods) for pattern, (path, methods) in zip(patterns, paths, strict=True)
    ]


def complaints(method: str, path: str, response) -> list[str]:
    """Where an answer to a request differs from what the document says of it."""
    path = path.partition("?")[0]
    operation = next(
        (methods.get(method.lower()) for known, _, methods in operations() if known.fullmatch(path)), None
    )
    if operation is None:  # a page, or nothing that there is
        undescribed = path.startswith("/api/") and response.status_code < 400 and method in ("GET", "POST")
        return [f"{method} {path} is not described, and answers {response.status_code}"] * undescribed
    status = operation["responses"].get(str(response.status_code))
    if status is None:
        return [f"{method} {path} answers {response.status_code}: {response.text[:200]}"]
    if "$ref" in status:
        status = strict()["components"]["responses"][status["$ref"].split("/")[-1]]
    return content_complaints(status.get("content", {}), response)


def content_complaints(content: dict, response) -> list[str]:
    """The same for its body."""
    media = response.headers.get("Content-Type", "").partition(";")[0]
    if not content:
        return ["there is a body"] if response.content else []
    if media not in content:
        return [f"{media} is not one of {', '.join(content)}"]
    if media == "application/x-ndjson":
        lines = [json.loads(line) for line in response.text.splitlines() if line]
        named = [{line["event"]: line["data"]} for line in lines if "event" in line]
        kind = "Events" if named else "Update"
        schema = {"$ref": f"#/components/schemas/{kind}"}
        return [fault for line in (named or lines) for fault in failures(schema, line)]
    return failures(content[media]["schema"], response.json()) if media == "application/json" else []
