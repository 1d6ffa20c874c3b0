"""Class names and texts: synonyms, templates, backgrounds."""


from plumbing import files


# From the authors' code, not in the paper: CLIP-ES writes synonyms into the class name.
SYNONYMS = {"bird": "bird avian", "chair": "chair seat", "person": "person with clothes,people,human", "tvmonitor": "tvmonitor screen"}
CLIMS_BACKGROUNDS = "tree river sea lake water railway railroad track stone rocks".split()


def class_texts(classes, template="a photo of {}.", synonyms=False):
    """Texts for CLIP: `template` over class names; CLIP-ES's synonyms in the name if asked."""
    if template.count("{}") != 1 or set(template.replace("{}", "")) & {"{", "}"}:
        raise ValueError(f"--template {template!r}: a text with one {{}} in it, where the class's name goes")
    return [template.format(SYNONYMS.get(name, name) if synonyms else name) for name in classes]


def manual_texts(source="clims", template="a photo of {}."):
    """Texts of what occurs beside objects, named by hand: of CLIMS's ten backgrounds, or of the names in a file, one a line."""
    names = CLIMS_BACKGROUNDS if source == "clims" else [line.strip() for line in files.read_lines(source) if line.strip()]
    if not names:
        raise ValueError(f"{source} is empty: write one name a line")
    return class_texts(names, template)


# Differs from the paper: VPL compares a single prompt with an ensemble and names one text of it. CLIP-ES's is that one; the ensemble is its synonyms.
PROMPTS = {"single": ("a photo of a {}.", False), "ensemble": ("a clean origami {}.", True)}       # template, synonyms in the name


def prompt_texts(folder, prompt="ensemble", template=None):
    """Texts of a folder's classes, then of its backgrounds, for CLIP's GradCAM; `template` in place of the prompt's."""
    usual, synonyms = PROMPTS[prompt]
    return class_texts(folder.classes, template or usual, synonyms) + class_texts(folder.backgrounds, template or usual)
