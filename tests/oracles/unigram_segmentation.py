"""Writes unigram_segmentation.npz: the segmentations of a unigram model by Hugging Face tokenizers.

Run once with tokenizers; what is stored is of tokenizers 0.23.3:
`python tests/oracles/unigram_segmentation.py`.
"""

from pathlib import Path

import numpy as np
import tokenizers
from tokenizers.models import Unigram


def main():
    rng = np.random.default_rng(0)
    pieces = ["a", "b", "c", "ab", "bc", "ca", "abc", "cab", "bca", "aa", "abca"]
    log_p = np.log(rng.dirichlet(np.ones(len(pieces))))
    model = Unigram([("<unk>", -100.0), *zip(pieces, map(float, log_p))], unk_id=0)
    words = ["".join(rng.choice(list("abc"), size=n)) for n in rng.integers(1, 15, size=40)]
    written = [" ".join(token.value for token in model.tokenize(word)) for word in words]
    np.savez_compressed(
        Path(__file__).with_suffix(".npz"),
        pieces=pieces,
        log_probabilities=log_p,
        words=words,
        segmentations=written,
        tokenizers_version=tokenizers.__version__,
    )


if __name__ == "__main__":
    main()
