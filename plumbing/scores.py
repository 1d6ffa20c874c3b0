"""A score in words: what eval_*.json holds, for the terminal and for the report page."""

SOURCES = {"cls": "image labels alone", "match": "+ L_match", "refine": "+ L_prompt, L_refine",
           "text": "CLIP, texts", "vision": "CLIP, prototypes W"}


def maps_of(protocol):
    """Whose maps were scored, or made into the masks that were: one of SOURCES; cls for those of another
    project."""
    made = protocol.get("made_by") or {}
    if protocol["what"] == "pseudo":
        made = made.get("maps") or {}
    return made["source"] if made.get("source") in SOURCES else "cls"


def in_words(protocol):
    """A protocol as a line of text."""
    p, made = protocol, protocol.get("made_by") or {}
    limit = " (--limit)" if p.get("limit") else ""
    words = [f"{p['split']} of {p['data']}", f"{p['images']} images{limit}"]
    if made and p["what"] in ("cam", "pseudo"):
        words.append(f"maps of {maps_of(p)}")
    if p["what"] == "cam":
        tau = {"text": "tau_t", "vision": "tau_i"}.get(made.get("source"))
        if (made.get("args") or {}).get(tau):
            words.append(f"tau {made['args'][tau]:g}")
        words.append(f"background {p['background']} {p['value']:g}")
    if p["what"] == "pseudo" and made:
        words += masks_in_words(made)
    if p["what"] == "seg":
        words += [made.get("model", ""), "scales "
                                         f"{' '.join(map(str, p['scales']))}{', flips' if p['flip'] else ''}",
                  f"CRF {p['crf']}" if p["crf"] else "no CRF"]
    if p.get("oracle"):
        words.append("used the truth")
    return " · ".join(filter(None, words))


def masks_in_words(made):
    """pseudo.json as words: segments, background, CRF."""
    words = []
    if "vote" in made:
        bare = f" ({made['without_segments']} images without)" if made["without_segments"] else ""
        source = made["segments"]["source"] or made["segments"]["folder"]
        words.append(f"{source} segments, vote {made['vote']}{bare}")
    if "pixels" in made and (made["crf"] or made["without_segments"]):
        rule = made["pixels"]
        words.append(f"background {rule['background']} {rule['value']:g} for the CRF and images without "
                     "segments")
    words.append(f"background {made['background']} {made['value']:g}")
    words.append(f"CRF {made['crf']}" if made["crf"] else "no CRF")
    return words


def show(found):
    """Prints the content of an eval_*.json."""
    width = max(len(name) for name in found["iou"])
    for name, value in found["iou"].items():
        absent = "   -   in neither truth nor prediction: not scored"
        print(f"  {name:<{width}}  {absent if value is None else f'{100 * value:5.1f}'}")
    print(f"  {'mIoU':<{width}}  {100 * found['miou']:5.1f}   pixel accuracy "
          f"{100 * found['pixel_accuracy']:.1f}   ({in_words(found['protocol'])})")
    if "oracle_best" in found:
        best = found["oracle_best"]
        print(f"  oracle: {100 * best['miou']:.1f} at threshold {best['threshold']:.2f}, chosen with the "
              "truth")
