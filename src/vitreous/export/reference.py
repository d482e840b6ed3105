"""From a file to what an exported model takes, with Pillow and NumPy alone; a bundle carries this function as it is."""

import numpy as np
from PIL import Image, ImageOps


def prepare_image(path, spec):  # type: ignore[no-untyped-def]  # read by people who need no types
    """Returns uint8 (1, H, W, C) of an image file, resized and cropped as `spec` ("input" of the metadata) says."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB" if spec["num_channels"] == 3 else "L")
    (width, height), target = image.size, spec["image_size"]
    tall, wide = (max(side, int(side / spec["crop_fraction"])) for side in target)
    if spec["resize_mode"] == "pad":  # the whole image fits in
        scale = min(tall / height, wide / width)
        tall, wide = min(tall, max(1, round(height * scale))), min(wide, max(1, round(width * scale)))
    elif spec["resize_mode"] == "crop" and tall != wide:  # the image covers all
        scale = max(tall / height, wide / width)
        tall, wide = round(height * scale), round(width * scale)
    elif spec["resize_mode"] == "crop":
        tall, wide = (tall, tall * width // height) if width >= height else (wide * height // width, wide)
    image = image.resize((wide, tall), Image.Resampling[spec["interpolation"].upper()])
    mean = tuple(round(255 * value) for value in spec["mean"])
    canvas = Image.new(image.mode, (target[1], target[0]), mean if len(mean) == 3 else mean[0])
    left, top = (  # the centre: cut where the image is larger, filled where it is smaller
        (limit - side) // 2 if side < limit else -round((side - limit) / 2)
        for side, limit in ((wide, target[1]), (tall, target[0]))
    )
    canvas.paste(image, (left, top))
    return np.asarray(canvas, "uint8").reshape(1, *target, -1)
