"""A score in words."""
import pytest

from plumbing import scores

SHARED = {"split": "train", "data": "toy", "images": 24}


FMA = {"background": "power", "value": 0.6, "crf": None, "vote": "sams", "without_segments": 2,
       "segments": {"source": None, "folder": "sam"}, "pixels": {"background": "constant", "value": 0.43}}
IRN = {"maps": {"source": "refine"}, "background": "constant", "value": 0.4, "crf": "irn"}
POWER = {"what": "cam", "background": "power", "value": 1}
TOY = {"what": "seg", "made_by": {"model": "deeplab_toy"}}


@pytest.mark.parametrize("protocol,words", [
    ({"what": "masks", "limit": 8}, "24 images (--limit)"),
    ({**POWER, "made_by": None}, "24 images · background power 1"),
    ({**POWER, "made_by": {"source": "text", "args": {"tau_t": 0.01}}},
     "24 images · maps of text · tau 0.01 · background power 1"),
    ({**POWER, "made_by": {"source": "weaktr.pth"}, "oracle": "x"},
     "24 images · maps of cls · background power 1 · used the truth"),
    ({"what": "pseudo", "made_by": IRN}, "24 images · maps of refine · background constant 0.4 · CRF irn"),
    ({"what": "pseudo", "made_by": FMA},
     "24 images · maps of cls · sam segments, vote sams (2 images without) · background constant 0.43 for "
     "the CRF and images without segments · background power 0.6 · no CRF"),
    ({**TOY, "scales": [0.5, 1.0], "flip": True, "crf": "deeplab"},
     "24 images · deeplab_toy · scales 0.5 1.0, flips · CRF deeplab"),
    ({**TOY, "scales": [1], "flip": False, "crf": None}, "24 images · deeplab_toy · scales 1 · no CRF")])
def test_protocols_in_words(protocol, words):
    line = scores.in_words({**SHARED, **protocol})
    assert line == f"train of toy · {words}"


def test_every_source_has_words():
    for source in scores.SOURCES:
        assert scores.maps_of({"what": "cam", "made_by": {"source": source}}) == source
        assert scores.maps_of({"what": "pseudo", "made_by": {"maps": {"source": source}}}) == source
