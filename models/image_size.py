"""Is an image large enough for a network that halves it several times?"""

from __future__ import annotations

from ghostmask.engine.errors import bad_value


def require_image(name: str, image_shape: tuple[int, int, int], smallest: int) -> None:
    """Raise the InputError of model.name = `name` unless height and width are at least `smallest` pixels.

    image_shape: (channels, height, width).
    """
    _, height, width = image_shape
    if min(height, width) < smallest:
        fix = f"needs images of at least {smallest}x{smallest} pixels, the dataset has {height}x{width}"
        raise bad_value("model.name", name, fix)
