"""The images that the digits examples learn: scikit-learn's handwritten ones, or generated ones where it is missing."""

import random

# Five columns by seven rows.
GLYPHS = [
    " ### #   ##  ### # ###  ##   # ### ",
    "  #   ##    #    #    #    #   ### ",
    " ### #   #    #   #   #   #   #####",
    " ### #   #    #  ##     ##   # ### ",
    "   #   ##  # # #  # #####   #    # ",
    "######    ####     #    ##   # ### ",
    "  ##  #   #    #### #   ##   # ### ",
    "#####    #   #   #   #    #    #   ",
    " ### #   ##   # ### #   ##   # ### ",
    " ### #   ##   # ####    #   #  ##  ",
]


def generated(count=1797):
    """Digits of a font of 5 x 7 pixels, in places, strengths and noise drawn from a fixed seed: the same everywhere."""
    draw = random.Random(0)
    images, labels = [], []
    for number in range(count):
        label = number % 10
        left, top, strength = 1 + draw.randrange(2), draw.randrange(2), draw.uniform(10, 16)
        image = [draw.uniform(0, 2) for _ in range(64)]
        for place, mark in enumerate(GLYPHS[label]):
            if mark == "#" and draw.random() > 0.05:
                image[(top + place // 5) * 8 + left + place % 5] = strength
        images.append(image)
        labels.append(label)
    return images, labels


def load_digits():
    """The images (64 values from 0 to 16 each), their labels, and words for what they are."""
    try:
        from sklearn import datasets
    except ImportError:
        return (*generated(), "generated digits (pip install scikit-learn for handwritten ones)")
    images, labels = datasets.load_digits(return_X_y=True)
    return images.tolist(), labels.tolist(), "handwritten digits"
