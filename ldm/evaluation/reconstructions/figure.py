"""What stands below an image in a picture."""

from ldm.data.images import ImageData


def image_text(images: ImageData, i: int) -> str:
    """What an image shows: its caption, else its class, else nothing."""
    if images.captions and (caption := images.captions[i]):
        return caption
    if images.labels and images.class_names and (of_class := images.labels[i]) is not None:
        return images.class_names[of_class]
    return ""
