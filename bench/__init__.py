"""Side-by-side measurements against peers: ``python -m bench``; never imported by the package or its tests."""
