"""Pages: HTML files that stand alone, in light or dark, without scripts and without a network."""
