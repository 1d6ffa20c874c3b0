"""A score in words."""
import pytest

from plumbing import scores

FMA = {"background": "power", "value": 0.6, "crf": None, "vote": "sams", "without_segments": 2,
       "segments": {"source": None, "folder": "sam"}, "pixels": {"background": "constant", "value": 0.43}}
IRN = {"maps": {"source": "refine"}, "background": "constant", "value": 0.4, "crf": "irn"}
CAM = {"what": "cam", "background": "power", "value": 1}
SEG = {"what": "seg", "made_by": {"model": "deeplab_toy"}}


@pytest.mark.parametrize("protocol,words", [
    ({"what": "masks", "limit": 8}, " (--limit)"),
    ({**CAM, "made_by": None}, " · background power 1"),
    ({**CAM, "made_by": {"source": "text", "args": {"tau_t": 0.01}}},
     " · maps of text · tau 0.01 · background power 1"),
    ({**CAM, "made_by": {"source": "weaktr.pth"}, "oracle": "x"},
     " · maps of cls · background power 1 · used the truth"),
    ({"what": "pseudo", "made_by": IRN}, " · maps of refine · background constant 0.4 · CRF irn"),
    ({"what": "pseudo", "made_by": FMA},
     " · maps of cls · sam segments, vote sams (2 images without) · background constant 0.43 for the CRF and "
     "images without segments · background power 0.6 · no CRF"),
    ({**SEG, "scales": [0.5, 1.0], "flip": True, "crf": "deeplab"},
     " · deeplab_toy · scales 0.5 1.0, flips · CRF deeplab"),
    ({**SEG, "scales": [1], "flip": False, "crf": None}, " · deeplab_toy · scales 1 · no CRF")])
def test_protocols_in_words(protocol, words):
    shared = {"split": "train", "data": "toy", "images": 24}
    assert scores.in_words({**shared, **protocol}) == f"train of toy · 24 images{words}"
