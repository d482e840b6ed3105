"""The routes of version 1, the page, and the description of them all.

What a route does before its own work is the guard's: the body is read when it begins.
"""

import functools
import mimetypes
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from vitreous import __version__
from vitreous.errors import ConfigError, RequestError
from vitreous.server.explaining import draw_overlay
from vitreous.server.guard import Exchange
from vitreous.server.inference import HEADER_LENGTH, VERSION, describe_tensors, read_request, write_answer
from vitreous.server.metrics import CONTENT_TYPE
from vitreous.server.served import Answer
from vitreous.server.service import Current, Service
from vitreous.server.uploads import read_uploads

MapMethod = Literal[
    "attention", "rollout", "relevance", "attention-gradient", "grad-cam", "integrated-gradients", "occlusion"
]

_HERE = Path(__file__).parent
_PAGE = _HERE / "page"


class ClassProbability(BaseModel):
    """A class, and how probable it is."""

    model_config = ConfigDict(populate_by_name=True)
    class_name: str = Field(alias="class")
    probability: float = Field(ge=0, le=1)


class ImageAnswer(BaseModel):
    """What the model says of one image."""

    image: str = Field(description="What the client calls it; its number where it has no name.")
    predictions: list[ClassProbability] = Field(description="The most probable first.")
    labels: list[str] | None = Field(
        description="Where an image may have several classes: those with a probability of 1/2 or more. Else null."
    )
    confidence: float = Field(
        description="The probability of the most probable class; with several labels an image, that of the least sure "
        "label being as it says."
    )
    is_sure: bool | None = Field(description="Whether the confidence reaches the server's threshold; null without one.")


class Error(BaseModel):
    """Why a request was refused."""

    error: str = Field(description="What failed. Expected ... Received: ... What to do.")


_IMAGE_BODY = {
    "required": True,
    "content": {
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image"],
                "properties": {"image": {"type": "string", "format": "binary"}},
            }
        },
    },
}
_TENSOR = {
    "type": "object",
    "required": ["name", "datatype", "shape", "data"],
    "properties": {
        "name": {"const": "images"},
        "datatype": {"const": "UINT8"},
        "shape": {
            "type": "array",
            "items": {"type": "integer"},
            "description": "[B, H, W, C], of the model.",
        },
        "data": {"type": "array", "items": {}, "description": "Values from 0 to 255, flat or nested."},
    },
}
_INFER_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["inputs"],
                "properties": {
                    "id": {"type": "string"},
                    "inputs": {"type": "array", "minItems": 1, "maxItems": 1, "items": _TENSOR},
                    "outputs": {"type": "array", "items": {"type": "object"}},
                },
            }
        },
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    },
}
_REFUSALS = {
    400: "Broken or wrong.",
    401: "The token is missing or wrong.",
    403: "Sent by a page of another site.",
    404: "There is no such thing.",
    405: "Not this method.",
    408: "The body came too slowly.",
    411: "The length of the body is not said.",
    413: "Too many bytes, pixels or images.",
    415: "Not an image, or not of a format that is read.",
    421: "Wrong Host header.",
    500: "A bug; the log has the reason.",
    501: "This server explains nothing.",
    503: "Too busy; try again after Retry-After seconds.",
    504: "Not ready within the deadline.",
}


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns the description of refusals, those of every route included."""
    return {status: {"model": Error, "description": _REFUSALS[status]} for status in (400, 401, 403, 421, *statuses)}


_WITH_BODY = _refusals(408, 411, 413, 415, 503, 504)


def create_app(service: Service) -> FastAPI:
    """Creates the routes.

    Args:
        service: What answers.
    """
    app = FastAPI(
        title="vitreous",
        version=__version__,
        description="Predictions and explanations of one Vision Transformer.",
        docs_url=None,  # that page loads scripts from elsewhere; ours is below
        redoc_url=None,
    )
    _add_errors(app)
    _add_predictions(app, service)
    _add_explanations(app, service)
    _add_inference(app, service)
    _add_pages(app, service)
    return app


def _add_errors(app: FastAPI) -> None:
    """Errors become JSON with `error`, whoever raises them."""

    def answer(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"error": message}, status, headers)

    @app.exception_handler(RequestError)
    async def on_refusal(_: Request, error: RequestError) -> JSONResponse:
        return answer(error.status, str(error), error.headers)

    @app.exception_handler(ConfigError)
    async def on_wrong_value(_: Request, error: ConfigError) -> JSONResponse:
        return answer(400, str(error))

    @app.exception_handler(HTTPException)
    async def on_no_route(request: Request, error: HTTPException) -> JSONResponse:
        message = f"Nothing at {request.method} {request.url.path[:200]!r}. Expected a path of /docs. Received: "
        return answer(error.status_code, f"{message}{error.detail}. See /docs.", dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def on_bug(request: Request, _: Exception) -> JSONResponse:
        return answer(500, f"The server failed. The log says why, at {_exchange(request).request_id}.")

    @app.exception_handler(RequestValidationError)
    async def on_wrong_query(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"][1:]))
        received = repr(first.get("input"))[:100]
        return answer(400, f"Cannot use {name}. {first['msg']}. Received: {name}={received}. See /docs.")


def _exchange(request: Request) -> Exchange:
    exchange: Exchange = request.state.exchange
    return exchange


def _to_json(answer: Answer, current: Current) -> dict[str, Any]:
    return {
        "image": answer.name,
        "predictions": [{"class": name, "probability": share} for name, share in answer.predictions],
        "labels": answer.labels,
        "confidence": answer.confidence,
        "is_sure": current.model.is_sure(answer),
    }


def _add_predictions(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/predict",
        response_model=list[ImageAnswer],
        responses=_WITH_BODY,
        openapi_extra={"requestBody": _IMAGE_BODY},
        tags=["predict"],
    )
    async def predict(request: Request) -> JSONResponse:
        """Classify images: one as the body, or several as the files of a form. An answer for each, in their order."""
        exchange, current = _exchange(request), service.current
        uploads = await read_uploads(exchange.body, request.headers.get("content-type", ""), service.config)
        with service.slots.take():
            answers = await service.compute([functools.partial(current.model.predict, upload) for upload in uploads])
        for answer in answers:
            service.metrics.stage_seconds.labels("decode").observe(answer.decode_seconds)
            service.metrics.stage_seconds.labels("infer").observe(answer.infer_seconds)
        service.metrics.images.inc(len(answers))
        exchange.details |= {
            "images": len(answers),
            "decode_ms": round(1000 * sum(answer.decode_seconds for answer in answers), 2),
            "infer_ms": round(1000 * sum(answer.infer_seconds for answer in answers), 2),
        }
        return JSONResponse([_to_json(answer, current) for answer in answers])

    @app.get("/v1/model", responses=_refusals(), tags=["model"])
    async def model() -> dict[str, Any]:
        """What the model is: classes, input, architecture; what this server explains; which examples it offers."""
        current = service.current
        return {
            **current.model.describe(),
            "why_no_explanations": current.explanations.why_not(),
            "examples": [
                {"name": example.name, "class": example.class_name} for example in await service.find_examples(current)
            ],
        }

    @app.get(
        "/v1/examples/{index}",
        response_class=Response,
        responses={200: {"content": {"image/png": {}}, "description": "PNG."}, **_refusals(404)},
        tags=["model"],
    )
    async def example(index: int) -> Response:
        """An example, by its place in the list of /v1/model."""
        examples = await service.find_examples(service.current)
        if not 0 <= index < len(examples):
            raise RequestError(
                404,
                f"No such example. Expected an index below {len(examples)}. Received: {index}. See /v1/model.",
            )
        return Response(examples[index].png, media_type="image/png")


def _add_explanations(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/explain",
        responses={
            200: {"content": {"application/json": {}, "image/png": {}}, "description": "The map, or its picture."},
            **_WITH_BODY,
            **_refusals(501),
        },
        openapi_extra={"requestBody": _IMAGE_BODY},
        tags=["explain"],
        response_class=Response,
    )
    async def explain(
        request: Request,
        method: MapMethod = "relevance",
        class_name: Annotated[
            str | None, Query(alias="class", description="Name or index. Default: the one that the model answers.")
        ] = None,
        block: Annotated[int | None, Query(description="From 0; -1 is the last. Default: the last.")] = None,
        head: Annotated[int | None, Query(description="From 0. Default: the mean of all.")] = None,
        format: Literal["json", "png"] = "json",
    ) -> Response:
        """What the model looks at: a value for each patch, or the image with these laid over it."""
        current = service.current
        current.explanations.check()
        upload = await _read_one(request, service)
        with service.explain_slots.take():

            def work() -> Response:
                found = current.explanations.explain(upload, method, class_name, block, head)
                if format == "png":
                    return Response(draw_overlay(found), media_type="image/png")
                return JSONResponse(found.to_dict())

            return await service.explain(work)

    @app.post(
        "/v1/look",
        responses={**_WITH_BODY, **_refusals(501)},
        openapi_extra={"requestBody": _IMAGE_BODY},
        tags=["explain"],
    )
    async def look(
        request: Request,
        classes: Annotated[list[str] | None, Query(description="Classes to show the relevance for.")] = None,
    ) -> JSONResponse:
        """All that the page shows of one image: answer, patches, attention of every block and head, relevance."""
        current = service.current
        current.explanations.check()
        upload = await _read_one(request, service)
        with service.explain_slots.take():
            return await service.explain(lambda: JSONResponse(current.explanations.look(upload, classes or [])))

    async def _read_one(request: Request, service: Service) -> Any:
        uploads = await read_uploads(_exchange(request).body, request.headers.get("content-type", ""), service.config)
        if len(uploads) != 1:
            raise RequestError(400, f"Too many images. Expected one. Received: {len(uploads)}. Send one at a time.")
        return uploads[0]


def _add_inference(app: FastAPI, service: Service) -> None:
    def check_name(name: str, version: str | None) -> Current:
        current = service.current
        if name != current.model.name or version not in (None, VERSION):
            raise RequestError(
                404,
                f"No such model. Expected {current.model.name}, version {VERSION}. Received: {name[:100]!r}, version "
                f"{version or VERSION}. Ask /v1/model for its name.",
            )
        return current

    def route(verb: str, path: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Registers a route of the model, with and without a version in its address."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            for address in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
                getattr(app, verb)(address + path, tags=["Open Inference Protocol"], **options)(function)
            return function

        return register

    @app.get("/v2", responses=_refusals(), tags=["Open Inference Protocol"])
    async def server_metadata() -> dict[str, Any]:
        """The server."""
        return {"name": "vitreous", "version": __version__, "extensions": ["binary_tensor_data"]}

    @app.get("/v2/health/live", tags=["Open Inference Protocol"])
    async def live() -> dict[str, bool]:
        """Whether the process answers."""
        return {"live": True}

    @app.get(
        "/v2/health/ready",
        responses={503: {"description": "Not, or no longer."}},
        tags=["Open Inference Protocol"],
    )
    async def ready() -> JSONResponse:
        """Whether requests are wanted: not before the model is loaded, and no longer after SIGTERM."""
        return JSONResponse({"ready": service.is_ready}, 200 if service.is_ready else 503)

    @route("get", "", responses=_refusals(404))
    async def model_metadata(name: str, version: str | None = None) -> dict[str, Any]:
        """The model: its inputs and outputs."""
        current = check_name(name, version)
        tensors = describe_tensors(current.model.engine)
        return {"name": name, "versions": [VERSION], "platform": "vitreous", **tensors}

    @route("get", "/ready", responses=_refusals(404, 503))
    async def model_ready(name: str, version: str | None = None) -> JSONResponse:
        """Whether the model answers."""
        check_name(name, version)
        return JSONResponse({"name": name, "ready": service.is_ready}, 200 if service.is_ready else 503)

    @route("post", "/infer", responses={**_WITH_BODY, **_refusals(404)}, openapi_extra={"requestBody": _INFER_BODY})
    async def infer(request: Request, name: str, version: str | None = None) -> Response:
        """Logits and probabilities of images that have the model's size already."""
        current = check_name(name, version)
        exchange, engine = _exchange(request), current.model.engine
        header_length = request.headers.get(HEADER_LENGTH)
        with service.slots.take():
            (wanted,) = await service.compute(
                [lambda: read_request(exchange.body, header_length, engine, service.config)]
            )
            rows = await service.compute([functools.partial(current.model.infer, image) for image in wanted.images])
        service.metrics.images.inc(len(rows))
        exchange.details["images"] = len(rows)
        body, headers = write_answer(wanted, rows, name)
        return Response(body, headers=headers)


def _add_pages(app: FastAPI, service: Service) -> None:
    files = {path.name: path.read_bytes() for path in sorted(_PAGE.glob("*.*"))}
    files["reference.css"] = (_HERE / "reference.css").read_bytes()

    def serve_file(name: str) -> Response:
        if name not in files:
            raise RequestError(404, f"No such file. Expected one of the page. Received: {name[:100]!r}. See /.")
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        return Response(files[name], media_type=kind, headers={"Cache-Control": "no-cache"})

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return serve_file("index.html")

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        return serve_file(name)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(render_reference(app.openapi(), service.current.model.name))

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(service.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    describe = app.openapi

    def describe_truly() -> dict[str, Any]:
        """FastAPI answers a wrong query with 422; here that is 400."""
        if app.openapi_schema is None:
            for operation in (each for path in describe()["paths"].values() for each in path.values()):
                operation["responses"].pop("422", None)
        return describe()

    app.openapi = describe_truly  # type: ignore[method-assign]  # as FastAPI's documentation has it


def render_reference(schema: dict[str, Any], model_name: str) -> str:
    """Returns the page of all routes: plain HTML, from the OpenAPI description.

    Args:
        schema: The description.
        model_name: Of the model, for the examples.
    """
    from jinja2 import Environment, FileSystemLoader

    groups: dict[str, list[tuple[str, str, Any]]] = {}
    for path, operations in schema["paths"].items():
        for verb, operation in operations.items():
            groups.setdefault(operation["tags"][0], []).append((path, verb, operation))
    environment = Environment(loader=FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("reference.html.j2").render(schema=schema, groups=groups, model_name=model_name)
