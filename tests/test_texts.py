"""The texts that CLIP reads: templates, synonyms, backgrounds."""
import pytest

from plumbing.folders import COCO_CLASSES, VOC_CLASSES
from wsss import texts


def test_class_texts():
    assert texts.class_texts(["train", "bird"]) == ["a photo of train.", "a photo of bird."]
    assert texts.class_texts(["traffic light"], "my {}") == ["my traffic light"]
    assert len(texts.CLIMS_BACKGROUNDS) == 10


@pytest.mark.parametrize("template", ["a photo", "{} and {}", "{0}", "{name}", "{} {", "}{}", "{!r}"])
def test_a_template_needs_one_place_for_the_name(template):
    with pytest.raises(ValueError, match="write one {} in it"):
        texts.class_texts(["train"], template)


def test_prompts_of_classes_then_backgrounds():
    single = texts.prompt_texts(["train", "bird"], ["sky"], "single")
    assert single == ["a photo of a train.", "a photo of a bird.", "a photo of a sky."]
    ensemble = texts.prompt_texts(["train", "bird"], ["sky"])
    assert ensemble == ["a clean origami train.", "a clean origami bird avian.", "a clean origami sky."]
    assert texts.prompt_texts(["chair"], ["sky"], template="{}") == ["chair seat", "sky"]
    assert set(texts.SYNONYMS) < set(VOC_CLASSES)


def test_backgrounds_of_voc_and_coco():
    voc, coco = texts.backgrounds(VOC_CLASSES), texts.backgrounds(COCO_CLASSES)
    assert len(voc) == 25 and set(voc) - set(coco) == {"keyboard", "sign"} and len(coco) == 23
    assert not set(coco) & set(COCO_CLASSES) and not set(voc) & set(VOC_CLASSES)
    assert texts.backgrounds(["train", "toothbrush"]) == voc
