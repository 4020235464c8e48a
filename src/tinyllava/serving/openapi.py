"""What ``/openapi.json`` says: the request, the errors that an answer may be, and the key.

Paper: none. The routes read bodies by themselves, with errors in OpenAI's form, so FastAPI cannot tell.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from tinyllava.serving.schema import ChatRequest

_ERRORS = {
    400: "The request, an image or its length is refused.",
    401: "A key is missing or wrong.",
    403: "The request names another host.",
    404: "No such model.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too many requests; Retry-After has the seconds to wait.",
    500: "The model failed.",
    504: "The request took too long.",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_ALWAYS = (401, 403)
_OF_PATH: dict[str, tuple[int, ...]] = {
    "/v1/chat/completions": (400, 404, 413, 415, 429, 500, 504),
    "/v1/models/{name}": (404,),
}


def describe(app: FastAPI, *, has_keys: bool) -> None:
    """Let an application describe itself in full."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _describe(app, has_keys)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI documents it


def _describe(app: FastAPI, has_keys: bool) -> dict[str, Any]:
    said: dict[str, Any] = get_openapi(title=app.title, version=app.version, routes=app.routes)
    request = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas = said.setdefault("components", {}).setdefault("schemas", {})
    schemas |= {**request.pop("$defs"), "ChatRequest": request, "Error": _ERROR}
    for path, methods in said["paths"].items():
        for operation in methods.values():
            codes = (*_OF_PATH.get(path, ()), *_ALWAYS)
            operation["responses"] = {
                code: value for code, value in operation["responses"].items() if code != "422"
            }
            for code in sorted(codes):
                operation["responses"][str(code)] = {
                    "description": _ERRORS[code],
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                }
    chat = said["paths"]["/v1/chat/completions"]["post"]
    chat["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ChatRequest"}}},
    }
    answer = {"type": "object", "required": ["id", "object", "created", "model", "choices"]}
    chat["responses"]["200"]["content"] = {
        "application/json": {"schema": answer},
        "text/event-stream": {"schema": {"type": "string"}},
    }
    said["paths"]["/metrics"]["get"]["responses"]["200"]["content"] = {
        "text/plain": {"schema": {"type": "string"}}
    }
    if has_keys:
        said["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        said["security"] = [{"key": []}]
    return said
