"""What CLIP's text encoder reads: templates, synonyms, backgrounds. Names are part of the methods."""

# From the authors' code, not in the paper: CLIP-ES writes synonyms into VOC's class names.
SYNONYMS = {
    "bird": "bird avian",
    "chair": "chair seat",
    "person": "person with clothes,people,human",
    "tvmonitor": "tvmonitor screen",
}

# Differs from the paper: VPL compares "single prompt" with "ensemble prompts" and prints one text, which is
# CLIP-ES's. The ensemble here is that text with CLIP-ES's synonyms in it.
PROMPTS = {  # template, and whether synonyms stand in for class names
    "single": ("a photo of a {}.", False),
    "ensemble": ("a clean origami {}.", True),
}

# CLIP-ES, VOC: what may lie behind the objects.
VOC_BACKGROUNDS = """
    ground land grass tree building wall sky lake water river sea railway railroad keyboard helmet cloud house
    mountain ocean road rock street valley bridge sign
""".split()

# CLIMS, VOC: what often lies beside the objects. Their class_texts are those of its loss CBS.
CLIMS_BACKGROUNDS = "tree river sea lake water railway railroad track stone rocks".split()


def class_texts(classes, template="a photo of {}."):
    """SemPLeS 3.2.1, t_k: the class names in a template."""
    around = template.replace("{}", "", 1)
    if around == template or "{" in around or "}" in around:
        raise ValueError(f"template {template!r}: write one {{}} in it, where the class name goes")
    return [template.format(name) for name in classes]


def backgrounds(classes):
    """CLIP-ES's background names: VOC's 25; for the 80 classes of COCO without keyboard and sign."""
    coco = len(classes) == 80 and "toothbrush" in classes
    return [name for name in VOC_BACKGROUNDS if not (coco and name in ("keyboard", "sign"))]


def prompt_texts(classes, backgrounds, prompt="ensemble", template=None):
    """CLIP-ES and VPL: texts of the classes, then of the backgrounds. `template` replaces the usual one."""
    usual, synonyms = PROMPTS[prompt]
    names = [SYNONYMS.get(name, name) for name in classes] if synonyms else list(classes)
    return class_texts(names + list(backgrounds), template or usual)
