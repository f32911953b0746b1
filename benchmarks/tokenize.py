"""Tokenization beside its peers, in one run: engines alone, then whole commands. CPU-seconds, wall, memory, equality.

    python benchmarks/tokenize.py [--corpus FILE] [--megabytes N] [--rounds 3] [--megatron DIR] [--json]

Without --corpus it takes that of tests/text_corpus.py, built from Debian packages; --megabytes takes the beginning.
--megatron is a checkout of Megatron-LM, whose tools/preprocess_data.py and preprocess_data_fast.py are run. Peers run
in the Python that runs this: to have them, make an environment with this project, gigatoken, kitoken, fastokens and
what Megatron-LM asks for, and use its Python; a peer that cannot be imported is left out, which is said. Everything
runs on two CPUs, rounds are interleaved, numbers are medians.
"""  # noqa: A005, the name is fixed

import os
import sys

FOLDER = os.path.dirname(os.path.realpath(__file__))  # noqa: PTH120, pathlib is not imported yet
sys.path[:] = [path for path in sys.path if os.path.realpath(path or ".") != FOLDER]

if __name__ == "tokenize":
    # A script beside this one, or a library that it imports, wanted the standard library's module.
    del sys.modules["tokenize"]
    import tokenize  # noqa: F401, what the importer gets from sys.modules
elif __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(FOLDER))  # noqa: PTH120
    from benchmarks.tokenize_tables import main

    main(__doc__)
