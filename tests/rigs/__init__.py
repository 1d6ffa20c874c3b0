"""The long forms of some tests, run by hand: python -m tests.rigs.faults --kills 100"""
