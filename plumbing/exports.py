"""Maps as other projects read them: IRN, PSA (and WeakTr, SemPLeS's public code), CLIP-ES, FMA-WSSS."""
from typing import NamedTuple

import numpy as np
import torch

from plumbing import files
from plumbing.maps import resize_maps


class Export(NamedTuple):
    write: object                                            # (open file, classes (P,), maps (P, h, w), size)
    ending: str


def write_irn(file, classes, cam, size):
    """keys 0..C-1, maps at a quarter and at full size; tensors: IRN's next stage calls cam.cuda()."""
    small = resize_maps(cam, [(n - 1) // 4 + 1 for n in size])
    content = {"keys": torch.as_tensor(classes), "cam": small, "high_res": resize_maps(cam, size).numpy()}
    np.save(file, content, allow_pickle=True)


def write_psa(file, classes, cam, size):
    """{class: map}"""
    content = {int(k): m.numpy() for k, m in zip(classes, resize_maps(cam, size))}
    np.save(file, content, allow_pickle=True)


def write_clip_es(file, classes, cam, size):
    content = {"keys": np.asarray(classes), "attn_highres": resize_maps(cam, size).numpy()}
    np.save(file, content, allow_pickle=True)


def write_fma(file, classes, cam, size):
    np.savez(file, cam=np.asarray(cam), fg_cls=np.asarray(classes))


FORMATS = {"irn": Export(write_irn, "npy"), "psa": Export(write_psa, "npy"),
           "clip_es": Export(write_clip_es, "npy"), "fma": Export(write_fma, "npz")}


def path(folder, id, name):
    return folder / f"{id}.{FORMATS[name].ending}"


def save(folder, id, name, classes, cam, size):
    """The maps (P, h, w) of one image of `size` (H, W) in another project's format."""
    with files.atomic(path(folder, id, name)) as beside, open(beside, "wb") as file:
        FORMATS[name].write(file, np.asarray(classes), torch.as_tensor(cam).float(), size)
