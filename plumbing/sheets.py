"""Contact sheets: images, maps and, where there is one, the truth, to look at."""
from PIL import Image, ImageDraw

from plumbing import files
from plumbing.images import load_image
from plumbing.maps import heat, load_cam
from plumbing.masks import paint

TILE = 160
ROWS = 16                                                     # images a sheet


def tile(image, caption):
    """An image in a TILE x TILE square with its caption below."""
    canvas = Image.new("RGB", (TILE, TILE + 14), "white")
    image = image.resize([round(n * (TILE - 4) / max(image.size)) for n in image.size], Image.BILINEAR)
    canvas.paste(image, ((TILE - image.width) // 2, (TILE - image.height) // 2))
    ImageDraw.Draw(canvas).text((4, TILE), caption, fill="black")
    return canvas


def draw_sheet(folder, ids, labels, cams):
    """Rows of image, a map for each present class, truth; two images a line."""
    rows = []
    for id, label in zip(ids, labels):
        image = load_image(folder.image_path(id))
        classes, cam = load_cam(cams / f"{id}.npy", label)
        row = [tile(image, id)] + [tile(heat(image, m), folder.classes[k]) for k, m in zip(classes, cam)]
        if folder.has_mask(id):
            row.append(tile(paint(folder.truth(id)).convert("RGB"), "truth"))
        rows.append(row)
    width = max(map(len, rows))
    canvas = Image.new("RGB", (2 * width * TILE, -(-len(rows) // 2) * (TILE + 14)), "white")
    for n, row in enumerate(rows):
        for m, part in enumerate(row):
            canvas.paste(part, ((n % 2 * width + m) * TILE, n // 2 * (TILE + 14)))
    return canvas


def write(where, name, folder, ids, labels, cams):
    """<where>/<name>_<n>.png of the maps in the folder `cams`."""
    where.mkdir(exist_ok=True)
    for n in range(0, len(ids), ROWS):
        sheet = draw_sheet(folder, ids[n:n + ROWS], labels[n:n + ROWS], cams)
        with files.atomic(where / f"{name}_{n // ROWS}.png") as beside:
            sheet.save(beside, format="PNG")
