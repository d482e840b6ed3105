"""From the body of a request to images, within limits."""

import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import numpy as np
from python_multipart.exceptions import FormParserError
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from vitreous.data import decode_image
from vitreous.data.images import open_image
from vitreous.errors import ImageError, RequestError
from vitreous.server.settings import ServerConfig

_SHOW = "curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' ADDRESS"
_ODD_NAME = re.compile(r"[/\\\x00-\x1f\x7f]|^\.\.?$")
_PILLOW_NAMES = {"MPO": "jpeg", "DIB": "bmp"}  # of a format that goes by another name here


@dataclass(frozen=True)
class Upload:
    """An image as it was sent.

    Args:
        name: What the client calls it; of no meaning here.
        data: Its bytes.
    """

    name: str
    data: bytes


class _MemoryParser(MultiPartParser):
    """Keeps parts in memory: the body is there already, and the disk may be read-only."""

    spool_max_size = 1 << 40


async def read_uploads(body: bytes, content_type: str, config: ServerConfig) -> list[Upload]:
    """Finds the images in a body: the body itself, or the files of a form.

    Args:
        body: The whole of it.
        content_type: `image/...`, `application/octet-stream`, or `multipart/form-data` with one file or more.
        config: How many there may be.

    Raises:
        RequestError: 415 for another type, 400 for a broken form, none or empty files, odd names, 413 for too many.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _read_form(body, content_type, config)
    if kind != "application/octet-stream" and not kind.startswith("image/"):
        raise RequestError(
            415,
            "Cannot read the body. Expected Content-Type image/..., application/octet-stream or multipart/form-data. "
            f"Received: Content-Type={content_type[:100]!r}. Send for example: {_SHOW}",
        )
    if kind.startswith("image/svg"):
        raise RequestError(
            415,
            "Cannot read a drawing. Expected an image of pixels. Received: Content-Type=image/svg+xml. Send it as PNG.",
        )
    return [Upload("0", _check_whole(body, "the body"))]


async def _read_form(body: bytes, content_type: str, config: ServerConfig) -> list[Upload]:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    headers = Headers({"content-type": content_type})
    try:
        parser = _MemoryParser(headers, stream(), max_files=config.max_images, max_fields=8, max_part_size=4096)
        form = await parser.parse()
    except (MultiPartException, FormParserError, KeyError, ValueError, UnicodeError, LookupError) as error:
        reason = getattr(error, "message", None) or "a broken form"
        status = 413 if "Too many files" in reason else 400
        raise RequestError(
            status,
            f"Cannot read the form. Expected whole multipart/form-data with at most {config.max_images} files. "
            f"Received: {reason} Send for example: curl -F image=@photo.jpg ADDRESS",
        ) from error
    try:
        uploads: list[Upload] = []
        for _, value in form.multi_items():
            if isinstance(value, UploadFile):
                name = value.filename or str(len(uploads))
                if _ODD_NAME.search(name):
                    raise RequestError(
                        400,
                        "Cannot use a file name. Expected one without folders and control characters. "
                        f"Received: filename={name[:100]!r}. Send the file's own name.",
                    )
                uploads.append(Upload(name, _check_whole(await value.read(), f"the file {name[:100]}")))
    finally:
        await form.close()
    if not uploads:
        raise RequestError(
            400,
            "No image in the form. Expected one file or more. Received: none. Send for example: curl -F "
            "image=@photo.jpg ADDRESS",
        )
    return uploads


def _check_whole(data: bytes, what: str) -> bytes:
    if not data:
        raise RequestError(400, f"No image in {what}. Expected its bytes. Received: nothing. Send for example: {_SHOW}")
    return data


def read_image(upload: Upload, num_channels: int, config: ServerConfig) -> np.ndarray:
    """Decodes an image. Its format and its size are read from its header and judged first.

    Args:
        upload: The image.
        num_channels: 3 (RGB) or 1 (grey).
        config: Which formats, and how many pixels.

    Returns:
        uint8 (H, W, num_channels), of its own size.

    Raises:
        RequestError: 415 for a format that is not read, 413 for too many pixels, 400 for a broken image.
    """
    name = f"{upload.name[:100]!r}"
    try:
        with open_image(upload.data, name=name) as image:
            format = _PILLOW_NAMES.get(image.format or "", (image.format or "").lower())
            width, height = image.size
    except ImageError as error:
        is_bomb = "decompression bomb" in error.reason
        raise _too_large(name, config, "far more") if is_bomb else _unreadable(name, config, error.reason) from error
    if format not in config.formats:
        raise _unreadable(name, config, format)
    if width * height > config.max_pixels:
        raise _too_large(name, config, f"{width} × {height}")
    try:
        return decode_image(upload.data, num_channels, name=name)
    except ImageError as error:
        raise RequestError(
            400, f"Cannot read the image {name}. Expected a whole one. Received: {error.reason}. Send it again."
        ) from error


def _too_large(name: str, config: ServerConfig, received: str) -> RequestError:
    return RequestError(
        413,
        f"Too many pixels in {name}. Expected at most {config.max_megapixels:g} million. Received: {received}. "
        "Send it smaller: the model sees far fewer.",
    )


def _unreadable(name: str, config: ServerConfig, received: str) -> RequestError:
    return RequestError(
        415,
        f"Cannot read {name}. Expected an image: {', '.join(config.formats)}. Received: {received}. Convert it, or "
        "start the server with --formats.",
    )
