"""What only SemPLeS Table 4 needs, as whole scripts: CLIMS, SAM segments, Mask2Former. `python -m
hosts.train_clims`"""
