"""The drawings of the toy world: eight objects, thirteen textures, and scenes made of them.

In a scene a class nearly always comes with its own background, which touches and surrounds the object. So a
classifier, and CLIP, take the background for part of the class: the false activation that SemPLeS and VPL
remove. numpy and PIL only; make_toy.py writes data sets of these scenes.

    drawings.scene(seed=0, index=12).image       # (96, 96, 3) uint8; .mask, .labels and .ground belong to it
"""
import colorsys
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

OWN = {"aeroplane": "sky", "bird": "leaves", "boat": "water", "bottle": "table",
       "car": "road", "chair": "tiles", "cow": "grass", "train": "rails"}
NEUTRAL = ["wall", "sand", "fog", "brick", "night"]      # come with any class
CLASSES = list(OWN)
GROUNDS = list(OWN.values()) + NEUTRAL                   # ground c < 8 is the own background of class c
# Random streams: what the networks are trained on never appears in a data set.
SCENES = 0
CLIP_SAMPLES = 1
OBJECTS = 2


# ---------------------------------------------------------------- sprites

def oval(x, y, rx, ry, n=24):
    t = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return np.stack([x + rx * np.cos(t), y + ry * np.sin(t)], 1)


def box(x0, y0, x1, y1):
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], float)


def poly(*xy):
    return np.array(xy, float).reshape(-1, 2)


def window_row(n, x0, x1, y0, y1, fill=.6):
    """n boxes side by side."""
    step = (x1 - x0) / n
    return [box(x0 + i * step, y0, x0 + (i + fill) * step, y1) for i in range(n)]


# Colours (main, second, detail), parts in [-1, 1]^2, y down, painted in order. A palette for each class:
# with shared ones a CLIP of this size loses 20 points on cut-out objects. A white plane on clouds stays hard.
SPRITES = {
    "aeroplane": (["#f4f6fa", "#c9d3e2", "#3b63b4"], [
        (1, [poly(.2, -.06, -.2, -.46, -.36, -.46, -.1, -.04)]),
        (0, [poly(-.95, -.2, -.6, -.17, .5, -.17, .8, -.09, .97, .04, .8, .14, -.5, .16, -.8, .06)]),
        (1, [poly(-.98, -.58, -.78, -.58, -.52, -.14, -.86, -.14),
             poly(.26, .06, -.28, .58, -.5, .58, -.14, .06),
             poly(-.66, -.06, -.95, .2, -1, .12, -.84, -.06)]),
        (2, window_row(8, -.5, .5, -.1, -.01) + [poly(.66, -.12, .8, -.07, .86, .0, .68, -.02)])]),
    "bird": (["#f2c71b", "#3a3226", "#e8701a"], [
        (2, [box(-.06, .34, .0, .8), box(.14, .34, .2, .8),
             box(-.06, .76, .12, .82), box(.14, .76, .32, .82)]),
        (1, [poly(-.4, -.02, -.98, -.06, -.92, .24, -.3, .3)]),
        (0, [oval(.02, .1, .56, .36), oval(.5, -.32, .27, .26)]),
        (1, [poly(.3, -.04, -.1, -.16, -.72, .06, -.3, .28, .14, .26), oval(.58, -.38, .05, .05)]),
        (2, [poly(.72, -.4, 1, -.27, .72, -.2)])]),
    "boat": (["#25307a", "#fbe9dc", "#e0457b"], [
        (2, [box(-.04, -.98, .03, .4), poly(.03, -.98, .3, -.9, .03, -.8)]),
        (1, [poly(.07, -.76, .07, .3, .8, .3), poly(-.08, -.84, -.08, .3, -.62, .3)]),
        (2, [poly(.07, -.2, .07, .0, .58, .0, .44, -.2)]),
        (0, [poly(-.95, .4, .98, .4, .66, .84, -.62, .84)]),
        (1, [poly(-.9, .47, .93, .47, .88, .54, -.85, .54)])]),
    "bottle": (["#0e6b46", "#f3ead0", "#8d1436"], [
        (0, [poly(-.13, -.86, .13, -.86, .14, -.42, .36, -.08, .38, .9,
                  .3, .97, -.3, .97, -.38, .9, -.36, -.08, -.14, -.42)]),
        (2, [box(-.15, -.99, .15, -.74)]),
        (1, [box(-.36, .1, .36, .66)]),
        (2, [oval(0, .38, .17, .17)])]),
    "car": (["#d3202a", "#bfe0ea", "#1c1c20"], [
        (0, [poly(-.97, .06, -.88, -.06, -.58, -.1, -.34, -.46, .3, -.46,
                  .6, -.08, .9, .0, .98, .14, .98, .38, -.97, .38)]),
        (1, [poly(-.46, -.1, -.28, -.38, -.06, -.38, -.06, -.1),
             poly(.02, -.1, .02, -.38, .26, -.38, .46, -.1), box(.88, .08, .98, .2)]),
        (2, [oval(-.55, .38, .23, .23), oval(.56, .38, .23, .23)]),
        (1, [oval(-.55, .38, .1, .1), oval(.56, .38, .1, .1)])]),
    "chair": (["#8a3fc0", "#5b2486", "#e6b8f2"], [
        (1, [box(-.36, .2, -.25, .78), box(.25, .2, .36, .78)]),
        (0, [poly(-.5, -.96, .5, -.96, .46, .04, -.46, .04)]),
        (2, [box(-.33, -.8, -.13, -.14), box(-.08, -.8, .1, -.14), box(.15, -.8, .33, -.14)]),
        (0, [poly(-.52, -.02, .52, -.02, .68, .26, -.68, .26)]),
        (1, [box(-.68, .26, .68, .36), box(-.66, .36, -.52, .98), box(.52, .36, .66, .98)])]),
    "cow": (["#f3ece6", "#1d1716", "#f0a0a4"], [
        (1, [box(-.42, .2, -.3, .78), box(.24, .2, .36, .78),
             poly(-.74, -.3, -.8, -.26, -.9, .36, -.82, .4)]),
        (2, [oval(-.22, .34, .17, .13)]),
        (0, [poly(-.78, -.3, -.66, -.42, .42, -.44, .56, -.3, .5, .26, .3, .36, -.6, .34, -.76, .2),
             box(-.64, .2, -.5, .84), box(.06, .2, .2, .84)]),
        (1, [oval(-.4, -.14, .24, .2), oval(.14, .0, .2, .24), box(-.64, .74, -.5, .86),
             box(.06, .74, .2, .86), poly(.48, -.62, .4, -.8, .6, -.62)]),
        (0, [poly(.4, -.56, .56, -.66, .8, -.6, .98, -.22, .9, -.08, .66, -.1, .44, -.28)]),
        (1, [poly(.4, -.56, .56, -.66, .66, -.4, .5, -.3), poly(.42, -.58, .2, -.6, .4, -.42),
             oval(.72, -.44, .045, .045)]),
        (2, [poly(.8, -.28, .98, -.24, .92, -.06, .72, -.1)])]),
    "train": (["#ef7d16", "#20242c", "#fff1b8"], [
        (1, [oval(x, .5, .13, .13) for x in (-.76, -.46, -.1, .2, .54)]
            + [poly(-.5, -.4, -.36, -.62, -.2, -.4), box(-.56, -.66, -.16, -.6)]),
        (0, [poly(-.98, -.4, .6, -.4, .84, -.2, .98, .2, .98, .46, -.98, .46)]),
        (1, window_row(6, -.92, .5, -.24, .02, .7)
            + [poly(.56, -.26, .74, -.22, .86, .02, .56, .02), box(-.98, .38, .98, .48)]),
        (2, [poly(-.98, .12, .94, .12, .97, .22, -.98, .22), oval(.88, .3, .06, .06)])]),
}


def tint(rng, colour, spread):
    """A colour near a hex colour: hue, saturation and brightness moved. -> (3,) in 0..255"""
    r, g, b = (int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5))
    h, s, v = colorsys.rgb_to_hsv(r, g, b)
    d = rng.uniform(-spread, spread, 3)
    moved = (h + d[0] * .15) % 1, np.clip(s * (1 + d[1]), 0, 1), np.clip(v * (1 + d[2]), 0, 1)
    return np.array(colorsys.hsv_to_rgb(*moved)) * 255


def sprite(rng, name, size):
    """One object, tilted by at most 12 degrees, that fills the square: (size, size, 4) uint8, RGBA."""
    colours, parts = SPRITES[name]
    colours = [tint(rng, c, .2) for c in colours]
    angle = rng.uniform(-.2, .2)
    flip = rng.choice([-1, 1])
    stretch = rng.uniform(.8, 1.2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    canvas = Image.new("RGBA", (4 * size, 4 * size))
    draw = ImageDraw.Draw(canvas)
    for index, shapes in parts:
        fill = tuple(int(v) for v in colours[index])
        edge = tuple(int(v * .62) for v in colours[index])         # a dark outline, as a shaded edge has
        for shape in shapes:
            placed = (shape * [flip * min(1, stretch), min(1, 1 / stretch)]) @ turn.T * .92
            points = [tuple(p) for p in ((placed + 1) * 2 * size)]
            draw.polygon(points, fill=fill, outline=edge, width=max(1, size // 24))
    out = np.array(canvas.resize((size, size), Image.BOX)).astype(np.float32)
    light = np.linspace(1.1, .84, size)[:, None, None] + rng.normal(0, .03, (size, size, 1))
    out[..., :3] *= light * rng.uniform(.85, 1.1)
    return out.clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------- textures

def noise(rng, size, cells, aspect=1.):
    """Smooth noise in about [-1, 1] with `cells` waves across, (size, size)."""
    grid = rng.uniform(-1, 1, (max(2, round(cells * aspect)), cells)).astype(np.float32)
    return np.array(Image.fromarray(grid).resize((size, size), Image.BICUBIC))


def mix(a, b, t):
    """From colours a to colours b where t (size, size) goes from 0 to 1."""
    return a + (b - a) * np.clip(t, 0, 1)[..., None]


def lay_bricks(size, rows, columns, shift, width):
    """-> 1 on the joints of a brick wall, every second row moved by `shift`; the number of the brick."""
    y, x = np.mgrid[:size, :size] / size
    r = np.floor(y * rows)
    joints = (y * rows % 1 < width * rows) | ((x * columns + shift * r) % 1 < width * columns)
    return joints.astype(float), r + np.floor(x * columns + shift * r)


def draw_leaves(rng, size):
    canvas = Image.new("RGB", (size, size), tuple(int(v) for v in tint(rng, "#1d4a1c", .12)))
    draw = ImageDraw.Draw(canvas)
    greens = [tuple(int(v) for v in tint(rng, "#3f8a2c", .3)) for _ in range(9)]
    for i in range(70):
        cx, cy, angle, length = rng.uniform([-.05, -.05, 0, .05], [1.05, 1.05, 2 * np.pi, .11])
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        leaf = oval(0, 0, length, length * .42, 8) @ turn + [cx, cy]
        draw.polygon([tuple(p) for p in leaf * size], fill=greens[i % 9])
    return np.array(canvas).astype(np.float32)


def texture(rng, name, size):
    """One of the backgrounds over the whole square, (size, size, 3) float in 0..255."""
    y, x = np.mgrid[:size, :size] / size + rng.uniform(0, 1, (2, 1, 1))

    def colour(code):
        return tint(rng, code, .12)

    if name == "sky":
        blue = mix(colour("#8cc4f2"), colour("#4f92dc"), noise(rng, size, 2) * .5 + .5)
        return mix(blue, colour("#f6f9fd"), noise(rng, size, 4, .8) * 1.5 + noise(rng, size, 9) * .5 - .1)
    if name == "leaves":
        return draw_leaves(rng, size)
    if name == "water":
        wave = y * rng.uniform(7, 10) + .25 * np.sin(2 * np.pi * (x * 2.5 + noise(rng, size, 3)))
        wave = np.sin(2 * np.pi * wave)
        water = mix(colour("#0f7f8f"), colour("#2fb3b5"), wave * .5 + .5)
        return mix(water, colour("#d8f5f2"), (wave - .86) * 5)
    if name == "table":
        plank = np.floor(y * 6)
        grain = np.sin(2 * np.pi * (y * 30 + 3 * noise(rng, size, 3, 3) + plank * .37))
        wood = mix(colour("#a8693a"), colour("#7d4722"), grain * .35 + .4 + .25 * np.sin(plank * 2.4))
        return mix(wood, colour("#4a2712"), (y * 6 % 1 < .09) * .9)
    if name == "road":
        dash = (np.abs((x + .3 * y) % .5 - .25) < .022) & (y * 3 % 1 < .55)
        asphalt = mix(colour("#4c4d53"), colour("#66676d"), rng.uniform(0, 1, (size, size)))
        return mix(asphalt, colour("#f2efe2"), dash * .95)
    if name == "tiles":
        n = rng.uniform(5, 7.5)
        joints = (x * n % 1 < .1) | (y * n % 1 < .1)
        tiles = mix(colour("#c4efe0"), colour("#5fb8a6"), (np.floor(x * n) + np.floor(y * n)) % 2)
        return mix(tiles, colour("#f5fffb"), joints * 1.)
    if name == "grass":
        blade = noise(rng, size, size // 3, .25)
        grass = mix(colour("#5fae2e"), colour("#a6d84a"), blade * .8 + .5)
        return mix(grass, colour("#2f7a1c"), noise(rng, size, size // 4, .3) * .9 - .1)
    if name == "rails":
        gravel = mix(colour("#8d8178"), colour("#57504c"), rng.uniform(0, 1, (size, size)))
        gravel = mix(gravel, colour("#3c2a22"), (x * 9 % 1 < .36) * .9)          # sleepers
        return mix(gravel, colour("#dfe6ee"), (np.abs(y * 3.2 % 1 - .5) < .11) * .95)
    if name == "wall":
        return mix(colour("#ead9bd"), colour("#d6c09c"), noise(rng, size, 5) * .5 + .5)
    if name == "sand":
        ripple = np.sin(2 * np.pi * (y * 5 + x * 2 + .6 * noise(rng, size, 4)))
        sand = mix(colour("#e9cf7c"), colour("#cfae57"), ripple * .3 + .4)
        return mix(sand, colour("#b8934a"), rng.uniform(-1.5, 1, (size, size)))
    if name == "fog":
        return mix(colour("#c3c6c9"), colour("#9da3a9"), noise(rng, size, 3) * .6 + .5)
    if name == "brick":
        joints, brick = lay_bricks(size, 8, 4, .5, .014)
        wall = mix(colour("#a04a3a"), colour("#843627"), np.sin(brick * 12.9) * .5 + .5)
        return mix(wall, colour("#cdbcae"), joints)
    night = mix(colour("#10122e"), colour("#262a56"), noise(rng, size, 3) * .5 + .5)
    star = colour("#fff6d0")
    return mix(night, star, (rng.uniform(0, 1, (size, size)) > .985) * rng.uniform(.4, 1, (size, size)))


# ---------------------------------------------------------------- scenes

class Scene(NamedTuple):
    image: np.ndarray       # (S, S, 3) uint8
    mask: np.ndarray        # (S, S) uint8: 0 background, class + 1, 255 the line round an object
    labels: list            # present classes, ascending, 0..C-1
    ground: np.ndarray      # (S, S) uint8: index into GROUNDS of what lies there or behind the object


def blob(rng, size, cx, cy, radius):
    """A soft-cornered patch round a point, all in units of the image, (size, size) bool."""
    y, x = (np.mgrid[:size, :size] + .5) / size
    angle = np.arctan2(y - cy, x - cx)
    a, b, c = rng.uniform(0, 2 * np.pi, 3)
    bulge = .16 * np.sin(2 * angle + a) + .1 * np.sin(3 * angle + b) + .06 * np.sin(5 * angle + c)
    return np.hypot(x - cx, y - cy) < radius * (1 + bulge)


def region(rng, size, cx, cy, half, kind):
    """Where a class's background lies: "halo" round the object, "band" across the image, "all" everywhere."""
    if kind == "halo":
        return blob(rng, size, cx, cy, half * rng.uniform(1.3, 1.9))
    if kind == "all":
        return np.ones((size, size), bool)
    y = (np.mgrid[:size, :size][0] + .5) / size + .05 * noise(rng, size, 4)
    return (y > cy - half * rng.uniform(.9, 1.4)) & (y < cy + half * rng.uniform(1.1, 1.6))


def paste(canvas, patch, cx, cy):
    """Lays an RGBA square centred at (cx, cy) on a float image. -> where it is opaque, (S, S) bool"""
    size, n = len(canvas), len(patch)
    top = round(cy * size - n / 2)
    left = round(cx * size - n / 2)
    ys = slice(max(top, 0), min(top + n, size))
    xs = slice(max(left, 0), min(left + n, size))
    part = patch[ys.start - top:ys.stop - top, xs.start - left:xs.stop - left]
    alpha = part[..., 3:] / 255.
    canvas[ys, xs] += (part[..., :3] - canvas[ys, xs]) * alpha
    where = np.zeros((size, size), bool)
    where[ys, xs] = alpha[..., 0] > .5
    return where


def grow(where, steps=1):
    """Dilates by `steps` pixels, eight neighbours."""
    for _ in range(steps):
        n, padded = len(where), np.pad(where, 1)
        where = np.logical_or.reduce([padded[i:i + n, j:j + n] for i in range(3) for j in range(3)])
    return where


def finish(rng, canvas):
    """Exposure and sensor noise; float -> uint8."""
    return (canvas * rng.uniform(.88, 1.08) + rng.normal(0, 4, canvas.shape)).clip(0, 255).astype(np.uint8)


def scene(seed, index, size=96):
    """Image number `index` of the data set `seed`; depends on nothing else."""
    rng = np.random.default_rng([seed, SCENES, index])
    classes = [index % len(CLASSES)]                                        # every class equally often
    if rng.random() < .2:
        classes.append((classes[0] + int(rng.integers(1, len(CLASSES)))) % len(CLASSES))
    alone = len(classes) == 1
    base = len(OWN) + int(rng.integers(len(NEUTRAL)))
    canvas = texture(rng, GROUNDS[base], size)
    ground = np.full((size, size), base, np.uint8)
    side = rng.choice([-1, 1])                                              # the first of two: left or right
    places = []
    for i, c in enumerate(classes):
        if alone:
            half = rng.choice([rng.uniform(.14, .2), rng.uniform(.22, .33)], p=[.2, .8])
            cx = rng.uniform(half, 1 - half)
        else:
            half = rng.uniform(.17, .23)
            cx = .5 + side * (2 * i - 1) * rng.uniform(.22, .28)
        cy = rng.uniform(half, 1 - half)
        places.append((c, half, cx, cy))
        behind = c if rng.random() < .9 else int(rng.integers(len(OWN)))    # else another's background
        kind = rng.choice(["halo", "band", "all"], p=[.4, .35, .25]) if alone else "halo"
        where = region(rng, size, cx, cy, half, kind)
        canvas[where] = texture(rng, GROUNDS[behind], size)[where]
        ground[where] = behind
    mask = np.zeros((size, size), np.uint8)
    for c, half, cx, cy in places:
        where = paste(canvas, sprite(rng, CLASSES[c], max(8, round(2 * half * size))), cx, cy)
        mask[grow(where, max(1, size // 96)) & ~where] = 255
        mask[where] = c + 1
    return Scene(finish(rng, canvas), mask, sorted(classes), ground)


def object_on_texture(rng, size):
    """What the generator's trunk is pre-trained on, as others are on ImageNet: an object over any texture.

    Half of the samples show an object over a random texture and are labelled 0..7; the others show a texture
    alone and are labelled 8 + its index in GROUNDS. -> (size, size, 3) uint8, label of 8 + 13 = 21.
    """
    ground = int(rng.integers(len(GROUNDS)))
    canvas = texture(rng, GROUNDS[ground], size)
    if rng.random() < .3:                        # two textures: an edge alone does not make an object
        where = region(rng, size, *rng.uniform(.2, .8, 2), rng.uniform(.15, .3), rng.choice(["halo", "band"]))
        canvas[~where] = texture(rng, GROUNDS[int(rng.integers(len(GROUNDS)))], size)[~where]
    if rng.random() < .5:
        return finish(rng, texture(rng, GROUNDS[ground], size)), len(CLASSES) + ground
    c = int(rng.integers(len(CLASSES)))
    half = rng.uniform(.15, .4)
    patch = sprite(rng, CLASSES[c], max(8, round(2 * half * size)))
    paste(canvas, patch, *rng.uniform(min(half, .5), 1 - min(half, .5), 2))
    return finish(rng, canvas), c
