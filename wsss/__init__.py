"""The papers: losses, texts, networks, maps, CRF, scores. Each file copies alone."""
