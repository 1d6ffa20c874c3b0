"""What CLIP's text encoder reads: aliases, synonyms, templates, backgrounds.

SemPLeS's aliases are used only where the classes are VOC's twenty; CLIP-ES's synonyms go by the name alone,
in any data set. All other names are taken as they are.
"""

# From the authors' code, not in the paper: SemPLeS and CLIMS do not feed VOC's names, which CLIP's tokenizer
# splits badly ("din-ing-table"). COCO's plain names are fed as they are.
ALIASES = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor",
           "person": "player"}

# From the authors' code, not in the paper: CLIP-ES writes synonyms into VOC's class names, and has names of
# its own for COCO's ("sknowboard" is spelled so there).
SYNONYMS = {
    "bird": "bird avian", "chair": "chair seat", "person": "person with clothes,people,human",
    "tvmonitor": "tvmonitor screen",
    "motorcycle": "motorbike", "airplane": "aeroplane", "backpack": "backpack,bag",
    "umbrella": "umbrella,parasol", "handbag": "handbag,purse", "tie": "necktie", "snowboard": "sknowboard",
    "baseball glove": "glove",
    "spoon": "dessertspoon", "couch": "sofa", "potted plant": "pottedplant", "dining table": "diningtable",
    "tv": "tvmonitor screen", "remote": "remote control", "hair drier": "hairdrier,blowdrier",
}

# VPL Table 4 compares a single prompt with an ensemble of prompts and prints one text, which is CLIP-ES's.
PROMPTS = {  # templates whose features are averaged, and whether synonyms stand in for class names
    "single": (["a photo of a {}."], False),
    "ensemble": (["a clean origami {}."], True),              # CLIP-ES
    # Not in the paper, which does not list its prompts: these seven are CLIP's own best subset.
    "templates": (["itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
                   "a {} in a video game.", "art of the {}.", "a photo of the small {}."], False),
}

# CLIP-ES, VOC: what may lie behind the objects.
VOC_BACKGROUNDS = """
    ground land grass tree building wall sky lake water river sea railway railroad keyboard helmet cloud house
    mountain ocean road rock street valley bridge sign
""".split()

# CLIMS: what often lies beside the objects; the texts of its loss CBS.
CLIMS_VOC = "tree river sea lake water railway railroad track stone rocks".split()
CLIMS_COCO = (
    "street sign,mountain,video game,men,track,bus stop,cabinet,tray,plate,shirt,city street,runway,"
    "tower,ramp,grass,pillow,urinal,lake,brick,fence,shower,airport,animal,shower curtain,road,mirror,"
    "jacket,church,snow,fruit,hay,floor,field,street,mouth,steam engine,cheese,river,tree branch,suit,"
    "child,soup,desk,tub,tennis court,teeth,bridge,sky,officer,sidewalk,dock,tree,court,rock,board,"
    "branch,pan,box,body,salad,dirt,leaf,hand,highway,vegetable,computer monitor,door,meat,pair,beach,"
    "harbor,ocean,baseball player,girl,market,window,blanket,boy,woman,bat,baby,flower,wall,bath tub,"
    "tarmac,tennis ball,roll,park"
).split(",")


def is_voc(classes):
    return len(classes) == 20 and "tvmonitor" in classes


def is_coco(classes):
    return len(classes) == 80 and "toothbrush" in classes


def class_texts(classes, aliases=True):
    """SemPLeS 3.2.1, t_k: "a photo of train.", for VOC's classes by their aliases."""
    known = ALIASES if aliases and is_voc(classes) else {}
    return [f"a photo of {known.get(name, name)}." for name in classes]


def clims_backgrounds(classes):
    """The names that CLIMS keeps out of the foreground."""
    return [name for name in (CLIMS_COCO if is_coco(classes) else CLIMS_VOC) if name not in classes]


def backgrounds(classes):
    """CLIP-ES's background names: VOC's 25 without what is a class here; for COCO also without sign."""
    names = [name for name in VOC_BACKGROUNDS if name not in classes]
    return [name for name in names if not (is_coco(classes) and name == "sign")]


def prompt_texts(classes, backgrounds, prompt="ensemble"):
    """CLIP-ES, VPL: per template the texts of classes, then backgrounds; their features are averaged."""
    templates, synonyms = PROMPTS[prompt]
    names = [SYNONYMS.get(name, name) for name in classes] if synonyms else list(classes)
    return [[template.format(name) for name in [*names, *backgrounds]] for template in templates]
