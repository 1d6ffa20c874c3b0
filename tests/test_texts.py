"""The texts that CLIP reads: aliases, synonyms, templates, backgrounds."""

from plumbing.folders import COCO_CLASSES, VOC_CLASSES
from wsss import texts


def test_semples_texts_name_vocs_classes_by_their_aliases():
    found = zip(VOC_CLASSES, texts.class_texts(VOC_CLASSES), strict=True)
    changed = {name: text for name, text in found if text != f"a photo of {name}."}
    assert changed == {"diningtable": "a photo of dining table.", "pottedplant": "a photo of potted plant.",
                       "tvmonitor": "a photo of tv monitor.", "person": "a photo of player."}
    raw = [f"a photo of {name}." for name in VOC_CLASSES]
    assert texts.class_texts(VOC_CLASSES, aliases=False) == raw
    for classes in (COCO_CLASSES, ["person", "tvmonitor"]):       # of any other data set: as they are
        assert texts.class_texts(classes) == [f"a photo of {name}." for name in classes]


def test_prompts_are_a_list_a_template_of_classes_then_backgrounds():
    single = texts.prompt_texts(["train", "bird"], ["sky"], "single")
    assert single == [["a photo of a train.", "a photo of a bird.", "a photo of a sky."]]
    ensemble = texts.prompt_texts(["train", "bird"], ["sky"])
    assert ensemble == [["a clean origami train.", "a clean origami bird avian.", "a clean origami sky."]]
    templates = texts.prompt_texts(["bird"], ["sky"], "templates")
    assert len(templates) == 7 and ["a origami bird.", "a origami sky."] in templates
    coco = dict(zip(COCO_CLASSES, texts.prompt_texts(COCO_CLASSES, [])[0]))
    assert coco["snowboard"] == "a clean origami sknowboard." and coco["tie"] == "a clean origami necktie."
    assert coco["couch"] == "a clean origami sofa." and coco["zebra"] == "a clean origami zebra."
    assert set(texts.SYNONYMS) <= {*VOC_CLASSES, *COCO_CLASSES}


def test_backgrounds_of_voc_and_coco():
    voc, coco = texts.backgrounds(VOC_CLASSES), texts.backgrounds(COCO_CLASSES)
    assert len(voc) == 25 and set(voc) - set(coco) == {"keyboard", "sign"} and len(coco) == 23
    assert not set(coco) & set(COCO_CLASSES) and not set(voc) & set(VOC_CLASSES)
    assert set(voc) - set(texts.backgrounds(["tree", "road", "cat"])) == {"tree", "road"}
    voc, coco = texts.clims_backgrounds(VOC_CLASSES), texts.clims_backgrounds(COCO_CLASSES)
    assert len(voc) == 10 and len(coco) == len(set(coco)) == 88 and not set(coco) & set(COCO_CLASSES)
    assert texts.clims_backgrounds(["train", "toothbrush"]) == voc
    assert set(voc) - set(texts.clims_backgrounds(["tree", "cat"])) == {"tree"}
