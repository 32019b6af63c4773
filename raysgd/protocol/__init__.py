"""Who pushes what, when it counts, and what is refused: state machines without clocks, threads or Ray.

Every class here is driven twice: by the Ray actors of :mod:`raysgd.runtime`, and by :mod:`raysgd.simulate`,
which loses, repeats and reorders the messages.
"""
