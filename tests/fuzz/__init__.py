"""Random and hostile input, made from valid input by mutation; each example must end in success or in one line.

    outcome     how one example ended, and what is wrong with that
    server      a process that forks for each example, so that crashes, hangs and memory are seen from outside
    doors       what an example calls: the commands and the library's functions
    folders     model folders to damage
    hostile     damaged folders by name: what has been tried
    profile     how many examples hypothesis makes
    test_*      one file a kind of input

A test in this folder is written so::

    from tests.fuzz.profile import fuzz
    from tests.fuzz.server import attempt

    @fuzz(examples=30)
    @given(change=...)
    def test_config(forks, change):
        folder = ...                                                    # written by the test
        attempt(forks, "tests.fuzz.doors:cli", ["generate", "--model", str(folder), "--prompt", "hi"])

`attempt` fails the test unless the call returns, or raises a RingError, within 10 s of processor time (240 s in all) and
1 GB of memory over the server's own. What is called must be importable by name and take JSON. A function that is known
to be bounded needs no fork: it may be called in the test itself.

RING_MLX_FUZZ=20 makes twenty times as many examples, chosen at random, for long runs; without it the examples are
always the same.
"""
