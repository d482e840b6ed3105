"""From a file to what an exported model takes, with Pillow and NumPy alone; a bundle carries this function as it is."""

import numpy as np
from PIL import Image, ImageOps


def prepare_image(path, spec):  # type: ignore[no-untyped-def]  # read by people who need no types
    """Returns uint8 (1, H, W, C) of an image file, resized and cropped as `spec` ("input" of the metadata) says."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB" if spec["num_channels"] == 3 else "L")
    (width, height), (rows, columns) = image.size, spec["image_size"]
    how = Image.Resampling[spec["interpolation"].upper()]
    if spec["resize_mode"] == "squash":
        image = image.resize((columns, rows), how)
    elif spec["resize_mode"] == "pad":
        scale = min(rows / height, columns / width)
        inner = min(columns, max(1, round(width * scale))), min(rows, max(1, round(height * scale)))
        mean = tuple(round(255 * value) for value in spec["mean"])
        canvas = Image.new(image.mode, (columns, rows), mean if len(mean) == 3 else mean[0])
        canvas.paste(image.resize(inner, how), ((columns - inner[0]) // 2, (rows - inner[1]) // 2))
        image = canvas
    else:
        tall, wide = (max(side, int(side / spec["crop_fraction"])) for side in (rows, columns))
        if tall * width >= wide * height:  # the height decides
            wide = tall * width // height
        else:
            tall = wide * height // width
        left, top = round((wide - columns) / 2), round((tall - rows) / 2)
        image = image.resize((wide, tall), how).crop((left, top, left + columns, top + rows))
    return np.asarray(image, "uint8").reshape(1, rows, columns, -1)
