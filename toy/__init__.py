"""The toy world: its drawings (drawings.py) and its small networks (networks.py)."""
