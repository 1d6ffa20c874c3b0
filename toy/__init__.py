"""The toy world: its drawings (drawings.py), its CLIP (clip.py) and its small networks (networks.py)."""
