"""What only a table of the papers needs. `python -m ablations` lists it."""
