"""Tables of the pages in docs/, which a program writes between <!-- its name --> and <!-- end -->."""


def table(head, rows):
    """A list of names and lists of cells -> a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def put(page, mark, text):
    """Replaces what stands between a mark and the next <!-- end --> of a page."""
    start, end = f"<!-- {mark} -->", "<!-- end -->"
    before, found, rest = page.read_text().partition(start)
    old, closed, after = rest.partition(end)
    if not found or not closed or "<!--" in old:
        raise ValueError(f"{page} has no lines {start} and {end}: add them where the table belongs")
    page.write_text(f"{before}{start}\n{text}\n{end}{after}")
